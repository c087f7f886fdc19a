"""`recover`: the start on a journal that has grown to its size, after a crash: its last segment is full.

The journal is written here as a writer would have left it. `Journal.open` is measured with the files in the page cache and
without them; `watchd run` until it is ready, with them.
"""

from __future__ import annotations

import asyncio
import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from tests.bench.daemon import WatchdFanotify
from tests.bench.measure import filesystem_of
from tests.bench.report import WATCHD, Row, Target
from tests.bench.session import Session
from watchd.journal.writer import Journal, JournalSettings
from watchd.records import Change

TARGET = Target(1.0)
COMMIT = 4000
PATH = b"usr/share/doc/package/examples/file-%06d"


def measure(session: Session) -> list[Row]:
    """Nothing stands beside it: the journal is watchd's own."""
    if not session.with_watchd:
        return []
    with session.workspace.scratch() as scratch:
        state = scratch / "state"
        records = asyncio.run(_write(state / "journal", session))
        session.notes.append(f"recover: {records:,} records on {filesystem_of(state)}")
        name = f"{session.scale.journal_bytes / 1e6:,.0f} MB, "

        def row(what: str, run: Callable[[], float], target: Target | None = None) -> Row:
            median = functools.partial(_median, run, session.scale.starts)
            return Row("recover", name + what, "s", {WATCHD: session.attempt(what, median)}, None, target)

        return [
            row("Journal.open, cached", lambda: asyncio.run(_open(state / "journal"))),
            row("Journal.open, not cached", lambda: _without_cache(state / "journal")),
            row("watchd run until ready", lambda: _run(session, state), TARGET),
        ]


def _median(run: Callable[[], float], times: int) -> float:
    return statistics.median(run() for _ in range(times))


async def _write(directory: Path, session: Session) -> int:
    """The journal, with so many full segments that the last one is full too; returns how many records it holds."""
    settings = JournalSettings(max_delay_ns=0, segment_size_bytes=session.scale.journal_segment_bytes)
    journal = await Journal.open(directory, settings)
    number = 0
    while journal.bytes < session.scale.journal_bytes:
        journal.append([_record(number + at) for at in range(COMMIT)])
        number += COMMIT
        await journal.flush()
    await journal.close()
    return number


def _record(number: int) -> Change:
    return Change(time.time_ns(), "usr", PATH % (number % 1_000_000), 1, True, False, None, number, 4711, b"dpkg")


async def _open(directory: Path) -> float:
    begun = time.perf_counter()
    journal = await Journal.open(directory, JournalSettings())
    passed = time.perf_counter() - begun
    await journal.close()
    return passed


def _without_cache(directory: Path) -> float:
    """Facts: posix_fadvise(2), POSIX_FADV_DONTNEED drops clean pages only, so they are put on disk before."""
    for path in directory.glob("*.wal"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return asyncio.run(_open(directory))


class _OnJournal(WatchdFanotify):
    """watchd with a state directory that is there already."""

    state: Path

    def _configuration(self) -> dict[str, object]:
        return super()._configuration() | {"state_directory": str(self.state)}


def _run(session: Session, state: Path) -> float:
    subject = _OnJournal(session.workspace, session.small_arena)
    subject.state = state
    with subject:
        return subject.ready_s
