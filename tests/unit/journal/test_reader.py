"""`read` and `Follower`, beside a writer and without one."""

from __future__ import annotations

import asyncio
import struct
import zlib
from pathlib import Path

import msgspec
import pytest

from tests.unit.journal.support import SMALL_SEGMENTS, change, changes, flip, only_segment, write
from watchd.errors import JournalError, RecordsGoneError
from watchd.journal import segments
from watchd.journal.disk import File, RealDisk, RealFile
from watchd.journal.format import LayerMark
from watchd.journal.reader import Extent, Follower, extent, read
from watchd.journal.segments import list_segments, segment_path
from watchd.journal.writer import Journal


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def segmented(directory: Path) -> Path:
    """40 records in several segments."""
    write(directory, [changes(5, start) for start in range(1, 41, 5)], SMALL_SEGMENTS)
    assert len(list_segments(directory)) > 2
    return directory


def numbers(directory: Path, since: int = 0) -> list[int]:
    return [seq for seq, _ in read(directory, since)]


def test_reading_begins_exactly_behind_any_number(segmented: Path) -> None:
    for since in range(42):
        assert numbers(segmented, since) == list(range(since + 1, 41))


def test_records_that_are_gone_are_not_waited_for(segmented: Path) -> None:
    second = list_segments(segmented)[1]
    segment_path(segmented, 1).unlink()
    assert numbers(segmented) == list(range(second, 41))
    assert extent(segmented).first_seq == second


def test_who_has_read_nothing_yet_stands_where_it_began(segmented: Path) -> None:
    for since in range(41):
        with Follower(segmented, since) as follower:
            assert follower.seq == since
            records = follower.poll()
            assert follower.seq == (records[-1][0] if records else since)


def test_the_extent_is_that_of_the_journal(segmented: Path) -> None:
    epoch = segment_path(segmented, 1).read_bytes()[12:20].hex()
    assert extent(segmented) == Extent(epoch, 1, 40)


def test_no_journal_is_one_clear_error(tmp_path: Path) -> None:
    for place, message in ((tmp_path, "there is no journal"), (tmp_path / "missing", "No such file")):
        for call in (extent, numbers):
            with pytest.raises(JournalError, match=f"{message}.*watchd run"):
                call(place)


def test_a_follower_of_a_journal_that_was_removed_does_not_wait_for_ever(segmented: Path) -> None:
    with Follower(segmented, 40) as follower:
        assert follower.poll() == []
        for path in segmented.glob("*.wal"):
            path.unlink()
        for _ in range(2):
            with pytest.raises(
                JournalError, match=r"was removed or begun anew while it was read; look at everything once"
            ):
                follower.poll()
            write(segmented, [changes(2)])


def test_a_follower_of_a_segment_that_was_replaced_does_not_wait_for_ever(directory: Path) -> None:
    write(directory, [changes(2)])
    path = only_segment(directory)
    with Follower(directory, 2) as follower:
        assert follower.poll() == []
        copy = path.with_suffix(".copy")
        copy.write_bytes(path.read_bytes())
        copy.rename(path)
        with pytest.raises(JournalError, match="was removed or begun anew"):
            follower.poll()


def test_a_follower_reads_on_when_what_it_has_read_is_removed(segmented: Path) -> None:
    firsts = list_segments(segmented)
    with Follower(segmented) as follower:
        seen = [seq for seq, _ in follower.poll()]
        for first in firsts[:-1]:
            if first <= seen[-1]:
                segment_path(segmented, first).unlink()
        while records := follower.poll():
            seen += [seq for seq, _ in records]
        assert seen == list(range(1, 41))


def test_a_follower_that_was_overtaken_is_told_what_it_will_never_see(segmented: Path) -> None:
    first, second, third, *_ = list_segments(segmented)
    message = rf"records {second} to {third - 1} are gone"
    with Follower(segmented) as follower:
        assert [seq for seq, _ in follower.poll()][-1] == second - 1
        for gone in (first, second):
            segment_path(segmented, gone).unlink()
        for _ in range(2):
            with pytest.raises(RecordsGoneError, match=message):
                follower.poll()
    position = follower.position
    for start in (second - 1, position):
        with pytest.raises(RecordsGoneError, match=message):
            Follower(segmented, start)
    assert numbers(segmented) == numbers(segmented, third - 1) == list(range(third, 41))


class Watchful(RealDisk):
    """Notes how much of each file was put on disk."""

    def __init__(self) -> None:
        self.synced: dict[Path, int] = {}

    def open(self, path: Path, flags: int) -> File:
        disk = self

        class WatchfulFile(RealFile):
            def sync(self) -> None:
                size = self.size()
                super().sync()
                disk.synced[path] = size

        return WatchfulFile(path, flags)


def test_nobody_sees_what_a_power_cut_could_take_back(segmented: Path) -> None:
    disk, last = Watchful(), segment_path(segmented, list_segments(segmented)[-1])
    with Follower(segmented, disk=disk) as follower:
        while follower.poll():
            position = follower.position
            assert segment_path(segmented, position.segment) != last or disk.synced[last] >= position.offset
        assert disk.synced[last] == last.stat().st_size


