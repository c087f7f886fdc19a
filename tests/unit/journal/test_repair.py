"""What is damaged is found, and whatever is not broken survives the repair."""

from __future__ import annotations

import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.soak import rounds
from tests.unit.journal import judge
from tests.unit.journal.mortal_disk import KilledError, MortalDisk
from tests.unit.journal.support import SMALL_SEGMENTS, changes, flip, only_segment, write
from watchd.errors import JournalError
from watchd.journal import appender
from watchd.journal.changes import collect
from watchd.journal.format import FRAME_HEADER_BYTES, HEADER_BYTES, LayerMark
from watchd.journal.reader import extent, read
from watchd.journal.recovery import lock, recover
from watchd.journal.repair import Repaired, repair
from watchd.journal.salvage import crc_seed
from watchd.journal.segments import list_segments, segment_path
from watchd.journal.verify import verify
from watchd.records import Desync, Resync, Stop

LOST = [2, 0, "", "source-lost"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A journal of 60 records in several segments."""
    place = tmp_path / "journal"
    write(place, [changes(5, 1 + 5 * number) for number in range(12)], SMALL_SEGMENTS)
    assert len(list_segments(place)) > 3
    return place


def paths(directory: Path) -> list[Path]:
    return [segment_path(directory, first) for first in list_segments(directory)]


def digest(directory: Path) -> dict[str, bytes]:
    """Everything in the directory but who locked it last."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "lock"}


def kept(directory: Path) -> dict[int, list[object]]:
    """What the judge reads, without the desyncs of the repair. It asserts that the numbers have no hole."""
    found = judge.records(directory)
    assert [seq for seq, _ in read(directory)] == [seq for seq, _ in found]
    return {seq: value for seq, value in found if not (value[0] == 2 and value[2] == "")}


def frames(path: Path) -> list[tuple[int, int, int]]:
    """Number, begin and end of every record's frame of a good segment."""
    data, at, found = path.read_bytes(), HEADER_BYTES, []
    while at < len(data):
        length, seq, _mark, kind = struct.unpack_from("<IQHB", data, at + 4)
        end = at + FRAME_HEADER_BYTES + length
        if kind < 128:
            found.append((seq, at, end))
        at = end
    return found


def repaired(directory: Path) -> list[Repaired]:
    """Repairs, and makes sure that nothing is left to do."""
    done = repair(directory)
    assert verify(directory).is_sound
    before = digest(directory)
    assert repair(directory) == []
    assert digest(directory) == before
    return done


def test_a_good_journal_is_good_and_left_alone(directory: Path) -> None:
    before = digest(directory)
    report = verify(directory)
    assert report.is_sound
    assert report.faults == []
    assert sum(one.records for one in report.segments) == 60
    assert [one.bytes for one in report.segments] == [path.stat().st_size for path in paths(directory)]
    assert repair(directory) == []
    assert digest(directory) == before


@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_broken_record_costs_that_record_only(directory: Path, which: int) -> None:
    path = paths(directory)[which]
    seq, begin, end = frames(path)[1]
    before = kept(directory)
    flip(path, begin + 25)
    broken = path.read_bytes()[begin:end]
    report = verify(directory)
    [fault] = report.faults
    assert (fault.path, fault.offset, fault.record, fault.torn) == (path, begin, seq - 1, False)
    assert fault.reason == f"{end - begin} bytes are broken, records {seq} to {seq} are lost"
    [done, *end_of_journal] = sorted(repaired(directory), key=lambda one: one.path != path)
    assert done.lost == ((seq, seq),)
    assert [one.lost for one in end_of_journal] == [()] * (which != -1)
    [aside] = done.aside
    assert aside.name == f"{path.stem}-{begin}.damaged"
    assert aside.read_bytes() == broken
    del before[seq]
    assert kept(directory) == before


def test_what_was_lost_is_a_desync_of_every_layer_and_the_next_start_looks_from_before_it(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    write(
        directory, [[Desync(1, "a", "overflow"), Resync(2, "a", 1, 0)], changes(20, 3), changes(5, 50)], SMALL_SEGMENTS
    )
    path = paths(directory)[0]
    seq, begin, _ = frames(path)[5]
    flip(path, begin + 30)
    repaired(directory)
    records = dict(judge.records(directory))
    assert records[seq][2:] == ["", "source-lost"]
    assert records[28][2:] == ["", "restart"]
    assert records[seq][1] == records[seq - 1][1], "its time is that of the record before"
    recovered = recover(directory).recovered()
    assert recovered.every_layer == 28
    assert recovered.layers["a"].open_desync == 28
    write(directory, [[Resync(99, "a", 28, 0)]])
    assert recover(directory).recovered().layers["a"].open_desync == 0


def test_a_baseline_before_what_was_lost_is_fresh_for_good_and_a_later_one_is_not(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    write(directory, [changes(20), changes(5, 50)], SMALL_SEGMENTS)
    epoch = extent(directory).epoch
    path = paths(directory)[0]
    seq, begin, _ = frames(path)[5]
    flip(path, begin + 30)
    repaired(directory)
    assert collect(tmp_path, f"{epoch}:{seq}").fresh, "nobody has looked yet"
    write(directory, [[Resync(99, "base", 26, 0)], changes(20, 60)], SMALL_SEGMENTS)
    for since, fresh in ((0, True), (seq - 1, True), (seq, False), (25, False)):
        assert collect(tmp_path, f"{epoch}:{since}").fresh is fresh
    assert recover(directory).checkpoint.lost == seq


def test_a_layer_that_comes_after_a_repair_is_known_from_then_on(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    write(directory, [changes(20), changes(5, 50)], SMALL_SEGMENTS)
    epoch = extent(directory).epoch
    path = paths(directory)[0]
    _, begin, _ = frames(path)[5]
    flip(path, begin + 30)
    repaired(directory)
    last = extent(directory).last_seq

    def fresh(since: int, *layers: str) -> bool:
        return collect(tmp_path, f"{epoch}:{since}", layers=frozenset(layers)).fresh

    assert fresh(last)
    assert fresh(last, "new")
    write(directory, [[{"new": LayerMark(b"/n", 1, 0, last)}, *changes(3, 70)]])
    assert (fresh(last, "new"), fresh(last + 1, "new"), fresh(last)) == (True, False, False)


def test_a_torn_tail_is_no_damage(directory: Path) -> None:
    path = paths(directory)[-1]
    with path.open("ab") as file:
        file.write(b"torn")
    report = verify(directory)
    assert report.is_sound
    [fault] = report.faults
    assert fault.torn
    assert "left by a crash" in fault.reason
    before = digest(directory)
    assert repair(directory) == []
    assert digest(directory) == before
    assert recover(directory).torn


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: bytes(HEADER_BYTES) + data[HEADER_BYTES:],
        lambda data: bytes(100) + data[100:],
        lambda data: b"\xff" + data[1:],
        lambda data: data[:36] + b"\0\0\0\0" + data[40:],
        lambda data: data[:12] + bytes(8) + data[20:],
        lambda data: data[7:],
    ],
)
@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_header_that_is_lost_costs_no_record_behind_it(
    directory: Path, which: int, damage: Callable[[bytes], bytes]
) -> None:
    path = paths(directory)[which]
    before = kept(directory)
    [epoch] = {judge.segment(one.name, one.read_bytes())[0] for one in paths(directory)}
    path.write_bytes(damage(path.read_bytes()))
    assert not verify(directory).is_sound
    repaired(directory)
    after = kept(directory)
    missing = before.keys() - after.keys()
    assert len(missing) <= 1, "the first record, where a hundred bytes are gone"
    assert all(after[seq] == before[seq] for seq in after)
    assert {judge.segment(one.name, one.read_bytes())[0] for one in paths(directory)} == {epoch}


def test_a_journal_whose_only_header_is_lost_gets_a_new_epoch_so_that_no_cursor_fits(tmp_path: Path) -> None:
    write(tmp_path, [changes(9)])
    path = only_segment(tmp_path)
    before = judge.segment(path.name, path.read_bytes())[0]
    path.write_bytes(bytes(HEADER_BYTES) + path.read_bytes()[HEADER_BYTES:])
    repaired(tmp_path)
    assert len(kept(tmp_path)) == 9
    assert judge.segment(path.name, path.read_bytes())[0] != before


def test_a_single_bit_of_the_only_header_does_not_cost_the_epoch(tmp_path: Path) -> None:
    write(tmp_path, [changes(9)])
    path = only_segment(tmp_path)
    before = path.read_bytes()
    for offset in (2, 9, 11, 24, 38):
        flip(path, offset, 1)
        repaired(tmp_path)
        assert path.read_bytes() == before


@pytest.mark.parametrize("size", [0, 10, HEADER_BYTES, HEADER_BYTES + 5])
def test_a_segment_of_which_nothing_is_left_is_filled(directory: Path, size: int) -> None:
    path, following = paths(directory)[1:3]
    before = kept(directory)
    os.truncate(path, size)
    rest = path.read_bytes()
    [fault, *_] = verify(directory).faults
    assert (fault.path, fault.torn) == (path, False)
    done = repaired(directory)
    first, behind = int(path.stem), int(following.stem)
    assert next(one.lost for one in done if one.path == path) == ((first, behind - 1),)
    assert kept(directory) == {seq: value for seq, value in before.items() if not first <= seq < behind}
    assert b"".join(one.read_bytes() for one in sorted(directory.glob("*.damaged"))) in (rest, rest[HEADER_BYTES:])


def test_a_segment_that_is_missing_is_filled(directory: Path) -> None:
    _, path, following = paths(directory)[:3]
    before = kept(directory)
    path.unlink()
    [fault] = verify(directory).faults
    assert f"the next segment begins with record {int(following.stem)}" in fault.reason
    repaired(directory)
    gone = range(int(path.stem), int(following.stem))
    assert kept(directory) == {seq: value for seq, value in before.items() if seq not in gone}


def test_no_number_is_given_twice_though_the_last_segment_is_garbage(directory: Path) -> None:
    last = max(kept(directory))
    path = paths(directory)[-1]
    path.write_bytes(os.urandom(path.stat().st_size))
    repaired(directory)
    assert recover(directory).last_seq > last


def test_a_part_that_was_written_to_the_wrong_place_is_put_back(directory: Path) -> None:
    path = paths(directory)[1]
    before = kept(directory)
    data = path.read_bytes()
    _, begin, end = frames(path)[3]
    path.write_bytes(data[:HEADER_BYTES] + data[begin:end] + data[HEADER_BYTES:])
    assert not verify(directory).is_sound
    repaired(directory)
    assert kept(directory) == before


def refused(directory: Path, match: str) -> None:
    before = digest(directory)
    with pytest.raises(JournalError, match=match):
        repair(directory)
    assert digest(directory) == before
    assert not verify(directory).is_sound


def test_a_later_format_is_refused(directory: Path) -> None:
    path = paths(directory)[1]
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, 8, 2)
    struct.pack_into("<I", data, 36, zlib.crc32(data[:36]))
    path.write_bytes(data)
    refused(
        directory,
        "it has format 2, flags 0x0; this watchd reads format 1 only; use the watchd that wrote it; or move it away",
    )


def test_segments_of_two_journals_are_refused(directory: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", [changes(5, 1 + 5 * number) for number in range(12)], SMALL_SEGMENTS)
    path = paths(directory)[2]
    os.replace(segment_path(tmp_path / "other", int(path.stem)), path)
    refused(directory, "belongs to another journal than .*; move away those of the journal that is not wanted")


def test_a_renamed_segment_is_refused(directory: Path) -> None:
    paths(directory)[-1].rename(segment_path(directory, 999))
    refused(directory, "begins with record .* not with what its name says; give it its own name; or move it away")


def test_two_segments_with_the_same_records_are_refused(directory: Path) -> None:
    one, other = paths(directory)[:2]
    grown = one.read_bytes() + reseeded(other, one)
    one.write_bytes(grown)
    refused(directory, f"both hold record {int(other.stem)}; move the one away")


def reseeded(path: Path, into: Path) -> bytes:
    """The records of a segment as they would stand in another one."""
    seed = struct.unpack_from("<I", into.read_bytes(), 36)[0]
    bodies = [path.read_bytes()[begin + 4 : end] for _, begin, end in frames(path)]
    return b"".join(zlib.crc32(body, seed).to_bytes(4, "little") + body for body in bodies)


def test_a_journal_that_is_being_written_is_refused(directory: Path) -> None:
    flip(paths(directory)[0], 70)
    with lock(directory):
        refused(directory, f"being written by process {os.getpid()}")


def test_a_directory_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    for use in (verify, repair):
        with pytest.raises(JournalError, match="start `watchd run` once"):
            use(tmp_path / "journal")
    assert list(tmp_path.iterdir()) == []


# ---- at random -------------------------------------------------------------------------------------------------------


def damage(data: bytes, chance: random.Random) -> tuple[bytes, list[tuple[int, int]]]:
    """One accident, and which bytes of the old content are not what they were or where they were."""
    start = chance.randrange(len(data))
    stop = min(len(data), start + chance.choice((1, 8, 60, 512, len(data))))
    kind = chance.choice(("flip", "zero", "garbage", "cut", "insert", "delete"))
    if kind == "flip":
        return data[:start] + bytes([data[start] ^ 1 << chance.randrange(8)]) + data[start + 1 :], [(start, start + 1)]
    if kind == "zero":
        return data[:start] + bytes(stop - start) + data[stop:], [(start, stop)]
    if kind == "garbage":
        return data[:start] + chance.randbytes(stop - start) + data[stop:], [(start, stop)]
    if kind == "cut":
        return data[:start], [(start, len(data))]
    if kind == "insert":
        return data[:start] + chance.randbytes(stop - start) + data[start:], [(start - 1, start + 1)]
    return data[:start] + data[stop:], [(start - 1, stop + 1)]


def test_every_record_whose_bytes_are_intact_survives_any_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(rounds(150)):
        seed = random.randrange(2**32)
        chance = random.Random(seed)
        monkeypatch.setattr(appender, "SEAL_BYTES", chance.choice((100, 300, 1 << 20)))
        directory = tmp_path / str(number)
        commits = [changes(chance.randrange(1, 9), 100 * at) for at in range(1, 12)]
        write(directory, [*commits, [Stop(7, "v", "b")]], SMALL_SEGMENTS)
        before, intact = kept(directory), set[int]()
        hit = set(chance.choices(paths(directory), k=chance.randint(1, 3)))
        for path in paths(directory):
            whole = frames(path)
            if path in hit:
                data, areas = damage(path.read_bytes(), chance)
                path.write_bytes(data)
                whole = [one for one in whole if not any(one[1] < stop and start < one[2] for start, stop in areas)]
                if len(whole) < 2 and any(start < HEADER_BYTES for start, _ in areas):
                    whole = []  # a single record without a header proves nothing
            intact |= {seq for seq, _, _ in whole}
        assert_intact(directory, before, intact, f"seed {seed}")


def assert_intact(directory: Path, before: dict[int, list[object]], intact: set[int], why: str) -> None:
    was_hurt = not verify(directory).is_sound
    repair(directory)
    report = verify(directory)
    assert report.is_sound, why
    for fault in report.faults:  # damage at the very end alone looks like what a crash leaves; nothing else may hide so
        intact = {seq for seq in intact if seq <= fault.record}
    last = recover(directory).last_seq
    after = kept(directory)
    assert intact <= after.keys(), why
    assert all(after[seq] == before[seq] for seq in after), why
    assert last >= max(intact, default=0), why
    assert was_hurt or all(seq > last for seq in before.keys() - after.keys()), why


# ---- killed at every step --------------------------------------------------------------------------------------------


def test_a_repair_that_is_killed_at_any_step_is_completed_by_the_next_one(directory: Path, tmp_path: Path) -> None:
    before = kept(directory)
    hurt = [paths(directory)[at] for at in (0, 2, -1)]
    lost = []
    for path in hurt:
        seq, begin, _ = frames(path)[1]
        flip(path, begin + 25)
        lost.append(seq)
    paths(directory)[1].write_bytes(b"")
    content = digest(directory)
    steps = 0
    while True:
        steps += 1
        place = tmp_path / f"killed-{steps}"
        place.mkdir()
        for name, data in content.items():
            (place / name).write_bytes(data)
        try:
            repair(place, disk=MortalDisk(steps))
        except KilledError:
            assert_nothing_lost(place, content)
            repaired(place)
        else:
            break
        after = kept(place)
        empty = range(int(paths(place)[1].stem), int(paths(place)[2].stem))
        assert before.keys() - after.keys() == {*lost, *empty}
        assert all(after[seq] == before[seq] for seq in after)
        assert recover(place).recovered().every_layer > 60
    assert steps > 10


def assert_nothing_lost(directory: Path, content: dict[str, bytes]) -> None:
    """Every segment that is not as it was is good."""
    good = {one.path.name for one in verify(directory).segments if one.is_sound}
    for name, data in content.items():
        assert (directory / name).read_bytes() == data or name in good


def test_a_checksum_runs_backwards(tmp_path: Path) -> None:
    for size in (0, 1, 20, 300):
        data = os.urandom(size)
        seed = random.randrange(2**32)
        assert crc_seed(data, zlib.crc32(data, seed)) == seed


def test_what_was_folded_from_the_records_is_made_anew_after_a_repair_and_only_then(directory: Path) -> None:
    for name in ("index.db", "known.db"):
        (directory.parent / name).write_bytes(b"folded")
    assert repair(directory) == []
    assert (directory.parent / "index.db").exists()
    flip(paths(directory)[0], 70)
    repair(directory)
    assert not (directory.parent / "index.db").exists()
