"""What `recover` makes of what a run left behind."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.unit.journal import judge
from tests.unit.journal.support import SMALL_SEGMENTS, change, changes, flip, only_segment, write
from watchd.errors import JournalError
from watchd.journal.format import HEADER_BYTES
from watchd.journal.recovery import lock, recover
from watchd.journal.segments import list_segments, segment_path
from watchd.records import Desync, Record, Resync, Start, Stop


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def sizes_after(directory: Path, commits: Sequence[Sequence[Record]]) -> list[int]:
    """Writes each commit with a run of its own; returns the segment's size after each."""
    sizes = []
    for commit in commits:
        write(directory, [commit])
        sizes.append(only_segment(directory).stat().st_size)
    return sizes


def test_an_empty_directory_becomes_an_empty_journal(directory: Path) -> None:
    directory.mkdir()
    opened = recover(directory)
    assert (opened.first_seq, opened.last_seq) == (1, 0)
    assert opened.bytes == only_segment(directory).stat().st_size
    assert judge.records(directory) == []
    assert recover(directory).header.epoch == opened.header.epoch


def test_damage_in_an_acknowledged_record_is_refused_and_nothing_touched(directory: Path) -> None:
    one, two = sizes_after(directory, [[change(1)], changes(2)])
    path = only_segment(directory)
    for offset in (one - 1, one - 10):
        flip(path, offset)
        before = path.read_bytes()
        with pytest.raises(JournalError, match=r"is damaged at byte \d+, behind record 0: the checksum") as caught:
            recover(directory)
        assert str(path) in str(caught.value)
        assert "watchd journal verify" in caught.value.remedy
        assert path.read_bytes() == before
        assert len(before) == two
        assert not list(directory.glob("*.torn"))
        flip(path, offset)


def test_a_damaged_length_is_not_taken_for_a_torn_tail(directory: Path) -> None:
    start, _, _ = sizes_after(directory, [[], [change(1)], changes(2)])
    flip(only_segment(directory), start + 6, 0x0F)
    with pytest.raises(JournalError, match=f"damaged at byte {start}, behind record 0: the segment ends in the middle"):
        recover(directory)


def test_a_torn_tail_is_kept_beside_the_journal(directory: Path) -> None:
    [size] = sizes_after(directory, [[change(1)]])
    path = only_segment(directory)
    for number, tail in enumerate((b"torn", b"again" * 9)):
        with path.open("ab") as file:
            file.write(tail)
        opened = recover(directory)
        assert opened.torn
        assert opened.torn.read_bytes() == tail
        assert len(list(directory.glob("*.torn"))) == number + 1
        assert path.stat().st_size == size == opened.end
        assert opened.last_seq == 1


def test_a_segment_that_never_got_its_name_is_cleared_away(directory: Path) -> None:
    write(directory, [changes(2)])
    leftover = segment_path(directory, 3).with_suffix(".wal.tmp")
    leftover.write_bytes(b"half a header")
    assert recover(directory).last_seq == 2
    assert not leftover.exists()


@pytest.mark.parametrize("size", [0, 10, HEADER_BYTES, HEADER_BYTES + 5])
def test_a_segment_without_header_or_checkpoint_is_damage(directory: Path, size: int) -> None:
    write(directory, [changes(2)])
    os.truncate(only_segment(directory), size)
    with pytest.raises(JournalError, match=r"header is cut short|damaged at byte 40"):
        recover(directory)
    assert only_segment(directory).stat().st_size == size


def test_a_file_that_is_no_segment_is_refused(directory: Path) -> None:
    write(directory, [changes(2)])
    only_segment(directory).write_bytes(b"x" * 100)
    with pytest.raises(JournalError, match="no journal segment"):
        recover(directory)


def test_a_later_format_is_refused_and_left_alone(directory: Path) -> None:
    write(directory, [changes(2)])
    path = only_segment(directory)
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, 8, 2)
    struct.pack_into("<I", data, 36, zlib.crc32(data[:36]))
    path.write_bytes(data)
    with pytest.raises(
        JournalError, match=r"format 2, flags 0x0; this watchd reads format 1 only; use the watchd that wrote it"
    ):
        recover(directory)
    assert path.read_bytes() == data


def test_a_segment_of_another_journal_is_refused(directory: Path, tmp_path: Path) -> None:
    for place in (directory, tmp_path / "other"):
        write(place, [changes(8, 1), changes(8, 9), changes(8, 17)], SMALL_SEGMENTS)
    last = list_segments(directory)[-1]
    os.replace(segment_path(tmp_path / "other", last), segment_path(directory, last))
    with pytest.raises(JournalError, match="belongs to another journal"):
        recover(directory)


def test_a_renamed_segment_is_refused(directory: Path) -> None:
    write(directory, [changes(2)])
    only_segment(directory).rename(segment_path(directory, 2))
    with pytest.raises(JournalError, match="begins with record 1"):
        recover(directory)


def test_a_desync_that_nobody_closed_is_not_forgotten(directory: Path) -> None:
    write(
        directory, [[Start(1, "v", "b"), Desync(2, "a", "overflow"), Desync(3, "b", "limit")], [Resync(4, "a", 2, 0)]]
    )
    recovered = recover(directory).recovered()
    assert {name: mark.open_desync for name, mark in recovered.layers.items()} == {"a": 0, "b": 3}


def test_a_resync_does_not_close_a_later_desync(directory: Path) -> None:
    write(directory, [[Desync(1, "a", "overflow"), Desync(2, "a", "overflow"), Resync(3, "a", 1, 0)]])
    assert recover(directory).recovered().layers["a"].open_desync == 2


def test_the_last_segment_alone_tells_the_state(directory: Path) -> None:
    first: list[Record] = [Desync(1, "a", "overflow"), *changes(20)]
    write(directory, [first, [change(77)]], SMALL_SEGMENTS)
    assert len(list_segments(directory)) == 2
    segment_path(directory, 1).unlink()
    opened = recover(directory)
    assert (opened.first_seq, opened.last_seq) == (22, 22)
    recovered = opened.recovered()
    assert recovered.layers["a"].open_desync == 1
    assert (recovered.last_time_ns, recovered.stopped) == (77, False)


def test_only_a_stop_at_the_very_end_is_an_orderly_end(directory: Path) -> None:
    directory.mkdir()
    assert not recover(directory).recovered().stopped
    write(directory, [[Stop(1, "v", "b")]])
    assert recover(directory).recovered().stopped
    write(directory, [[change(2)]])
    assert not recover(directory).recovered().stopped


def test_a_stop_is_remembered_across_the_beginning_of_a_segment(directory: Path) -> None:
    write(directory, [[*changes(20), Stop(9, "v", "b")], [change(10)]], SMALL_SEGMENTS)
    path = segment_path(directory, 22)
    judged = judge.segment(path.name, path.read_bytes())[1]
    assert judged[0][2] == [1, {}, 9, True, 0, 0, 0, 0]


def test_a_second_writer_is_told_who_the_first_is(directory: Path) -> None:
    held = lock(directory)
    with pytest.raises(JournalError, match=f"being written by process {os.getpid()}"):
        lock(directory)
    held.close()
    lock(directory).close()


def test_a_directory_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match=r"cannot use the journal directory .*: Not a directory"):
        lock(tmp_path / "file" / "journal")
