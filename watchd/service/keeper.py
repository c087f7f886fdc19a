"""What is done when the journal cannot be written: mounts are repaired all the same, and the gap is told once it is back.

Until then records go nowhere, `sync` fails, and the journal is opened again now and then. When that succeeds every layer has
missed something: the book of layers tells so and scans.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from watchd.errors import JournalError
from watchd.journal.writer import Journal
from watchd.service.layers import LayerBook

T = TypeVar("T")

log = logging.getLogger(__name__)

RETRY_S: Final = 2.0
"""A journal that failed is opened again after so long, and again and again."""

RETRY_MAX_S: Final = 60.0
"""Every time it fails again soon it is left alone for twice as long as before, up to this: each time all layers are scanned."""

STEADY_S: Final = 300.0
"""What lasted so long is not soon any more."""


class JournalKeeper:
    """Opens a failed journal again. Lives in the event loop's thread."""

    def __init__(self, journal: Journal, layers: LayerBook, *, changed: Callable[[], None]) -> None:
        """`changed` is called when the journal has failed, and when it is back and nothing was recorded yet."""
        self._journal, self._layers, self._changed = journal, layers, changed
        self._pause_s = RETRY_S
        self._opened_at = -STEADY_S

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.wait({self._journal.failed})
            epoch = self._journal.epoch
            self._lost(self._journal.failed.result())
            while not await self._reopened():
                pass
            self._back(epoch)

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is given up as soon as the journal has failed. Raises JournalError then."""
        failed, task = self._journal.failed, asyncio.ensure_future(work)
        task.add_done_callback(_see)
        watched: list[asyncio.Future[Any]] = [failed, task]
        try:
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if failed.done() or not task.done():
                task.cancel()
                await asyncio.wait({task})
        if failed.done():
            raise JournalError(f"changes cannot be recorded: {failed.result()}")
        return task.result()

    def _lost(self, error: JournalError) -> None:
        is_soon = time.monotonic() - self._opened_at < STEADY_S
        self._pause_s = min(2 * self._pause_s, RETRY_MAX_S) if is_soon else RETRY_S
        log.error("%s; until then mounts are kept, but no change is recorded and sync fails", error)
        self._layers.journal_lost()
        self._changed()

    async def _reopened(self) -> bool:
        """Whether it can be written again; waits before it tries."""
        await asyncio.sleep(self._pause_s)
        reason = str(self._journal.failed.result())
        try:
            await self._journal.reopen()
        except JournalError as error:
            if str(error) != reason:
                log.error("the journal still fails: %s", error)
            return False
        return True

    def _back(self, epoch: str) -> None:
        self._opened_at = time.monotonic()
        if self._journal.epoch == epoch:
            log.warning("the journal is written again; what changed meanwhile is looked for")
        else:
            log.warning("a new journal was begun, %s in place of %s; layers are scanned", self._journal.epoch, epoch)
        self._changed()
        self._layers.journal_back()


def _see(task: asyncio.Future[Any]) -> None:
    """Its error is nobody's when it failed just as it was given up, and asyncio would complain of that."""
    if not task.cancelled():
        task.exception()
