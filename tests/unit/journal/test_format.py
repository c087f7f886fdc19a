"""The bytes of the journal, without files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.journal.support import change, changes, records
from watchd.errors import JournalError
from watchd.journal.format import (
    FRAME_HEADER_BYTES,
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    Checkpoint,
    Entry,
    LayerMark,
    decode_entry,
    decode_header,
    encode_frames,
    encode_header,
    find_synced,
    scan,
)
from watchd.records import Change, Desync

SEED = 0x12345678

HEADER_HEX = "5741544348444a0a010000000102030405060708070000000000000000002a36fe9c97171ce5685b"
FRAMES_HEX = (
    "3cdeddd6160000000600000000000000f5d58101980181a46261736594c4022f6c04020103c200000000c0b3d5c541000000"
    "0700000000000000f5d501009d0105a462617365c40261ff05c3c2c4016209cd012cc402736801c424000102030405060708"
    "090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f2021222332b90e580e0000000800000000000000f5d50200940206"
    "a462617365a56c696d6974"
)
OLDER_HEX = (
    "44ebba3b110000000600000000000000f5d58101940181a46261736593c4022f6c040203c2db9267901b0000000700000000"
    "000000f5d501009c0105a462617365c40261ff05c3c2c4016209cd012cc40273680132b90e580e0000000800000000000000"
    "f5d50200940206a462617365a56c696d6974"
)

checkpoints = st.builds(
    Checkpoint,
    st.dictionaries(st.text("abc", max_size=3), st.builds(LayerMark, st.binary(max_size=9), *[st.integers(0, 9)] * 3)),
    st.integers(0, 2**63),
    st.booleans(),
    st.integers(0, 2**63),
    st.integers(0, 2**63),
    st.integers(0, 2**32),
    st.integers(0, 2**32 - 1),
)
entries = st.lists(records | checkpoints, min_size=1, max_size=8)


def decoded(buffer: bytes, last_seq: int = 0, seed: int = SEED) -> list[tuple[int, Entry | None]]:
    return [(frame[0], decode_entry(buffer, frame)) for frame in scan(buffer, last_seq, seed=seed).frames]


def numbered(items: list[Entry], last_seq: int = 0) -> list[tuple[int, Entry]]:
    result = []
    for item in items:
        last_seq += not isinstance(item, Checkpoint)
        result.append((last_seq, item))
    return result


def test_bytes_of_version_1_never_change() -> None:
    header = encode_header(b"\1\2\3\4\5\6\7\x08", 7, 1_700_000_000_000_000_000)
    record = Change(5, "base", b"a\xff", 5, True, False, b"b", 9, 300, b"sh", 1, bytes(range(36)))
    frames = encode_frames([Checkpoint({"base": LayerMark(b"/l", 4, 2, 1)}, 3), record, Desync(6, "base", "limit")], 6,
                           seed=decode_header(header).crc, synced=True)  # fmt: skip
    assert header.hex() == HEADER_HEX
    assert frames.hex() == FRAMES_HEX


def test_fields_that_were_not_there_yet_when_something_was_written_have_their_defaults() -> None:
    seed = decode_header(bytes.fromhex(HEADER_HEX)).crc
    (_, checkpoint), (_, record), _ = decoded(bytes.fromhex(OLDER_HEX), 6, seed)
    assert checkpoint == Checkpoint({"base": LayerMark(b"/l", 4, 2, 0)}, 3)
    assert record == Change(5, "base", b"a\xff", 5, True, False, b"b", 9, 300, b"sh", 1, None)


@given(entries, st.integers(0, 2**62))
def test_entries_come_back_as_they_went_in(items: list[Entry], last_seq: int) -> None:
    buffer = encode_frames(items, last_seq, seed=SEED, synced=True)
    found = scan(buffer, last_seq, seed=SEED)
    assert (found.end, found.fault) == (len(buffer), "")
    assert decoded(buffer, last_seq) == numbered(items, last_seq)


@given(entries, st.data())
def test_flipped_bits_cost_nothing_but_what_follows_them(items: list[Entry], data: st.DataObject) -> None:
    buffer = bytearray(encode_frames(items, 0, seed=SEED, synced=True))
    ends = [frame[3] for frame in scan(bytes(buffer), 0, seed=SEED).frames]
    position = data.draw(st.integers(0, len(buffer) - 1))
    buffer[position] ^= data.draw(st.integers(1, 255))
    intact = sum(end <= position for end in ends)
    assert decoded(bytes(buffer)) == numbered(items)[:intact]


@given(entries, st.data())
def test_a_cut_costs_nothing_before_it(items: list[Entry], data: st.DataObject) -> None:
    buffer = encode_frames(items, 0, seed=SEED, synced=True)
    ends = [frame[3] for frame in scan(buffer, 0, seed=SEED).frames]
    size = data.draw(st.integers(0, len(buffer)))
    found = scan(buffer[:size], 0, seed=SEED)
    assert found.fault == ""
    assert decoded(buffer[:size]) == numbered(items)[: sum(end <= size for end in ends)]


@given(st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
def test_no_flipped_bit_of_a_header_goes_unseen(position: int, bits: int) -> None:
    header = bytearray(encode_header(bytes(8), 1, 2))
    header[position] ^= bits
    with pytest.raises(JournalError):
        decode_header(bytes(header))


def test_frames_of_another_segment_do_not_check() -> None:
    buffer = encode_frames(changes(3), 0, seed=SEED, synced=True)
    assert scan(buffer, 0, seed=SEED + 1).frames == []


def test_a_repeated_or_missing_record_is_a_fault() -> None:
    one, two = (encode_frames([change(number)], number, seed=SEED, synced=False) for number in (0, 1))
    assert len(scan(one + two, 0, seed=SEED).frames) == 2
    assert "sequence number 1 stands where 2 is due" in scan(one + one, 0, seed=SEED).fault
    assert "sequence number 2 stands where 1 is due" in scan(two, 0, seed=SEED).fault


def test_an_entry_that_no_reader_would_accept_is_not_written() -> None:
    with pytest.raises(JournalError, match="does not fit"):
        encode_frames([change(1, bytes(MAX_FRAME_BYTES))], 0, seed=SEED, synced=True)


def test_zeros_that_a_power_cut_left_are_no_frame() -> None:
    assert scan(bytes(4096), 0, seed=SEED).fault
    assert find_synced(bytes(4096), 0, seed=SEED) is None


def test_a_later_commit_is_found_behind_damage() -> None:
    first = encode_frames(changes(3), 0, seed=SEED, synced=True)
    second = encode_frames(changes(2), 3, seed=SEED, synced=True)
    broken = b"\xff" * 30 + first[30:]
    assert find_synced(broken, 0, seed=SEED) is None
    assert find_synced(broken + second, 0, seed=SEED) == len(first)


def test_a_file_name_that_looks_like_a_commit_proves_nothing() -> None:
    forged = encode_frames(changes(1), 1, seed=0, synced=True)
    torn = encode_frames([change(1, forged), change(2)], 0, seed=SEED, synced=True)
    assert find_synced(b"\0" * FRAME_HEADER_BYTES + torn[FRAME_HEADER_BYTES:], 0, seed=SEED) is None


def test_a_note_of_a_later_version_is_passed_over() -> None:
    buffer = encode_frames([Checkpoint({})], 0, seed=SEED, synced=True)
    assert decode_entry(buffer, (0, 200, 0, len(buffer))) is None


def test_a_record_of_a_later_version_is_not_passed_over() -> None:
    buffer = encode_frames([Checkpoint({})], 0, seed=SEED, synced=True)
    with pytest.raises(JournalError, match="cannot decode record 1"):
        decode_entry(buffer, (1, 100, 0, len(buffer)))
