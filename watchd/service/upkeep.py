"""Keeps the journal within its limits: looks once a minute, and whenever a segment begins.

The work on files is done in the journal's own thread. Readers that are behind are asked to read on before anything is
removed that they have not read; whoever does not is left behind at the hard limit, and that is said.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Final, Protocol

from watchd.config.schema import Journal as JournalConfig
from watchd.errors import WatchdError
from watchd.journal.cursors import Cursors
from watchd.journal.retention import Limits, Stored, expired, stored
from watchd.journal.writer import Journal

log = logging.getLogger(__name__)

INTERVAL_S: Final = 60.0


class Fold(Protocol):
    """Something that is made of the journal's records, and has to read each of them once."""

    name: str
    """What it is, for people."""

    @property
    def read_upto(self) -> int:
        """No record up to this number is needed any more."""

    async def read_on(self, upto: int) -> None:
        """Reads up to this record if that can be done now. Raises WatchdError."""

    def gone_before(self, first_seq: int) -> None:
        """Told that records before this one are not there any more, read or not."""


def limits_of(config: JournalConfig) -> Limits:
    """What the configuration says, the hard limit by default twice the wished size."""
    size = int(config.retain_size)
    hard = config.retain_limit if isinstance(config.retain_limit, int) else 2 * size
    return Limits(size, int(config.retain_age), max(size, int(hard)))


class Upkeep:
    """Removes what the journal does not keep any longer. Lives in the event loop's thread."""

    def __init__(self, journal: Journal, cursors: Cursors, limits: Limits, *, folds: Sequence[Fold] = ()) -> None:
        self._journal, self._cursors, self._folds = journal, cursors, folds
        self._limits = limits
        self._wake = asyncio.Event()
        self._told = ""

    def configure(self, limits: Limits) -> None:
        """Other limits hold from now on."""
        self._limits = limits
        self.wake()

    def wake(self) -> None:
        """Look soon."""
        self._wake.set()

    async def run(self) -> None:
        """For ever. What goes wrong is told once, and tried again."""
        while True:
            self._wake.clear()
            try:
                await self.look()
                self._told = ""
            except WatchdError as error:
                if str(error) != self._told:
                    log.warning("the journal cannot be kept within its limits: %s", error)
                self._told = str(error)
            try:
                async with asyncio.timeout(INTERVAL_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def look(self) -> None:
        """Remove what is over the limits. Raises WatchdError."""
        wanted = await self._expired(None)
        if not wanted:
            return
        for fold in self._folds:
            if fold.read_upto < wanted[-1].last_seq:
                await self._ask_to_read_on(fold, wanted[-1].last_seq)
        readers = await self._journal.in_thread(self._readers)
        gone = await self._expired(min(readers.values(), default=None))
        if not gone:
            return
        last_seq = gone[-1].last_seq
        await self._journal.remove(gone)
        log.info("removed %d segments of the journal, up to record %d", len(gone), last_seq)
        for name in sorted(name for name, seq in readers.items() if seq < last_seq):
            log.warning("%s had not read up to record %d, but the journal is over its retain_limit", name, last_seq)
        for fold in self._folds:
            fold.gone_before(self._journal.first_seq)

    async def _ask_to_read_on(self, fold: Fold, upto: int) -> None:
        try:
            await fold.read_on(upto)
        except WatchdError as error:  # the others are not to wait for it for ever
            log.warning("%s could not read the journal: %s", fold.name, error)

    async def _expired(self, read_upto: int | None) -> list[Stored]:
        return await self._journal.in_thread(partial(self._look_at_segments, self._journal.bytes, read_upto))

    def _look_at_segments(self, total_bytes: int, read_upto: int | None) -> list[Stored]:
        segments = stored(self._journal.directory)
        return expired(segments, total_bytes, self._limits, now_ns=time.time_ns(), read_upto=read_upto)

    def _readers(self) -> dict[str, int]:
        """Who reads the journal, and the last record that each has read. Cursors that mean nothing here hold nothing."""
        journal = self._journal
        cursors = {
            f"cursor {name}": cursor.seq
            for name, cursor in self._cursors.all().items()
            if cursor.epoch == journal.epoch and journal.first_seq - 1 <= cursor.seq <= journal.last_seq
        }
        return cursors | {fold.name: fold.read_upto for fold in self._folds}
