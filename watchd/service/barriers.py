"""Barriers: to know that sources have read everything that happened before.

Every source also hears of files that are made in a directory of ours. Making one puts an event behind all that its kernel queue
holds, so when a source tells of it, everything before was read and told. Lives in the event loop's thread.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Iterable, Set
from pathlib import Path

from watchd.sources.worker import Worker


class Barriers:
    """The barriers that somebody waits for."""

    def __init__(self, directory: Path) -> None:
        """`directory` is watched by every source and empty."""
        self.directory = directory
        # An event of the process before this one may be read by us, and must not be taken for one of ours.
        self._tokens = itertools.count(time.monotonic_ns())
        self._waiting: dict[bytes, tuple[set[Worker], asyncio.Event]] = {}

    async def wait(self, workers: Set[Worker]) -> None:
        """Returns when all of these workers have told of everything that was queued before the call, or are gone."""
        if not workers:
            return
        token = b"%d" % next(self._tokens)
        reached = asyncio.Event()
        self._waiting[token] = (set(workers), reached)
        path = self.directory / token.decode()
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            path.unlink()
            await reached.wait()
        finally:
            del self._waiting[token]

    def reached(self, worker: Worker, tokens: Iterable[bytes]) -> None:
        """A worker has told of the files of these names."""
        for token in tokens:
            if waiting := self._waiting.get(token):
                waiting[0].discard(worker)
        self._release()

    def reached_all(self, worker: Worker) -> None:
        """The events of a worker's barriers may have been lost; what waits for it has to wait for something else."""
        self.reached(worker, list(self._waiting))

    def keep(self, workers: Iterable[Worker]) -> None:
        """Nobody waits for other workers than these any more."""
        kept = set(workers)
        for waiting, _ in self._waiting.values():
            waiting &= kept
        self._release()

    def _release(self) -> None:
        for workers, reached in self._waiting.values():
            if not workers:
                reached.set()
