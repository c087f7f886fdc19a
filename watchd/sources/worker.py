"""The thread that owns one source: it waits for the kernel, collects, and runs what others ask of the source.

Reading and looking may block on the watched filesystem; that stops this thread and the layers of this source only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

from watchd.errors import WatchdError
from watchd.records import Change
from watchd.sources.base import Batch, Source

LINGER_MS = 20
"""So long after the last event the source keeps what it opened; then it lets go."""

FLUSH_MS = 1
FLUSH_MAX_NS = 5_000_000
"""Batches are repaired at once and recorded a little later, so that the recording does not compete for the interpreter with
the repair: when nothing came for FLUSH_MS, or FLUSH_MAX_NS after the first of them."""

GATHER_RECORDS = 2000
GATHER_MS = 5
"""After a batch of so many names the next read waits a little, so that the kernel merges more into each record."""

BACKGROUND_PAUSE_MS = 2
"""Between two slices of a scan in the background the interpreter and the disk are others'."""

BACKGROUND_WAIT_S = 0.1
"""And it goes on only while there is nothing to collect, or after so long, even if events never stop."""

STOP_TIMEOUT_S = 2.0

T = TypeVar("T")
_INT = struct.Struct("=i")


class Sink(Protocol):
    """Where the results go; called in the worker's thread and must not block."""

    def batch(self, worker: Worker, batch: Batch) -> None:
        """A collection of the source."""

    def flush(self) -> None:
        """A moment of rest, or time to record what was told."""

    def lost(self, worker: Worker, error: Exception) -> None:
        """The source broke; nothing more will come from it."""


@dataclass
class _Scan:
    background: bool
    slices: Generator[list[Change], None, object]
    found: Callable[[list[Change]], None]
    done: Callable[[Exception | None], None]


