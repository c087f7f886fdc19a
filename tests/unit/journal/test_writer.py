"""`Journal`: group commit, segments, failures. Files are judged by tests/unit/journal/judge.py."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.journal import judge
from tests.unit.journal.support import AT_ONCE, SMALL_SEGMENTS, change, changes, only_segment, records, write
from watchd.errors import JournalError
from watchd.journal import writer
from watchd.journal.format import LayerMark
from watchd.journal.reader import Follower, read
from watchd.journal.recovery import lock
from watchd.journal.segments import list_segments, segment_path
from watchd.journal.writer import COMMIT_ENTRIES, Commit, Journal, JournalSettings
from watchd.records import Record, Stop

NEVER_BY_ITSELF = JournalSettings(max_delay_ns=3600 * 10**9)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def run(directory: Path, body: Callable[[Journal], Awaitable[None]], settings: JournalSettings = AT_ONCE) -> None:
    async def main() -> None:
        journal = await Journal.open(directory, settings)
        try:
            await body(journal)
        finally:
            await journal.close()

    asyncio.run(main())


def test_numbers_have_no_holes_across_runs_and_segments(directory: Path) -> None:
    for start in range(1, 100, 11):
        write(directory, [changes(5, start), changes(6, start + 5)], SMALL_SEGMENTS)
    assert [value[1] for _, value in judge.records(directory)] == list(range(1, 100))
    assert len(list_segments(directory)) > 3


def test_flush_means_that_it_is_in_the_file(directory: Path) -> None:
    async def body(journal: Journal) -> None:
        last = journal.append(changes(3))
        assert (last, journal.last_seq, journal.durable_seq, journal.pending) == (3, 3, 0, 3)
        await journal.flush(last)
        assert (journal.durable_seq, journal.pending) == (3, 0)
        assert len(judge.records(directory)) == 3
        assert journal.bytes == only_segment(directory).stat().st_size
        await journal.flush()
        await journal.flush(2)

    run(directory, body)


def test_records_that_come_together_share_a_commit(directory: Path) -> None:
    async def body(journal: Journal) -> None:
        for number in range(1, 101):
            journal.append([change(number)])
        await asyncio.gather(*(journal.flush(number) for number in range(1, 101)))
        assert journal.statistics().commits == 1
        assert journal.statistics().appended == 100

    run(directory, body, NEVER_BY_ITSELF)


def test_flush_does_not_wait_for_company(directory: Path) -> None:
    async def body(journal: Journal) -> None:
        for number in range(1, 4):
            journal.append([change(number)])
            await journal.flush()
        assert journal.statistics().commits == 3

    run(directory, body, NEVER_BY_ITSELF)


def test_a_flood_is_committed_without_flush_and_in_bounded_steps(directory: Path) -> None:
    async def body(journal: Journal) -> None:
        journal.append(changes(COMMIT_ENTRIES + 5))
        await journal.flush(COMMIT_ENTRIES)
        assert journal.durable_seq == COMMIT_ENTRIES
        assert journal.pending == 5

    run(directory, body, NEVER_BY_ITSELF)
    assert sum(1 for _ in read(directory)) == COMMIT_ENTRIES + 5


def test_records_are_committed_though_nobody_flushes(directory: Path) -> None:
    async def main() -> None:
        committed = asyncio.Event()
        journal = await Journal.open(directory, JournalSettings(max_delay_ns=1), on_commit=lambda *_: committed.set())
        journal.append([change(1)])
        await committed.wait()
        assert journal.durable_seq == 1
        await journal.close()

    asyncio.run(main())


def test_close_commits_what_is_queued(directory: Path) -> None:
    async def body(journal: Journal) -> None:
        journal.append([change(1), Stop(2, "v", "b")])

    run(directory, body, NEVER_BY_ITSELF)
    assert len(judge.records(directory)) == 2


def test_closing_twice_is_harmless(directory: Path) -> None:
    async def body(journal: Journal) -> None:
        await journal.close()

    run(directory, body)


def test_the_observer_hears_of_every_entry_once_and_where_it_stands(directory: Path) -> None:
    seen: list[Commit] = []

    async def main() -> None:
        journal = await Journal.open(directory, SMALL_SEGMENTS, on_commit=seen.append)
        for count in (3, 1, 30, 4):
            journal.append(changes(count))
            await journal.flush()
        journal.note({})
        await journal.close()

    asyncio.run(main())
    assert [len(commit.entries) for commit in seen] == [3, 1, 30, 4, 1]
    assert [commit.end.seq for commit in seen] == [3, 4, 34, 38, 38]
    assert [commit.begin for commit in seen[1:]] == [commit.end for commit in seen[:-1]]
    assert len({commit.end.segment for commit in seen}) > 1
    for commit in seen:
        with Follower(directory, commit.end) as follower:
            assert [seq for seq, _ in follower.poll()][:1] == [commit.end.seq + 1][: 38 - commit.end.seq]


def test_what_was_noted_is_there_at_the_next_start(directory: Path) -> None:
    marks = {"base": LayerMark(b"/srv/\xff", 123, 0), "other": LayerMark(b"/o")}

    async def body(journal: Journal) -> None:
        journal.append([change(7)])
        journal.note({"gone": LayerMark(b"/g")})
        journal.note(marks)
        await journal.flush()
        journal.append(changes(30))
        await journal.flush()
        journal.append([change(8)])

    async def again(journal: Journal) -> None:
        recovered = journal.recovered
        assert (recovered.layers, recovered.last_time_ns, recovered.stopped, recovered.torn) == (marks, 8, False, None)

    run(directory, body, SMALL_SEGMENTS)
    assert len(list_segments(directory)) == 2
    run(directory, again)


def test_notes_alone_do_not_fill_the_disk(directory: Path) -> None:
    async def body(journal: Journal) -> None:
        for number in range(100):
            journal.note({"base": LayerMark(b"/srv", number)})
            await journal.flush()
        assert journal.bytes < 700
        journal.append([change(1)])
        await journal.flush()
        journal.append([change(2)])
        await journal.flush()

    run(directory, body, SMALL_SEGMENTS)
    assert list_segments(directory) == [1, 2]
    assert len(judge.records(directory)) == 2


def test_without_sync_nothing_claims_to_have_been_synced(directory: Path) -> None:
    write(directory, [[change(1)], [change(2)]], JournalSettings(sync="off", max_delay_ns=0))
    data = only_segment(directory).read_bytes()
    assert len(judge.records(directory)) == 2
    assert [data[at + 3] for at in range(len(data)) if data[at : at + 2] == b"\xf5\xd5"] == [1, 1, 0]


def test_a_record_that_cannot_be_written_fails_the_journal_and_not_the_appender(directory: Path) -> None:
    async def main() -> None:
        journal = await Journal.open(directory, AT_ONCE)
        journal.append([change(1)])
        await journal.flush()
        journal.append([change(2, bytes(1 << 24))])
        with pytest.raises(JournalError, match="does not fit"):
            await journal.flush()
        assert journal.failed.done()
        assert journal.append([change(3)]) == 1
        journal.note({})
        with pytest.raises(JournalError):
            await journal.flush()
        with pytest.raises(JournalError):
            await journal.close()

    asyncio.run(main())
    write(directory, [[change(2)]])
    assert len(judge.records(directory)) == 2


def test_a_record_that_cannot_be_written_is_gone_when_the_journal_is_opened_again(directory: Path) -> None:
    async def body(journal: Journal) -> None:
        journal.append([change(1), change(2, bytes(1 << 24)), change(3)])
        stuck = asyncio.create_task(journal.flush())
        with pytest.raises(JournalError, match="does not fit"):
            await stuck
        assert journal.failure
        assert (journal.last_seq, journal.pending) == (0, 0)
        late = asyncio.create_task(journal.flush())
        epoch = journal.epoch
        await journal.reopen()
        with pytest.raises(JournalError, match="does not fit"):
            await late
        assert not journal.failure
        assert journal.epoch == epoch
        assert journal.append([change(4)]) == 1
        await journal.flush()

    run(directory, body)
    assert [value[1] for _, value in judge.records(directory)] == [4]


def test_a_bug_in_the_writer_fails_the_journal_and_is_logged_with_its_place(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Oddity:
        time_ns = 0

    async def body(journal: Journal) -> None:
        journal.append([Oddity()])  # type: ignore[list-item]
        with pytest.raises(JournalError, match=r"KeyError.*report this"):
            await journal.flush()
        assert "Traceback" in caplog.text
        await journal.reopen()

    run(directory, body)


@pytest.mark.parametrize("idle", [True, False])
def test_a_journal_that_is_removed_while_it_is_written_is_noticed_and_begun_anew(
    directory: Path, idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else records would be acknowledged that go into a file without a name."""
    monkeypatch.setattr(writer, "CHECK_INTERVAL_S", 0.001 if idle else 3600)

    async def body(journal: Journal) -> None:
        journal.append([change(1)])
        await journal.flush()
        epoch = journal.epoch
        shutil.rmtree(directory)
        if idle:
            await journal.failed
        journal.append([change(2)])
        with pytest.raises(JournalError, match="was removed or replaced"):
            await journal.flush()
        await journal.reopen()
        assert journal.epoch != epoch
        assert journal.append([change(3)]) == 1
        await journal.flush()

    run(directory, body)
    assert [value[1] for _, value in judge.records(directory)] == [3]


