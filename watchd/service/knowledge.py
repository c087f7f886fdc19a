"""What is known of the layers, kept beside the journal (`watchd.journal.known`): when it is walked, folded and given up.

Nothing of it happens with every change: the journal is folded when a scan needs it, when much of it is unfolded, and at rest.
All methods run in the event loop's thread where nothing else is said; the file is written in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from watchd.errors import JournalError
from watchd.journal.known import NAME, Known, KnownError, set_aside
from watchd.journal.writer import Journal
from watchd.records import Change
from watchd.service.layer import Layer
from watchd.sources.baseline import Keeper, Rows, Walked, walk_through
from watchd.sources.listing import KnownTree
from watchd.sources.told import Told
from watchd.sources.worker import Worker

log = logging.getLogger(__name__)

T = TypeVar("T")

FOLD_INTERVAL_S = 1.0
FOLD_BYTES = 32 << 20
"""So much of the journal may be unfolded; it is folded in 1 to 2 s, which a scan may have to wait for."""

BUSY_FOLD_BYTES = 4 * FOLD_BYTES
"""So much while records come all the time: who tells of them needs the interpreter."""

REST_S = 10.0
"""When nothing was recorded for so long, what there is is folded."""

WALKS_MAX = 2
"""Layers that are walked at the same time."""

STORES_MAX = 2
"""Batches of directories that may wait for the disk."""

ATTEMPTS_MAX = 3
PAUSE_MAX_S = 600.0
"""A layer in which directories are renamed all the time is walked so often in a row, then after longer and longer pauses."""

CLOSE_BYTES, CLOSE_S = 16 << 20, 1.0
"""So much is folded at the end of the daemon at most, and for so long: deep paths take their time."""

_NOTHING_NEEDED = (1 << 63) - 1


class Knowledge:
    """The known states of all layers."""

    def __init__(self, journal: Journal, state_directory: Path) -> None:
        self._journal, self._path = journal, state_directory / NAME
        self._known: Known | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="known")
        self._told: dict[str, Told] = {}
        self._walks: dict[str, tuple[Walked, asyncio.Task[None]]] = {}
        self._turns = asyncio.Semaphore(WALKS_MAX)
        self._folded_seq = self._folded_bytes = 0
        self._folding = asyncio.Lock()
        self._may_walk = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.on_lost: Callable[[], None] = lambda: None
        """Told when nothing is known any more of some layers."""

    async def open(self) -> None:
        """Open the file, setting a damaged one aside. Without it scans go by times; that is said, and no error."""
        self._known = await self._run(self._open)
        self._folded_seq, self._folded_bytes = self._journal.last_seq, self._journal.bytes
        if self._known is not None:
            self._executor.submit(self._known.tidy)

    def _open(self) -> Known:
        make = partial(
            Known,
            self._path,
            journal=self._journal.directory,
            epoch=self._journal.epoch,
            last_seq=self._journal.durable_seq,
        )
        try:
            return make()
        except KnownError as error:
            if not error.is_damage:
                raise
            log.warning("%s; set aside as %s, all layers are walked anew", error, set_aside(self._path))
            return make()

    async def close(self) -> None:
        """Fold what is quickly folded, and close the file."""
        tasks = [task for _, task in self._walks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._known is not None:  # what is left is for the next run
            self._known.is_enough = self._folding.locked()
            self._loop.call_later(CLOSE_S, setattr, self._known, "is_enough", True)
        if self._journal.bytes - self._folded_bytes < CLOSE_BYTES:
            with contextlib.suppress(JournalError):
                await self._journal.flush()
                await self.fold()
        if self._known is not None:
            await self._run(self._known.close)
        self._executor.shutdown(wait=False)

    # ---- folding ----------------------------------------------------------------------------------------------------

    name = "what is known of the layers"

    @property
    def read_upto(self) -> int:
        """No record up to this number is needed any more; `fold` raises it."""
        return _NOTHING_NEEDED if self._known is None else self._known.upto

    async def fold(self) -> None:
        """Take in all that is durable by now. Raises JournalError if the journal is damaged."""
        async with self._folding:
            known, durable, size = self._known, self._journal.durable_seq, self._journal.bytes
            if known is not None:
                before = set(known.layers)
                await self._run(partial(known.fold, durable, epoch=self._journal.epoch))
                self._folded_seq, self._folded_bytes = durable, size
                if before - known.layers.keys():  # records that they needed are gone
                    self.on_lost()

    async def read_on(self, upto: int) -> None:
        """See `watchd.service.upkeep.Fold`. Raises JournalError."""
        await self.fold()

    def gone_before(self, first_seq: int) -> None:
        """See `watchd.service.upkeep.Fold`: the next fold finds out by itself."""

    async def keep_folding(self) -> None:
        """Walk layers and fold when it is time, from now on; never returns."""
        self._may_walk.set()
        last_seq, rested_s = self._journal.last_seq, 0.0
        while True:
            await asyncio.sleep(FOLD_INTERVAL_S)
            rested_s = rested_s + FOLD_INTERVAL_S if self._journal.last_seq == last_seq else 0.0
            last_seq = self._journal.last_seq
            is_much = self._journal.bytes - self._folded_bytes > (FOLD_BYTES if rested_s else BUSY_FOLD_BYTES)
            if is_much or (rested_s >= REST_S and self._folded_seq < last_seq):
                try:
                    await self.fold()
                except JournalError as error:
                    log.warning("what is known of the layers could not be brought on: %s", error)
                    self._folded_seq, self._folded_bytes = last_seq, self._journal.bytes  # no sooner than for news

    # ---- scans ------------------------------------------------------------------------------------------------------

    def knows(self, layer: Layer) -> bool:
        """Whether a scan can compare the layer with what is known of it."""
        return self._known is not None and self._known.layers.get(layer.name) == layer.directory.path

    async def tree(self, layer: Layer) -> Callable[[], KnownTree] | None:
        """Opens what is known of a layer, up to all that was recorded before the call; None if that cannot be had."""
        if not self.knows(layer):
            return None
        try:
            await self._journal.flush()
            await self.fold()
        except JournalError as error:
            log.warning("layer %s: what is known of it could not be brought on: %s", layer.name, error)
            return None
        return partial(self._known.tree, layer.name) if self._known is not None and self.knows(layer) else None

    async def forget(self, layer: Layer, error: KnownError) -> None:
        """What is known of a layer could not be read."""
        if error.is_damage:
            await self._lost(error)
        elif self._known is not None:
            log.warning("layer %s: %s; it is walked anew", layer.name, error)
            await self._run(partial(self._known.forget, layer.name))

    def listen(self, name: str, told: Told) -> None:
        """Have `told` hear of the changes of a layer from now on, in the thread of its source."""
        self._told[name] = told

    def heard(self, changes: list[Change]) -> None:
        """Events found these; in the thread of a source."""
        if self._told:
            for change in changes:
                told = self._told.get(change.layer)
                if told is not None:
                    told.add(change)

    def unlisten(self, name: str, told: Told) -> None:
        """It is not needed any more; in the thread of its source."""
        if self._told.get(name) is told:
            del self._told[name]

    # ---- walks of layers that are new -------------------------------------------------------------------------------

    def walk(self, layer: Layer) -> None:
        """Get to know a layer that is live, in the background, unless it is known."""
        if self._known is None or self.knows(layer) or layer.worker is None or layer.name in self._walks:
            return
        walked = Walked()
        task = self._loop.create_task(self._walk(layer, layer.worker, walked))
        self._walks[layer.name] = (walked, task)
        task.add_done_callback(lambda _: self._ended(layer.name, task))

    def stop_walk(self, layer: Layer) -> None:
        """Events of the layer may be missed, or it is not watched any more."""
        if layer.name in self._walks:
            walked, task = self._walks.pop(layer.name)
            walked.is_wanted = False
            task.cancel()

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        if name in self._walks and self._walks[name][1] is task:
            del self._walks[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("layer %s could not be walked: %s", name, error)

    async def _walk(self, layer: Layer, worker: Worker, walked: Walked) -> None:
        pause_s, attempts = 1.0, 0
        await self._may_walk.wait()  # the start comes first
        while self._known is not None:
            async with self._turns:
                is_done = await self._try_to_walk(self._known, layer, worker, walked)
            if is_done:
                return
            attempts += 1
            if attempts % ATTEMPTS_MAX == 0:
                log.info("layer %s: directories are renamed while it is walked; again in %g s", layer.name, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, PAUSE_MAX_S)

    async def _try_to_walk(self, known: Known, layer: Layer, worker: Worker, walked: Walked) -> bool:
        """One attempt; false if it has to be made again. Raises LayerError, KnownError."""
        number = await self._run(partial(known.begin, layer.name, layer.directory.path, self._journal.last_seq))
        if number is None:
            return True
        is_complete = False
        try:
            if await self._walk_once(known, number, layer, worker, walked):
                await self._run(partial(known.complete, number, walked.root, walked.state))
                is_complete = True
                log.info("layer %s: known, %d entries", layer.name, walked.entries)
            return is_complete
        finally:
            if not is_complete:  # else the journal would have to be kept for it
                self._executor.submit(known.give_up, number)

    async def _walk_once(self, known: Known, number: int, layer: Layer, worker: Worker, walked: Walked) -> bool:
        """Whether what was stored is what there was when the walk began, and what changed since is told."""
        told, stores = Told(limit=0), _Stores(self._executor, known, number)
        end: asyncio.Future[Exception | None] = self._loop.create_future()
        walked.astray = False
        slices = walk_through(
            layer.watched,
            Keeper(numbers=known.next_numbers, store=stores.put, is_busy=stores.is_busy),
            walked,
            queued=worker.queued_bytes,
        )

        def done(error: Exception | None) -> None:
            self.unlisten(layer.name, told)
            with contextlib.suppress(RuntimeError):  # the loop is closed: the end is near
                self._loop.call_soon_threadsafe(_settle, end, error)

        worker.submit(partial(self.listen, layer.name, told))
        worker.scan(slices, _nothing, done, background=True)
        error = await end
        if error is not None:
            raise error
        await self._run(stores.result)
        return not told.directory_renamed and not walked.astray

    # ---- its thread -------------------------------------------------------------------------------------------------

    async def _run(self, call: Callable[[], T]) -> T | None:
        """In the thread of the file; None if that cannot be used."""
        try:
            return await self._loop.run_in_executor(self._executor, call)
        except KnownError as error:
            await self._lost(error)
            return None

    async def _lost(self, error: KnownError) -> None:
        """The file cannot be used; if it is damaged, begin with a new one."""
        log.warning("%s; until it can be used again, scans go by times", error)
        if not error.is_damage or self._known is None:
            return
        known, self._known = self._known, None
        await self._loop.run_in_executor(self._executor, known.close)
        with contextlib.suppress(KnownError):
            self._known = await self._loop.run_in_executor(self._executor, self._open_anew)
        self.on_lost()

    def _open_anew(self) -> Known:
        log.warning("%s was set aside as %s", self._path, set_aside(self._path))
        return self._open()


class _Stores:
    """Directories on their way to the file."""

    def __init__(self, executor: ThreadPoolExecutor, known: Known, number: int) -> None:
        self._executor, self._known, self._number = executor, known, number
        self._pending: list[Future[None]] = []

    def put(self, rows: Rows) -> None:
        """In the thread of a source."""
        self._pending.append(self._executor.submit(self._known.store, self._number, rows))

    def is_busy(self) -> bool:
        """Whether the disk cannot follow; in the thread of a source. Raises KnownError if something was not stored."""
        while self._pending and self._pending[0].done():
            self._pending.pop(0).result()
        return len(self._pending) >= STORES_MAX

    def result(self) -> None:
        """In the thread of the file, so all was stored by then. Raises KnownError."""
        for future in self._pending:
            future.result()


def _settle(future: asyncio.Future[Exception | None], error: Exception | None) -> None:
    if not future.done():  # whoever waited may have been cancelled
        future.set_result(error)


def _nothing(changes: list[Change]) -> None:
    """A walk tells of no changes."""
    assert not changes