class Worker(threading.Thread):
    """Runs one source. `submit`, `scan` and `stop` may be called from any thread."""

    def __init__(self, source: Source, sink: Sink, *, name: str, held: bool = False) -> None:
        """`held`: nothing is to be collected before `release`."""
        super().__init__(name=name, daemon=True)
        self.source = source
        self._sink = sink
        self._work: deque[Callable[[], None]] = deque()
        self._scans: deque[_Scan] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._stopping = False
        self._broken = False
        self._held = held
        self._unflushed_ns = 0
        self._background_at = 0.0
        """When a scan in the background went on last; CLOCK_MONOTONIC, seconds."""
        self.busy_since = 0.0
        """When the step began that the thread is at, CLOCK_MONOTONIC in seconds; 0 while it rests."""
        self._lock = threading.Lock()

    @property
    def is_broken(self) -> bool:
        """Whether the source was lost."""
        return self._broken

    def rests(self) -> None:
        """Told in its thread: it is not the filesystem that it waits for."""
        self.busy_since = 0.0

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` in the worker's thread."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if self._stopping:
                future.set_exception(WatchdError("the source was stopped"))
                return
            try:
                result = work()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._lock:
            if self._stopping:
                future.set_exception(WatchdError("the source was stopped"))
                return future
            self._work.append(run)
            os.eventfd_write(self._wake, 1)
        return future

    def release(self) -> None:
        """Begin to collect, when all that was submitted before is done."""
        self.submit(self._listen)

    def scan(
        self,
        slices: Generator[list[Change], None, object],
        found: Callable[[list[Change]], None],
        done: Callable[[Exception | None], None],
        *,
        background: bool = False,
    ) -> None:
        """Work through `slices` in the worker's thread, between collections; `done` is told how it ended.

        One in the background lets all others go first."""
        self.submit(lambda: self._scans.append(_Scan(background, slices, found, done)))

    def queued_bytes(self) -> int:
        """What the kernel holds for the source to read; 0 once it is closed."""
        with self._lock:
            if self._stopping or self._broken:
                return 0
            try:
                return _INT.unpack(fcntl.ioctl(self.source.fileno(), termios.FIONREAD, bytes(4)))[0]  # type: ignore[no-any-return]
            except OSError:
                return 0

    def stop(self) -> None:
        """End the thread and close the source."""
        with self._lock:
            self._stopping = True
            os.eventfd_write(self._wake, 1)
        if self.is_alive():
            self.join(STOP_TIMEOUT_S)
        if not self.is_alive():
            os.close(self._wake)  # else it hangs on its filesystem, and ends with the process

    def run(self) -> None:
        self._poll.register(self._wake, select.POLLIN)
        if not self._held:
            self._listen()
        try:
            while not self._stopping:
                self._step()
        finally:
            self._run_work()  # whoever waits for an answer gets one
            for scan in self._scans:
                scan.slices.close()
            self.source.close()

    def _listen(self) -> None:
        if not self._broken:
            self._poll.register(self.source.fileno(), select.POLLIN)
        if self._held:  # there may be something to collect that is not in the kernel's queue
            self._guard(self._collect)

    def _step(self) -> None:
        self.rests()
        ready = self._wait()
        self.busy_since = time.monotonic()
        if self._wake in ready:
            self._run_work()
        collects = not self._broken and self.source.fileno() in ready
        if collects:
            self._guard(self._collect)
        if (scan := self._next_scan(after_events=collects)) is not None:
            self._continue_scan(scan)
        if self._broken:
            with contextlib.suppress(KeyError):
                self._poll.unregister(self.source.fileno())

    def _wait(self) -> set[int]:
        """Wait for something to do; on the way to a long sleep, flush and let go of what is open."""
        poll = self._poll
        if self._scans:
            pause_ms = BACKGROUND_PAUSE_MS if all(scan.background for scan in self._scans) else 0
            return {descriptor for descriptor, _ in poll.poll(pause_ms)}
        if self._unflushed_ns:
            if ready := poll.poll(FLUSH_MS):
                return {descriptor for descriptor, _ in ready}
            self._flush()
        if ready := poll.poll(LINGER_MS):
            return {descriptor for descriptor, _ in ready}
        self._guard(self.source.idle)
        return {descriptor for descriptor, _ in poll.poll()}

    def _flush(self) -> None:
        self._unflushed_ns = 0
        self._sink.flush()

    def _run_work(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._work:
            self._work.popleft()()

    def _collect(self) -> None:
        batch = self.source.collect()
        if batch is None or batch.is_nothing:
            return
        self._sink.batch(self, batch)
        now_ns = time.monotonic_ns()
        self._unflushed_ns = self._unflushed_ns or now_ns
        if batch.barriers or now_ns - self._unflushed_ns > FLUSH_MAX_NS:
            self._flush()
        if sum(batch.records.values()) >= GATHER_RECORDS and not batch.barriers:
            select.select([self._wake], [], [], GATHER_MS / 1000)

    def _guard(self, step: Callable[[], None]) -> None:
        """An exception of the source becomes a lost source, and it is not asked again."""
        if self._broken:
            return
        try:
            step()
        except Exception as error:
            self._broken = True
            self._sink.lost(self, error)
            self._flush()

    def _next_scan(self, *, after_events: bool) -> _Scan | None:
        """The one whose turn it is, even if events never stop."""
        if not self._scans:
            return None
        scan = min(self._scans, key=lambda scan: scan.background)
        if scan.background:
            now = time.monotonic()
            if after_events and now - self._background_at < BACKGROUND_WAIT_S:
                return None
            self._background_at = now
        return scan

    def _continue_scan(self, scan: _Scan) -> None:
        try:
            changes = next(scan.slices, None)
        except Exception as error:
            self._scans.remove(scan)
            scan.done(error)
            self._flush()
            return
        if changes is None:
            self._scans.remove(scan)
            scan.done(None)
        elif changes:
            # What events have told of it meanwhile comes first, so that nothing is told by both.
            if not self._broken and self.queued_bytes():
                self._guard(self._collect)
            scan.found(changes)
        self._flush()