def test_a_journal_that_is_moved_away_is_left_alone(directory: Path, tmp_path: Path) -> None:
    async def body(journal: Journal) -> None:
        journal.append([change(1)])
        await journal.flush()
        directory.rename(tmp_path / "elsewhere")
        journal.append([change(2)])
        with pytest.raises(JournalError, match="was removed or replaced"):
            await journal.flush()
        await journal.reopen()

    run(directory, body)
    assert [value[1] for _, value in judge.records(tmp_path / "elsewhere")] == [1]
    assert judge.records(directory) == []


def test_a_segment_that_is_lost_while_it_is_written_is_damage_and_no_number_is_given_twice(directory: Path) -> None:
    async def main() -> None:
        journal = await Journal.open(directory, SMALL_SEGMENTS)
        for number in range(1, 30):
            journal.append([change(number)])
            await journal.flush()
        segment_path(directory, list_segments(directory)[-1]).unlink()
        journal.append([change(30)])
        with pytest.raises(JournalError, match="was removed"):
            await journal.flush()
        for _ in range(2):
            with pytest.raises(JournalError, match=r"is damaged at byte .* record 29 has been there.*verify"):
                await journal.reopen()
        assert "record 29 has been there" in str(journal.failure)
        with pytest.raises(JournalError):
            await journal.close()

    asyncio.run(main())


