"""`append`: records a second that become durable, by how many write at once; and how long one of them waits.

Everybody appends changes of the same size to a file on the disk of the scratch directory, which a note names. With N
writers each waits until its record is durable before it appends the next one: so the records of a commit are at most N.
A batch is one writer that appends so many and waits for all of them.

SQLite has one writer, so N writers are transactions of N rows; so are they for the bare segments: what there is if records
are only encoded, checked, written and synced.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import msgspec

from tests.bench.measure import filesystem_of, percentile
from tests.bench.report import WATCHD, Row, Target
from tests.bench.session import Session
from watchd.journal.writer import Journal, JournalSettings
from watchd.records import Change

SQLITE = "SQLite WAL"
BARE = "bare segments"
BATCH = 1000
WRITERS = (1, 10, 100, 1000)
PATH = b"usr/share/doc/package/examples/file-%06d"

Group = Callable[[], None]
"""Makes the next group of records durable."""


class Result(NamedTuple):
    """What one subject did."""

    per_second: float
    p99_ms: float


def measure(session: Session) -> list[Row]:
    """Two rows for each way of writing: with an fsync for each commit, and without."""
    with session.workspace.scratch() as scratch:
        session.notes.append(f"append: on {filesystem_of(scratch)}")
    rows = []
    for sync in ("batch", "off"):
        how = "fsync" if sync == "batch" else "no fsync"
        for writers in WRITERS:
            rows += _rows(session, f"{how}, {writers} writers", sync, writers=writers, batch=1)
        rows += _rows(session, f"{how}, batches of {BATCH}", sync, writers=1, batch=BATCH)
    return rows


def _rows(session: Session, name: str, sync: str, *, writers: int, batch: int) -> list[Row]:
    seconds, size = session.scale.append_s, writers * batch
    subjects: dict[str, Callable[[Path], Result]] = {
        WATCHD: lambda path: asyncio.run(_watchd(path, sync, writers=writers, batch=batch, seconds=seconds)),
        SQLITE: lambda path: _sqlite(path, sync, size, seconds),
        BARE: lambda path: _bare(path, sync, size, seconds),
    }
    results: dict[str, Result | None] = {}
    for subject, run in subjects.items():
        if subject != WATCHD or session.with_watchd:
            with session.workspace.scratch() as path:
                results[subject] = session.attempt(
                    f"append with {name} by {subject}", lambda run=run, path=path: run(path)
                )
    rates = {subject: one and one.per_second for subject, one in results.items()}
    waits = {subject: one and one.p99_ms for subject, one in results.items()}
    target = Target(250_000, is_least=True) if sync == "batch" and batch == BATCH else None
    return [
        Row("append", name, "records/s", rates, SQLITE, target),
        Row("append", f"{name}, p99 of the wait", "ms", waits, SQLITE),
    ]


def _record(number: int) -> Change:
    return Change(time.time_ns(), "usr", PATH % number, 1, True, False, None, number, 4711, b"dpkg")


async def _watchd(path: Path, sync: str, *, writers: int, batch: int, seconds: float) -> Result:
    settings = msgspec.structs.replace(JournalSettings(), sync=sync)
    journal = await Journal.open(path / "journal", settings)
    waits: list[float] = []
    begun = time.perf_counter()

    async def write() -> None:
        while (now := time.perf_counter()) < begun + seconds:
            await journal.flush(journal.append([_record(number) for number in range(batch)]))
            waits.append(time.perf_counter() - now)

    await asyncio.gather(*(write() for _ in range(writers)))
    passed = time.perf_counter() - begun
    await journal.close()
    return Result(len(waits) * batch / passed, percentile(waits, 99) * 1000)


def _timed(group: Group, size: int, seconds: float) -> Result:
    waits: list[float] = []
    begun = now = time.perf_counter()
    while now < begun + seconds:
        before = now
        group()
        now = time.perf_counter()
        waits.append(now - before)
    return Result(len(waits) * size / (now - begun), percentile(waits, 99) * 1000)


def _sqlite(path: Path, sync: str, size: int, seconds: float) -> Result:
    encode = msgspec.msgpack.Encoder().encode
    with closing(sqlite3.connect(path / "journal.db", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {'FULL' if sync == 'batch' else 'OFF'}")
        db.execute("CREATE TABLE journal (seq INTEGER PRIMARY KEY, record BLOB NOT NULL)")

        def group() -> None:
            db.execute("BEGIN")
            rows = ((encode(_record(number)),) for number in range(size))
            db.executemany("INSERT INTO journal (record) VALUES (?)", rows)
            db.execute("COMMIT")

        return _timed(group, size, seconds)


def _bare(path: Path, sync: str, size: int, seconds: float) -> Result:
    encode, pack = msgspec.msgpack.Encoder().encode, struct.Struct("<II").pack
    fd = os.open(path / "segment", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)

    def group() -> None:
        payloads = [encode(_record(number)) for number in range(size)]
        os.write(fd, b"".join([pack(zlib.crc32(one), len(one)) + one for one in payloads]))
        if sync == "batch":
            os.fdatasync(fd)

    try:
        return _timed(group, size, seconds)
    finally:
        os.close(fd)