def test_a_follower_misses_nothing_while_segments_come_and_go(directory: Path) -> None:
    async def main() -> None:
        journal = await Journal.open(directory, SMALL_SEGMENTS)
        seen: list[int] = []
        with Follower(directory) as follower:
            assert follower.poll() == []
            for number in range(1, 60):
                journal.append([change(number)])
                if number % 7 == 0:
                    journal.note({"base": LayerMark(b"/srv")})
                await journal.flush()
                if number % 3:
                    while records := follower.poll():
                        seen += [seq for seq, _ in records]
            while records := follower.poll():
                seen += [seq for seq, _ in records]
            assert seen == list(range(1, 60))
            assert follower.epoch == journal.epoch
        assert len(list_segments(directory)) > 3
        await journal.close()

    asyncio.run(main())


def test_a_position_is_where_another_follower_goes_on(segmented: Path) -> None:
    seen: list[int] = []
    position = None
    while True:
        with Follower(segmented, 0 if position is None else position) as follower:
            records = follower.poll()
            position = follower.position
        if not records:
            break
        seen += [seq for seq, _ in records]
    assert seen == list(range(1, 41))


def test_large_records_and_small_chunks_come_out_whole(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [10, 5000, 3, 70_000, 0, 200]
    write(directory, [[change(number, bytes(size)) for number, size in enumerate(sizes)]])
    for chunk in (1, 50, 1000):
        monkeypatch.setattr(segments, "CHUNK_BYTES", chunk)
        assert [len(record.path) for _, record in read(directory) if hasattr(record, "path")] == sizes


def test_every_cut_of_a_growing_file_is_an_end_and_no_error(directory: Path) -> None:
    write(directory, [[change(1)]])
    size = only_segment(directory).stat().st_size
    write(directory, [changes(2, 2)])
    data = only_segment(directory).read_bytes()
    for end in range(size, len(data)):
        only_segment(directory).write_bytes(data[:end])
        assert numbers(directory) in ([1], [1, 2])
    only_segment(directory).write_bytes(data)
    assert numbers(directory) == [1, 2, 3]


def test_a_follower_sees_a_record_once_it_is_whole(directory: Path) -> None:
    write(directory, [[change(1)], [change(2)]])
    path = only_segment(directory)
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    with Follower(directory) as follower:
        assert [seq for seq, _ in follower.poll()] == [1]
        assert follower.poll() == []
        with path.open("ab") as file:
            file.write(data[-3:])
        assert [seq for seq, _ in follower.poll()] == [2]


def test_damage_between_good_records_is_never_skipped(directory: Path) -> None:
    write(directory, [[change(1)]])
    good = only_segment(directory).stat().st_size
    write(directory, [[change(2)], [change(3)]])
    flip(only_segment(directory), good + 25)
    with Follower(directory) as follower:
        assert [seq for seq, _ in follower.poll()] == [1]
        with pytest.raises(JournalError, match=f"damaged at byte {good}, behind record 1.*watchd journal verify"):
            follower.poll()


def test_damage_at_the_end_of_an_earlier_segment_is_no_end(segmented: Path) -> None:
    path = segment_path(segmented, 1)
    flip(path, path.stat().st_size - 1)
    with pytest.raises(JournalError, match="checksum does not match"):
        numbers(segmented)


def test_an_earlier_segment_that_was_cut_is_no_end(segmented: Path) -> None:
    path = segment_path(segmented, 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(JournalError, match="the segment ends in the middle of a record"):
        numbers(segmented)


def test_a_missing_segment_is_a_gap_and_no_end(segmented: Path) -> None:
    first, second, third, *_ = list_segments(segmented)
    segment_path(segmented, second).unlink()
    with pytest.raises(JournalError, match=f"behind record {second - 1}: the next segment begins with record {third}"):
        numbers(segmented)
    assert numbers(segmented, third - 1) == list(range(third, 41))
    assert first == 1


def test_a_reader_of_a_torn_journal_sees_what_the_next_writer_keeps(directory: Path) -> None:
    write(directory, [changes(3)])
    with only_segment(directory).open("ab") as file:
        file.write(bytes(100))
    assert numbers(directory) == [1, 2, 3]
    with Follower(directory, 3) as follower:
        assert follower.poll() == []
        write(directory, [[change(4)]])
        assert [seq for seq, _ in follower.poll()] == [4]


def test_a_record_of_a_later_version_is_not_passed_over_by_asking_again(directory: Path) -> None:
    write(directory, [changes(2)])
    path = only_segment(directory)
    seed = int.from_bytes(path.read_bytes()[36:40], "little")
    with path.open("ab") as file:
        body = struct.pack("<IQHBB", 2, 3, 0xD5F5, 99, 0) + msgspec.msgpack.encode([99])
        file.write(zlib.crc32(body, seed).to_bytes(4, "little") + body)
    with Follower(directory, 2) as follower:
        for _ in range(2):
            with pytest.raises(JournalError, match=r"cannot decode record 3.*read it with the watchd that wrote it"):
                follower.poll()


def test_who_knows_what_is_durable_is_told_nothing_behind_it(directory: Path) -> None:
    """Wherever the line is drawn, in a chunk or at the end of a segment: nothing is passed over or told twice."""
    write(directory, [changes(5), changes(5, 6), changes(5, 11)], SMALL_SEGMENTS)
    for step in range(1, 16):
        with Follower(directory) as follower:
            told: list[int] = []
            for upto in [*range(0, 15, step), 15]:
                while records := follower.poll(upto=upto):
                    told += [seq for seq, _ in records]
                assert told == list(range(1, upto + 1))