def test_a_failed_journal_is_free_for_whoever_repairs_it_and_not_taken_from_him(directory: Path) -> None:
    async def main() -> None:
        journal = await Journal.open(directory, AT_ONCE)
        journal.append([change(1, bytes(1 << 24))])
        with pytest.raises(JournalError):
            await journal.flush()
        await asyncio.wait([journal._committer])
        with lock(directory), pytest.raises(JournalError, match="is being written by process"):
            await journal.reopen()
        await journal.reopen()
        await journal.close()

    asyncio.run(main())


def test_a_refused_start_leaves_the_directory_to_others(directory: Path) -> None:
    async def main() -> None:
        first = await Journal.open(directory, AT_ONCE)
        with pytest.raises(JournalError, match="being written by process"):
            await Journal.open(directory, AT_ONCE)
        await first.close()
        only_segment(directory).rename(directory / "00000000000000000009.wal")
        with pytest.raises(JournalError, match="begins with record 1"):
            await Journal.open(directory, AT_ONCE)
        only_segment(directory).rename(directory / "00000000000000000001.wal")
        await (await Journal.open(directory, AT_ONCE)).close()

    asyncio.run(main())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(records, max_size=6), max_size=6))
def test_both_readers_agree_on_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, commits: list[list[Record]]
) -> None:
    directory = tmp_path_factory.mktemp("journal")
    write(directory, commits, SMALL_SEGMENTS)
    expected = [record for commit in commits for record in commit]
    assert [record for _, record in read(directory)] == expected
    judged = [value[1:3] for _, value in judge.records(directory)]
    assert judged == [[record.time_ns, _second(record)] for record in expected]


def _second(record: Record) -> object:
    return getattr(record, record.__struct_fields__[1])
