"""The oldest segments go, and nothing that somebody still has to read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.unit.journal import judge
from tests.unit.journal.mortal_disk import KilledError, MortalDisk
from tests.unit.journal.support import SMALL_SEGMENTS, changes, write
from watchd.journal.reader import extent, read
from watchd.journal.recovery import recover
from watchd.journal.retention import Limits, Stored, expired, remove, stored
from watchd.journal.segments import list_segments, segment_path
from watchd.journal.writer import Journal

SEGMENTS = [Stored(1, 10, 100, 1_000), Stored(11, 20, 100, 2_000), Stored(21, 30, 100, 3_000)]
TOTAL = 350


def going(size: int, age: int, hard: int, *, read_upto: int | None = None, now_ns: int = 3_500) -> int:
    limits = Limits(size, age, hard)
    gone = expired(SEGMENTS, TOTAL, limits, now_ns=now_ns, read_upto=read_upto)
    assert gone == SEGMENTS[: len(gone)]
    return len(gone)


@pytest.mark.parametrize(
    ("size", "age", "count"), [(350, 9_999, 0), (349, 9_999, 1), (250, 9_999, 1), (249, 9_999, 2), (1, 9_999, 3)]
)
def test_what_is_over_the_size_goes_and_no_more(size: int, age: int, count: int) -> None:
    assert going(size, age, size) == count


@pytest.mark.parametrize(("age", "count"), [(2_500, 0), (2_499, 1), (1_500, 1), (1_499, 2), (1, 3)])
def test_what_is_too_old_goes_and_no_more(age: int, count: int) -> None:
    assert going(9_999, age, 9_999) == count


@pytest.mark.parametrize(("read_upto", "count"), [(0, 0), (9, 0), (10, 1), (29, 2), (30, 3)])
def test_what_somebody_has_not_read_stays(read_upto: int, count: int) -> None:
    assert going(1, 1, 9_999, read_upto=read_upto) == count


@pytest.mark.parametrize(("hard", "count"), [(350, 0), (349, 1), (250, 1), (249, 2), (0, 3)])
def test_the_hard_limit_waits_for_nobody(hard: int, count: int) -> None:
    assert going(0, 9_999, hard, read_upto=0) == count


def test_a_clock_that_went_back_removes_nothing() -> None:
    assert going(9_999, 1, 9_999, now_ns=500) == 0


def test_no_more_segments_are_looked_at_than_go() -> None:
    segments = iter(SEGMENTS)
    assert len(expired(segments, TOTAL, Limits(300, 9_999, 300), now_ns=3_500)) == 1
    assert list(segments) == SEGMENTS[2:]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    place = tmp_path / "journal"
    write(place, [changes(5, 1 + 5 * number) for number in range(12)], SMALL_SEGMENTS)
    return place


def test_every_segment_but_the_last_is_measured(directory: Path) -> None:
    found = list(stored(directory))
    firsts = list_segments(directory)
    assert [one.first_seq for one in found] == firsts[:-1]
    assert [one.last_seq + 1 for one in found] == firsts[1:]
    assert [one.bytes for one in found] == [segment_path(directory, first).stat().st_size for first in firsts[:-1]]
    times = {seq: record.time_ns for seq, record in read(directory)}
    assert [one.newest_ns for one in found] == [times[one.last_seq] for one in found]


def test_the_writer_goes_on_and_says_what_is_left(directory: Path) -> None:
    async def run() -> None:
        journal = await Journal.open(directory, SMALL_SEGMENTS)
        gone = list(stored(directory))[:2]
        journal.append(changes(30))  # it is written meanwhile
        await journal.remove(gone)
        await journal.flush()
        left = sum(segment_path(directory, first).stat().st_size for first in list_segments(directory))
        assert (journal.first_seq, journal.bytes) == (gone[-1].last_seq + 1, left)
        assert (extent(directory).first_seq, extent(directory).last_seq) == (journal.first_seq, 90)
        await journal.close()
        opened = recover(directory)
        assert (opened.first_seq, opened.last_seq, opened.bytes) == (journal.first_seq, 90, left)

    asyncio.run(run())


def test_being_killed_while_removing_leaves_no_hole(directory: Path) -> None:
    gone = list(stored(directory))
    for steps in range(2 * len(gone)):
        with pytest.raises(KilledError):
            remove(directory, list(stored(directory)), disk=MortalDisk(min(steps, 1)))
        first = list_segments(directory)[0]
        assert [seq for seq, _ in read(directory)] == list(range(first, 61))
        judge.segment(f"{first:020}.wal", segment_path(directory, first).read_bytes())
        if len(list_segments(directory)) == 1:
            break
