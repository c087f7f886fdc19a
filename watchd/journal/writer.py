"""`Journal`: the one writer of a journal directory.

Records are appended in memory, at once. A committer task gathers what comes in, for at most `max_delay_ns`, and
puts it on disk with one write and one fdatasync, so that the cost of a disk flush is shared by all records that
wait for it (group commit).

Fact about fsync: after it failed, the kernel may mark the pages clean, and a second call then reports success
although the data is gone (fsync(2), "Error reporting"; "fsyncgate"). So a failed write or fsync is never tried
again: the journal has failed for good, and the next `open` finds out what reached the disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Final, Literal

import msgspec

from watchd.errors import JournalError
from watchd.journal.appender import Appender
from watchd.journal.disk import REAL, Disk
from watchd.journal.format import Checkpoint, Entry, LayerMark
from watchd.journal.recovery import Opened, Recovered, lock, recover
from watchd.journal.segments import disk_error, disk_errors
from watchd.records import Record, Stop

COMMIT_ENTRIES: Final = 4096
"""Most entries of one commit: bounds the memory that encoding takes and how long a commit holds up the next one."""


class JournalSettings(msgspec.Struct, frozen=True):
    """How the journal is written."""

    sync: Literal["batch", "off"] = "batch"
    """batch: every commit ends with fdatasync. off: the kernel writes back when it likes; a power cut, though not a
    crash of watchd, may then lose the last records."""
    max_delay_ns: int = 10_000_000
    """Longest time that a record waits for others to share its commit."""
    segment_size_bytes: int = 64 << 20
    """A new segment begins when the last one has reached this size."""


class JournalStatistics(msgspec.Struct, frozen=True):
    """Counters since `open`."""

    appended: int
    """Records given to `append`."""
    pending: int
    """Records of them that are not durable yet."""
    commits: int
    append_ns: int
    """Time spent encoding and writing, all commits together."""
    sync_ns: int
    """Time spent in fdatasync, all commits together."""
    bytes: int
    """Size of all segments."""


CommitObserver = Callable[[int, float, float], None]
"""Called after each commit with its number of records and the seconds that appending and syncing took."""


class Journal:
    """A journal directory, locked and open for appending. Use it in the event loop's thread only."""

    def __init__(
        self,
        directory: Path,
        opened: Opened,
        *,
        appender: Appender,
        resources: ExitStack,
        settings: JournalSettings,
        on_commit: CommitObserver | None,
    ) -> None:
        """`open` calls it. `resources` are the lock and the thread."""
        self.directory = directory
        self.epoch = opened.header.epoch.hex()
        """16 hexadecimal digits; with a sequence number it makes a cursor."""
        self.first_seq = opened.first_seq
        """Sequence number of the oldest record, or of the first one to come."""
        self.last_seq = opened.last_seq
        """The last sequence number that was assigned."""
        self.durable_seq = opened.last_seq
        """Everything up to here is on disk; with sync off: was handed to the kernel."""
        self.bytes = opened.bytes
        """Size of all segments."""
        self.recovered: Recovered = opened.recovered()
        self.failed: asyncio.Future[JournalError] = asyncio.get_running_loop().create_future()
        """Done, with the error as its result, when a commit has failed. Nothing is written any more from then on."""
        self._appender = appender
        self._resources = resources
        self._settings = settings
        self._on_commit = on_commit
        self._last_time_ns, self._stopped = self.recovered.last_time_ns, self.recovered.stopped
        self._queue: list[Entry] = []
        self._queued = self._committed = 0
        self._appended = self._commits = self._append_ns = self._sync_ns = 0
        self._closing = False
        self._wake, self._hurry, self._progress = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._committer = asyncio.create_task(self._run(), name="journal committer")

    @classmethod
    async def open(
        cls,
        directory: Path,
        settings: JournalSettings,
        *,
        on_commit: CommitObserver | None = None,
        disk: Disk = REAL,
    ) -> Journal:
        """Creates the directory or recovers what the last run left in it, and becomes its only writer.

        Raises JournalError when another process writes to it, when it is damaged, or when the disk refuses.
        """
        loop = asyncio.get_running_loop()
        size = settings.segment_size_bytes
        with ExitStack() as stack:
            stack.enter_context(await loop.run_in_executor(None, partial(lock, directory, disk=disk)))
            executor = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="journal"))
            opened = await loop.run_in_executor(executor, partial(recover, directory, disk=disk))
            appender = Appender(directory, opened, disk=disk, executor=executor, segment_size_bytes=size)
            with disk_errors(f"cannot write to the journal {directory}"):
                await appender.open()
            resources = stack.pop_all()
        return cls(directory, opened, appender=appender, resources=resources, settings=settings, on_commit=on_commit)

    @property
    def pending(self) -> int:
        """Records that are not durable yet. Bounding them is the caller's part."""
        return self.last_seq - self.durable_seq

    def append(self, records: Sequence[Record]) -> int:
        """Queues records for the next commit and returns the sequence number of the last one. Never blocks.

        After a failure the records go nowhere; `failed` and `flush` tell.
        """
        self.last_seq += len(records)
        if records:
            last = records[-1]
            self._last_time_ns, self._stopped = last.time_ns, isinstance(last, Stop)
            self._appended += len(records)
            self._enqueue(records)
        return self.last_seq

    def note(self, layers: Mapping[str, LayerMark]) -> None:
        """Queues a checkpoint behind the records appended so far. `layers` replaces all marks noted before."""
        self._enqueue([Checkpoint(dict(layers), self._last_time_ns, self._stopped)])

    async def flush(self, upto: int | None = None) -> None:
        """Returns when all that was queued before the call is durable, or the records up to number `upto`.

        Raises JournalError when the journal has failed.
        """
        assert upto is None or upto <= self.last_seq
        queued = self._queued
        while self._committed < queued if upto is None else self.durable_seq < upto:
            if self.failed.done():
                raise self.failed.result()
            self._hurry.set()
            await self._progress.wait()

    async def close(self) -> None:
        """Commits what is queued and gives up the directory. Raises JournalError when something was not written."""
        if self._closing:
            return
        self._closing = True
        self._wake.set()
        self._hurry.set()
        try:
            await asyncio.wait([self._committer])
            with disk_errors(f"cannot close the journal {self.directory}"):
                await self._appender.close()
        finally:
            self._resources.close()
        if self.failed.done():
            raise self.failed.result()

    def statistics(self) -> JournalStatistics:
        """Counters since `open`."""
        return JournalStatistics(
            self._appended, self.pending, self._commits, self._append_ns, self._sync_ns, self.bytes
        )

    def _enqueue(self, entries: Sequence[Entry]) -> None:
        assert not self._closing
        if self.failed.done():
            return
        self._queue.extend(entries)
        self._queued += len(entries)
        self._wake.set()
        if len(self._queue) >= COMMIT_ENTRIES:
            self._hurry.set()

    async def _run(self) -> None:
        """The committer task. Any exception is a failure: a bug in here must not leave `flush` waiting for ever."""
        try:
            while await self._gather():
                await self._commit()
            await self._appender.sync()
        except JournalError as error:
            self._fail(error)
        except OSError as error:
            self._fail(disk_error(f"cannot write to the journal {self.directory}", error))
        except Exception as error:
            self._fail(JournalError(f"cannot write to the journal {self.directory}: {error!r}"))

    async def _gather(self) -> bool:
        """Waits until it is time for a commit; False when the journal closes and there is nothing to write."""
        while not self._queue:
            if self._closing:
                return False
            self._wake.clear()
            await self._wake.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.max_delay_ns / 1e9):
                await self._hurry.wait()
        self._hurry.clear()
        return True

    async def _commit(self) -> None:
        entries = self._queue[:COMMIT_ENTRIES]
        del self._queue[:COMMIT_ENTRIES]
        begun_ns = time.perf_counter_ns()
        self.bytes += await self._appender.append(entries)
        appended_ns = time.perf_counter_ns()
        if self._settings.sync == "batch":
            await self._appender.sync()
        done_ns = time.perf_counter_ns()
        records = self._appender.last_seq - self.durable_seq
        self.durable_seq = self._appender.last_seq
        self._committed += len(entries)
        self._commits += 1
        self._append_ns += appended_ns - begun_ns
        self._sync_ns += done_ns - appended_ns
        self._tell()
        if self._on_commit:
            self._on_commit(records, (appended_ns - begun_ns) / 1e9, (done_ns - appended_ns) / 1e9)

    def _fail(self, error: JournalError) -> None:
        self._queue.clear()
        self.failed.set_result(error)
        self._tell()

    def _tell(self) -> None:
        """Wakes all who wait in `flush`."""
        self._progress.set()
        self._progress.clear()
