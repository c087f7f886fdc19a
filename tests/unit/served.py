"""A journal and the control socket's verbs for its consumers, in a loop of their own, as clients see them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from watchd.config.schema import Control
from watchd.config.units import FileMode
from watchd.journal.disk import File, RealDisk, RealFile
from watchd.journal.writer import Journal, JournalSettings
from watchd.records import Record
from watchd.service.consumers import Consumers
from watchd.service.control import ControlServer

PATIENCE_S = 30.0
OPEN_TO_ALL = Control(mode=FileMode.parse("0666"))

T = TypeVar("T")


class _SlowFile(RealFile):
    def __init__(self, path: Path, flags: int, disk: SlowDisk) -> None:
        super().__init__(path, flags)
        self._disk = disk

    def sync(self) -> None:
        assert self._disk.is_fast.wait(PATIENCE_S)
        if self._disk.is_broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync()


class SlowDisk(RealDisk):
    """A disk that puts nothing on disk while `is_fast` is cleared, and refuses to while `is_broken`."""

    def __init__(self) -> None:
        self.is_broken = False
        self.is_fast = threading.Event()
        self.is_fast.set()

    def open(self, path: Path, flags: int) -> File:
        return _SlowFile(path, flags, self)


class Served:
    """Belongs to the test's thread."""

    def __init__(self, directory: Path, settings: JournalSettings) -> None:
        self.directory = directory
        self.disk = SlowDisk()
        self.journal: Journal
        self.consumers: Consumers
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Done in the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def append(self, records: Sequence[Record], *, durable: bool = True) -> int:
        """Append to the journal; returns the number of the last record."""

        async def append() -> int:
            last = self.journal.append(records)
            if durable:
                await self.journal.flush()
            return last

        return self.run(append())

    def look(self, question: Callable[[], T]) -> T:
        """What the question answers in the loop."""

        async def ask() -> T:
            return question()

        return self.run(ask())

    @contextlib.contextmanager
    def serving(self) -> Iterator[Served]:
        self._thread.start()
        try:
            self.run(self._start())
            try:
                yield self
            finally:
                self.disk.is_fast.set()
                self.run(self.stop())
                self.run(self.journal.close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def stop(self) -> None:
        """As the daemon does at its end; the journal stays."""
        await self.consumers.close()
        await self._control.close()

    async def _start(self) -> None:
        state = self.directory / "state"
        self.journal = await Journal.open(
            state / "journal", self._settings, on_commit=lambda *_: self.consumers.committed(), disk=self.disk
        )
        self.consumers = Consumers(self.journal, state)
        self._control = ControlServer(
            self.directory,
            {
                "changes": self.consumers.changes,
                "cursors": self.consumers.cursors,
                "cursor_set": self.consumers.set_cursor,
                "cursor_delete": self.consumers.delete_cursor,
            },
            streams={"follow": self.consumers.follow},
            root_only=frozenset({"cursor_set", "cursor_delete"}),
        )
        await self._control.start(OPEN_TO_ALL)


def open_segments(directory: Path) -> list[str]:
    """The segments of a journal that this process has open."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{descriptor}")
            if target.startswith(str(directory)) and target.endswith(".wal"):
                found.append(target)
    return found
