"""`scan`: a layer in which nothing changed compared with what is known of it, beside find(1) that prints the same of it.

And what comes before a scan: the first walk of a layer, and the journal's records folded into what is known.
"""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.bench.arena import Arena
from tests.bench.report import WATCHD, Row, Target
from tests.bench.session import Session
from watchd.journal.known import NAME, Known
from watchd.journal.writer import Journal, JournalSettings
from watchd.records import Change, Kind, pack_status
from watchd.sources.base import WatchedLayer
from watchd.sources.baseline import Keeper, Walked, walk_through
from watchd.sources.compare import differences

FIND = "find -printf"
RATIO_TARGET = Target(3.0, is_ratio=True)
SIZE_TARGET = Target(120.0)
NAMES = 100
"""In each directory."""

EPOCH = "0" * 16
"""What is folded is not compared with the journal's own."""

COMMIT_RECORDS = 4000
FOLDED_PART = 4
"""Of the entries every fourth one is changed to have something to fold."""


class Observation(NamedTuple):
    """What was measured of watchd."""

    walk_s: float
    scan_s: float
    bytes_per_entry: float
    folded_per_s: float


def measure(session: Session) -> list[Row]:
    """A tree on a tmpfs, looked at before so that all of it is cached."""
    entries = session.scale.scanned
    arena = Arena(session.workspace.base, max(1, entries // NAMES))
    try:
        arena.build()
        fill(arena.lower, entries)
        found = session.attempt("scan by find", functools.partial(_find, arena.lower))
        ours: Observation | None = None
        if session.with_watchd:
            ours = session.attempt("scan by watchd", functools.partial(observe, session, arena.lower))
    finally:
        arena.dismantle()
        arena.merged.rmdir()
        arena.layers.rmdir()
    name = f"{entries:,} entries"

    def row(what: str, unit: str, value: Callable[[Observation], float], target: Target | None = None) -> Row:
        return Row("scan", f"{name}, {what}", unit, {WATCHD: ours and value(ours)}, None, target)

    values = {WATCHD: ours and ours.scan_s, FIND: found}
    rows = [Row("scan", f"{name}, nothing changed", "s", values, FIND, RATIO_TARGET)]
    if not session.with_watchd:
        return [Row("scan", rows[0].name, "s", {FIND: found}, None, None)]
    return [
        *rows,
        row("first walk", "s", lambda one: one.walk_s),
        row("on disk, for an entry", "B", lambda one: one.bytes_per_entry, SIZE_TARGET),
        row("records folded", "/s", lambda one: one.folded_per_s),
    ]


def fill(root: Path, entries: int) -> None:
    """Files in all directories that have none below them, as many as make so many entries."""
    directories = [Path(base) for base, below, _ in os.walk(root) if not below]
    for number, path in enumerate(directories):
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        for name in range(number, entries, len(directories)):
            os.mknod(f"libexample-{name}.so.1", dir_fd=directory)
        os.close(directory)


def observe(session: Session, tree: Path) -> Observation:
    """Walk it, scan it, fold what happened in it."""
    with session.workspace.scratch() as scratch, _known(scratch) as known:
        layer = WatchedLayer("bench", os.fsencode(tree), 0, None, lambda: _open(tree), lambda: _open(tree))
        walk_s, entries = _timed(lambda: _walk(known, layer))
        scan_s, told = _timed(lambda: sum(map(len, differences(layer, lambda: known.tree("bench")))))
        assert told == 0, "nothing has changed"
        known.close()
        size = (scratch / NAME).stat().st_size
        records = asyncio.run(_record(scratch / "journal", tree))
        with _known(scratch, records) as again:
            fold_s, folded = _timed(lambda: again.fold(records, epoch=EPOCH))
        assert folded == records
        return Observation(walk_s, scan_s, size / entries, records / fold_s)


@contextmanager
def _known(directory: Path, records: int = 0) -> Iterator[Known]:
    known = Known(directory / NAME, journal=directory / "journal", epoch=EPOCH, last_seq=records)
    try:
        yield known
    finally:
        known.close()


def _open(path: Path) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _timed(call: Callable[[], int]) -> tuple[float, int]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def _walk(known: Known, layer: WatchedLayer) -> int:
    walked, number = Walked(), known.begin(layer.name, layer.path, 0)
    keeper = Keeper(numbers=known.next_numbers, store=functools.partial(known.store, number), is_busy=lambda: False)
    for _ in walk_through(layer, keeper, walked, queued=lambda: 0):
        pass
    known.complete(number, walked.root, walked.state)
    return walked.entries


async def _record(directory: Path, tree: Path) -> int:
    """Changes of every so many entries; returns how many."""
    journal = await Journal.open(directory, JournalSettings(max_delay_ns=0))
    paths = (os.path.join(base, name) for base, _, names in os.walk(tree) for name in names)
    changes: list[Change] = []
    for number, path in enumerate(paths):
        if number % FOLDED_PART == 0:
            status, name = os.lstat(path), os.fsencode(os.path.relpath(path, tree))
            changes.append(
                Change(1, "bench", name, Kind.MODIFY, True, False, inode=status.st_ino, status=pack_status(status))
            )
        if len(changes) >= COMMIT_RECORDS:
            journal.append(changes)
            await journal.flush()
            changes = []
    journal.append(changes)
    await journal.close()
    return journal.last_seq


def _find(tree: Path) -> float:
    command = ["find", str(tree), "-printf", "%p %i %m %s %C@ %T@\n"]
    run = functools.partial(subprocess.run, command, stdout=subprocess.DEVNULL, check=True)
    run()  # warms the cache
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
