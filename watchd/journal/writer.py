"""`Journal`: the one writer of a journal directory.

Records are appended in memory, at once. A committer task gathers what comes in, for at most `max_delay_ns`, and
puts it on disk with one write and one fdatasync, so that the cost of a disk flush is shared by all records that
wait for it (group commit).

A failed write or fsync is never tried again: a second fsync may report success for data that is gone (see `disk`).
The journal has failed then, until `reopen` has recovered it as `open` does after a crash.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeVar

import aiofiles.os
import msgspec

from watchd.errors import JournalError
from watchd.journal.appender import Appender
from watchd.journal.disk import REAL, Disk
from watchd.journal.format import Checkpoint, Entry, LayerMark
from watchd.journal.reader import Position
from watchd.journal.recovery import Acknowledged, Opened, Recovered, lock, recover
from watchd.journal.retention import Stored, remove
from watchd.journal.segments import disk_error, disk_errors
from watchd.records import Record, Stop

T = TypeVar("T")

log = logging.getLogger(__name__)

CHECK_INTERVAL_S: Final = 5.0
"""A journal that nothing is written to is looked after this often: somebody may have removed it."""

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


class Commit(NamedTuple):
    """Entries that became durable together."""

    epoch: str
    entries: Sequence[Entry]
    begin: Position
    """Where the journal ended before. A segment that the commit began lies between."""
    end: Position
    append_s: float
    """Time that encoding and writing took."""
    sync_s: float
    """Time that fdatasync took."""


CommitObserver = Callable[[Commit], None]
"""Called after each commit, in the order of commits."""


class Journal:
    """A journal directory, locked and open for appending. Use it in the event loop's thread only.

    When writing fails the directory is given up, and until `reopen` succeeds records go nowhere and get no numbers.
    """

    epoch: str
    """16 hexadecimal digits; with a sequence number it makes a cursor. Another one after `reopen` only if the journal
    was removed."""
    first_seq: int
    """Sequence number of the oldest record, or of the first one to come."""
    last_seq: int
    """The last sequence number that was assigned."""
    durable_seq: int
    """Everything up to here is on disk; with sync off: was handed to the kernel."""
    bytes: int
    """Size of all segments."""
    recovered: Recovered
    """What was found when it was opened last."""
    failed: asyncio.Future[JournalError]
    """Done, with the error as its result, when writing has failed; a new one after `reopen`."""

    def __init__(
        self, directory: Path, settings: JournalSettings, *, on_commit: CommitObserver | None, disk: Disk
    ) -> None:
        """`open` calls it."""
        self.directory = directory
        self._settings, self._on_commit, self._disk = settings, on_commit, disk
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._queue: list[Entry] = []
        self._queued = self._committed = 0
        self._appended = self._commits = self._append_ns = self._sync_ns = 0
        self._closing = False
        self._wake, self._hurry, self._progress = asyncio.Event(), asyncio.Event(), asyncio.Event()

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
        journal = cls(directory, settings, on_commit=on_commit, disk=disk)
        try:
            await journal._begin(None)
        except BaseException:
            journal._executor.shutdown()
            raise
        return journal

    async def reopen(self) -> None:
        """After a failure: recovers the journal and goes on, if the disk takes it again. What was not durable is lost.

        Whole records that were written and not acknowledged stay: a reader may have seen them. If the directory was
        removed a new journal begins, with another epoch. Raises JournalError like `open`, and then it may be called
        again.
        """
        assert self.failed.done()
        await asyncio.wait([self._committer])
        is_synced = self._settings.sync == "batch"
        try:
            await self._begin(Acknowledged(bytes.fromhex(self.epoch), self.durable_seq if is_synced else 0))
        except Exception as error:
            self.failed = asyncio.get_running_loop().create_future()
            self.failed.set_result(self._told(error))
            raise self.failed.result() from error

    async def _begin(self, acknowledged: Acknowledged | None) -> None:
        """Locks and recovers the directory and starts the committer. Raises JournalError."""
        async with AsyncExitStack() as stack:
            stack.enter_context(await self.in_thread(partial(lock, self.directory, disk=self._disk)))
            opened = await self.in_thread(partial(recover, self.directory, disk=self._disk, acknowledged=acknowledged))
            size = self._settings.segment_size_bytes
            with disk_errors(f"cannot write to the journal {self.directory}"):
                self._appender = await self.in_thread(
                    partial(Appender, self.directory, opened, disk=self._disk, segment_size_bytes=size)
                )
            stack.push_async_callback(self.in_thread, self._appender.close)
            self._resources = stack.pop_all()
        self._opened(opened)
        self._committer = asyncio.create_task(self._run(), name="journal committer")

    def _opened(self, opened: Opened) -> None:
        self.epoch = opened.header.epoch.hex()
        self.first_seq, self.last_seq, self.durable_seq = opened.first_seq, opened.last_seq, opened.last_seq
        self.bytes = opened.bytes
        self.recovered = opened.recovered()
        self.failed = asyncio.get_running_loop().create_future()
        self._last_time_ns, self._stopped = self.recovered.last_time_ns, self.recovered.stopped
        self._committed = self._queued

    @property
    def failure(self) -> JournalError | None:
        """Why nothing is written, if so. For any thread."""
        failed = self.failed
        return failed.result() if failed.done() else None

    @property
    def pending(self) -> int:
        """Records that are not durable yet. Bounding them is the caller's part."""
        return self.last_seq - self.durable_seq

    def append(self, records: Sequence[Record]) -> int:
        """Queues records for the next commit and returns the sequence number of the last one. Never blocks.

        After a failure the records go nowhere and get no numbers; `failed` and `flush` tell.
        """
        if records and not self.failed.done():
            self.last_seq += len(records)
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

        Raises JournalError when the journal has failed, though it may have been reopened since.
        """
        failed, queued = self.failed, self._queued
        while not failed.done() and (self._committed < queued if upto is None else self.durable_seq < upto):
            assert upto is None or upto <= self.last_seq
            self._hurry.set()
            await self._progress.wait()
        if failed.done() and (upto is None or self.durable_seq < upto):
            raise failed.result()

    async def in_thread(self, call: Callable[[], T]) -> T:
        """Does something with the journal's files in the journal's own thread, between two commits.

        So a slow disk delays nothing but the journal, and other users of the default executor cannot delay the journal.
        """
        result: T = await aiofiles.os.wrap(call)(executor=self._executor)
        return result

    async def remove(self, segments: Sequence[Stored]) -> None:
        """Removes these, which are the oldest and not the last one. Raises JournalError: then none or some are gone."""
        if self.failed.done():
            raise self.failed.result()
        assert segments[0].first_seq == self.first_seq
        opened = self.recovered
        with disk_errors(f"cannot remove old segments of the journal {self.directory}"):
            await self.in_thread(partial(remove, self.directory, segments, disk=self._disk))
        if self.recovered is not opened:
            return  # it failed and was opened again meanwhile, and counted anew
        self.first_seq = segments[-1].last_seq + 1
        self.bytes -= sum(segment.bytes for segment in segments)

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
                await self._resources.aclose()
        finally:
            self._executor.shutdown()
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
            await self.in_thread(self._appender.sync)
        except Exception as error:
            self._fail(self._told(error))
            with suppress(OSError):  # given up, so that somebody may repair it meanwhile
                await self._resources.aclose()

    async def _gather(self) -> bool:
        """Waits until it is time for a commit; False when the journal closes and there is nothing to write."""
        while not self._queue:
            if self._closing:
                return False
            self._wake.clear()
            try:
                async with asyncio.timeout(CHECK_INTERVAL_S):
                    await self._wake.wait()
            except TimeoutError:
                await self.in_thread(self._appender.check)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.max_delay_ns / 1e9):
                await self._hurry.wait()
        self._hurry.clear()
        return True

    async def _commit(self) -> None:
        entries = self._queue[:COMMIT_ENTRIES]
        del self._queue[:COMMIT_ENTRIES]
        done = await self.in_thread(partial(self._appender.commit, entries, sync=self._settings.sync == "batch"))
        self.durable_seq = done.end.seq
        self.bytes += done.bytes
        self._committed += len(entries)
        self._commits += 1
        self._append_ns += done.append_ns
        self._sync_ns += done.sync_ns
        self._tell()
        if self._on_commit:
            times = done.append_ns / 1e9, done.sync_ns / 1e9
            self._on_commit(Commit(self.epoch, entries, done.begin, done.end, *times))

    def _told(self, error: Exception) -> JournalError:
        """What to say of `error`; what is no fault of the disk is a bug, and logged as one."""
        what = f"cannot write to the journal {self.directory}"
        if isinstance(error, JournalError):
            return error
        if isinstance(error, OSError):
            return disk_error(what, error)
        log.error("a bug in the journal's writer", exc_info=error)
        return JournalError(f"{what}: {error!r}", remedy="report this, with the traceback in the log")

    def _fail(self, error: JournalError) -> None:
        self._queue.clear()
        self.last_seq = self.durable_seq
        self.failed.set_result(error)
        self._tell()

    def _tell(self) -> None:
        """Wakes all who wait in `flush`."""
        self._progress.set()
        self._progress.clear()
