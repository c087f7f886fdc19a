"""The layers that are watched: which source watches which.

A layer's life: adopted (a source watches it from now on) -> live; what its records may be missing is the part of
`watchd.service.gaps`.

A fanotify group that the process before this one has left (`watchd.service.fdstore`) is read on when all layers that are there
were adopted, and those of which nothing was missed are live at once.

All methods run in the event loop's thread where nothing else is said. What the workers tell arrives there in the order in which
it happened (`watchd.service.intake`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from watchd.coherence.engine import Engine
from watchd.coherence.round import Round
from watchd.config.schema import Sources
from watchd.errors import JournalError, LayerError, UnsupportedError, WatchdError
from watchd.journal.writer import Journal
from watchd.kernel.filesystems import OVERLAYFS_SUPER_MAGIC
from watchd.metrics import Metrics
from watchd.overlay.model import LayerDirectory
from watchd.service.barriers import Barriers
from watchd.service.fdstore import FdStore, KeptGroup
from watchd.service.gaps import Gaps
from watchd.service.intake import Intake, suspects_of
from watchd.service.knowledge import Knowledge
from watchd.service.layer import Key, Layer, key_of
from watchd.service.ledger import Purpose, Receipt
from watchd.service.names import NameBook
from watchd.service.patience import LIMIT_S, in_thread
from watchd.sources.base import Batch, MovedIn, Source, WatchedLayer
from watchd.sources.fanotify import FanotifySource, event_mask, group_flags
from watchd.sources.inotify import InotifySource
from watchd.sources.worker import Worker

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0
"""So long the last collection before the end may take."""

RETRY_S = 5.0
"""A layer that could not be watched is tried again after so long."""


class LayerBook:
    """All layers and the workers of their sources; the sink of the workers."""

    def __init__(
        self,
        journal: Journal,
        engine: Engine,
        metrics: Metrics,
        *,
        settings: Sources,
        knowledge: Knowledge,
        barrier_directory: Path,
        names: NameBook,
        store: FdStore,
        on_round: Callable[[Round], None],
    ) -> None:
        """`on_round` is told, in the loop's thread, of rounds that were worked on while their changes were collected."""
        self.settings = settings
        self.layers: dict[Key, Layer] = {}
        self._journal, self._metrics, self._names, self._store = journal, metrics, names, store
        self._knowledge = knowledge
        self._intake = Intake(journal, engine, metrics, on_round=on_round)
        self._gaps = Gaps(
            journal,
            engine,
            metrics,
            intake=self._intake,
            knowledge=knowledge,
            watched=self.layers.values,
            lost=self.lost,
            failed=self._unreadable,
        )
        self._barriers = Barriers(barrier_directory)
        self._workers: dict[object, Worker] = {}
        self._starting: list[Worker] = []
        """Asked to watch a layer just now, so not to be discarded though no layer has them yet."""
        self._ending: set[asyncio.Task[None]] = set()
        """Workers that are not needed any more, until they have ended."""
        self._kept: dict[Worker, KeptGroup] = {}
        """Those whose group outlives us."""
        self._entering: set[asyncio.Task[None]] = set()
        self._closing = False
        self._loop = asyncio.get_running_loop()

    # ---- layers that come and go ------------------------------------------------------------------------------------

    async def adopt(self, watched: WatchedLayer, directory: LayerDirectory, *, name: str, backend: str) -> Layer:
        """Watch a layer; its state tells whether that worked, or `waiting` that it may take longer."""
        layer = Layer(name, directory, watched, backend)
        self.layers[key_of(directory)] = layer
        await self.watch(layer)
        return layer

    async def watch(self, layer: Layer) -> None:
        """Returns when the layer is watched or cannot be, or after LIMIT_S: then that goes on by itself."""
        if layer.watching is None:
            layer.asked_at = time.monotonic()
            layer.watching = self._loop.create_task(self._watch(layer))
        attempt = layer.watching
        await asyncio.wait({attempt}, timeout=LIMIT_S)
        if attempt.done() and not attempt.cancelled():
            attempt.result()

    async def retry(self, *, after_s: float = 0.0) -> None:
        """Try again to watch what could not be watched; those whose time comes within `after_s` too."""
        now = time.monotonic() + after_s
        # Not every layer without a worker failed: one inside another overlay is live through the layers of that.
        failed = [layer for layer in self.layers.values() if layer.state == "failed" and layer.worker is None]
        due = [layer for layer in failed if layer.retry_at <= now and layer.watching is None]
        await asyncio.gather(*map(self.watch, due))

    def drop(self, layer: Layer) -> None:
        """Stop watching; the journal says that changes may be missing from now on."""
        if layer.complete_ns:
            self._gaps.desync(
                layer, "source-lost"
            )  # while its mark is still kept, so that its return closes this desync
        del self.layers[key_of(layer.directory)]
        self._names.release(layer.name)
        self._unwatch(layer)
        layer.become("failed", "not watched any more")  # for whoever waits for it
        self.reroute()

    def reroute(self) -> None:
        """Which mounts a layer's changes concern was changed."""
        self._intake.reroute(self.layers.values())

    def journal_lost(self) -> None:
        """Nothing is recorded any more."""
        self._store.journal_lost()
        self._gaps.journal_lost()

    def journal_back(self) -> None:
        """It is again, and what was not is looked for."""
        self._intake.forget_sequences()
        self._gaps.journal_back()
        self._store.journal_back(self._journal.epoch)
        for layer in self.layers.values():
            if layer.worker is not None:
                self._remember(layer, layer.worker)

    def go_on(self) -> None:
        """All layers that are there now were adopted: read what was left from before. Whatever comes later is as after any
        restart."""
        self._store.discard_unclaimed()
        for worker, kept in self._kept.items():
            if kept.is_resumed:
                kept.is_resumed = False
                kept.ledger.keep([layer.name for layer in self._layers_of(worker)])
                worker.release()

    async def close(self) -> None:
        """Collect what is queued, note how far every layer is complete and end all workers; kept groups go on hearing."""
        answering = {layer.worker for layer in self.layers.values() if layer.worker and not layer.waiting()}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._barriers.wait(answering)
        self._closing = True
        self._intake.close()
        attempts = [layer.watching for layer in self.layers.values() if layer.watching is not None]
        for attempt in (*attempts, *self._entering):
            attempt.cancel()
        await asyncio.gather(*attempts, *self._entering, return_exceptions=True)
        # No layer is taken from its source before it has ended: that would read what happens until then for nothing.
        await asyncio.gather(*(in_thread(worker.stop, name="end") for worker in self._workers.values()), *self._ending)
        self.take_in()
        self._gaps.note_marks()

    async def rewatch(self, settings: Sources) -> None:
        """Use other settings for all sources from now on."""
        if settings == self.settings:
            return
        self.settings = settings
        for layer in self.layers.values():
            self._gaps.desync(layer, "restart")
            self._unwatch(layer)
        if self._ending:  # there is a limit to how many sources there may be
            await asyncio.wait(self._ending, timeout=LIMIT_S)
        await asyncio.gather(*map(self.watch, list(self.layers.values())))

    async def _watch(self, layer: Layer) -> None:
        try:
            await self._try_to_watch(layer)
        finally:
            if layer.watching is asyncio.current_task():
                layer.watching = None
            self._discard_unused()

    async def _try_to_watch(self, layer: Layer) -> None:
        started_ns = time.time_ns()
        for backend in self._candidates(layer):
            try:
                worker = self._worker(backend, layer)
                unbroken = await self._start(layer, worker)
            except UnsupportedError as error:
                layer.become("failed", str(error))
                if layer.directory.magic == OVERLAYFS_SUPER_MAGIC:
                    break  # no inotify: its watches would pin what they watch in the inner overlay's cache
            except (WatchdError, OSError) as error:
                layer.become("failed", str(error))
                break
            else:
                layer.worker = worker
                self._gaps.began(layer, started_ns, unbroken=unbroken)
                self._remember(layer, worker)
                return
        layer.retry_at = time.monotonic() + RETRY_S
        if layer.directory.magic != OVERLAYFS_SUPER_MAGIC:  # the mount book knows better
            log.warning("layer %s cannot be watched: %s", layer.name, layer.reason)

    async def _start(self, layer: Layer, worker: Worker) -> bool:
        """Have the worker watch the layer; whether it was heard all the time while no process was there. Raises as
        `Source.add`."""
        kept, source = self._kept.get(worker), worker.source
        resumes = kept is not None and kept.is_resumed and kept.ledger.remembers(layer.watched)
        watch = source.resume if resumes and isinstance(source, FanotifySource) else source.add
        self._starting.append(worker)
        try:
            unbroken = await asyncio.wrap_future(worker.submit(partial(watch, layer.watched)))
        except asyncio.CancelledError:
            self._forget(layer, worker)
            worker.submit(partial(source.remove, layer.name))  # when it is done adding it
            raise
        except Exception:
            self._forget(layer, worker)
            raise
        finally:
            self._starting.remove(worker)
        if worker.is_broken:  # its loss may have been told before it was the layer's
            raise LayerError("its source was lost as soon as it was there")
        return bool(unbroken) and kept is not None and kept.is_resumed

    def _remember(self, layer: Layer, worker: Worker) -> None:
        """Have the layer's group outlive us, as soon as the journal says what may be missing of the layer."""
        if (kept := self._kept.get(worker)) is not None:
            entering = self._loop.create_task(self._enter(layer, worker, kept))
            self._entering.add(entering)
            entering.add_done_callback(self._entering.discard)

    async def _enter(self, layer: Layer, worker: Worker, kept: KeptGroup) -> None:
        with contextlib.suppress(JournalError):
            await self._journal.flush()
            if layer.worker is worker:
                self._store.enter(kept, worker.source.fileno(), layer.watched)

    def _forget(self, layer: Layer, worker: Worker) -> None:
        if (kept := self._kept.get(worker)) is not None:
            kept.ledger.leave(layer.name)

    def _candidates(self, layer: Layer) -> Sequence[str]:
        wanted = self.settings.backend if layer.backend == "auto" else layer.backend
        return ("fanotify", "inotify") if wanted == "auto" else (wanted,)

    def _worker(self, backend: str, layer: Layer) -> Worker:
        """One worker for all layers of a filesystem with fanotify, one for each layer with inotify. Raises as sources do."""
        key: object = (backend, layer.directory.device if backend == "fanotify" else layer.name)
        worker = self._workers.get(key)
        if worker is None:
            name = f"{backend} {layer.name}"
            if backend == "fanotify":
                worker = self._fanotify_worker(layer.directory.device, name=name)
            else:
                worker = Worker(self._source(backend), self, name=name)
            self._workers[key] = worker
            worker.start()
        return worker

    def _fanotify_worker(self, device: int, *, name: str) -> Worker:
        """Goes on with the group that was left from before, if there is one."""
        content, unlimited = self.settings.content, self.settings.queue == "unlimited"
        purpose = Purpose(device, group_flags(unlimited_queue=unlimited), event_mask(content=content))
        kept = self._store.claim(purpose)
        try:
            source = FanotifySource(
                barrier_directory=os.fsencode(self._barriers.directory),
                content=content,
                unlimited_queue=unlimited,
                inherited=kept.descriptor if kept is not None else None,
                unrecorded=kept.unrecorded if kept is not None else (),
            )
        except BaseException:
            if kept is not None:
                self._store.give_up(kept)
            raise
        worker = Worker(source, self, name=name, held=kept is not None)
        kept = kept or self._store.create(purpose)
        if kept is not None:
            source.ledger, self._kept[worker] = kept.ledger, kept
        return worker

    def _source(self, backend: str) -> Source:
        if backend == "inotify":
            barrier = os.fsencode(self._barriers.directory)
            return InotifySource(barrier_directory=barrier, content=self.settings.content)
        raise UnsupportedError(
            f"the backend {backend} is not part of this version", remedy="choose fanotify or inotify"
        )

    def _unwatch(self, layer: Layer) -> None:
        self._knowledge.stop_walk(layer)
        if layer.watching is not None:
            layer.watching.cancel()
            layer.watching = None
        if layer.worker is not None:
            worker = layer.worker
            layer.lose_worker()
            self._forget(layer, worker)
            worker.submit(partial(worker.source.remove, layer.name))
        self._discard_unused()

    def _discard_unused(self) -> None:
        """End workers that no layer has; nobody waits for them but the end of the daemon, which ends all."""
        if self._closing:
            return
        used = {*self._starting, *(layer.worker for layer in self.layers.values())}
        unused = [(key, worker) for key, worker in self._workers.items() if worker not in used]
        for key, _ in unused:
            del self._workers[key]
        self._barriers.keep(self._workers.values())
        for _, worker in unused:
            if (kept := self._kept.pop(worker, None)) is not None:
                self._store.discard(kept, worker.source.fileno())
            ending = self._loop.create_task(in_thread(worker.stop, name="end"))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    # ---- what the workers tell (called in their threads) ------------------------------------------------------------

    def batch(self, worker: Worker, batch: Batch) -> None:
        """See `watchd.sources.worker.Sink`."""
        intake, kept = self._intake, self._kept.get(worker)
        if batch.overflow:
            intake.call(self._overflowed, worker)
        number = intake.next_number()
        suspects = suspects_of(batch.changes) if batch.suspects is None else batch.suspects
        rounds = intake.suspect(suspects, number, batch.read_ns)
        intake.wait_for_room(worker)
        if batch.look is not None:
            batch.changes += batch.look()
        batch.look = batch.suspects = None  # what they hold would wait with the batch
        self._knowledge.heard(batch.changes)
        intake.doubt(batch.linked)
        if batch.changes or batch.complete_ns:
            intake.call(self._record, number, worker, batch)
        intake.worked(rounds)
        if kept is not None or batch.moved_in:
            intake.call(self._recorded, worker, batch.moved_in, kept.ledger.told() if kept is not None else 0)
        if batch.barriers:
            intake.call(self._barriers.reached, worker, batch.barriers)

    def lost(self, worker: Worker, error: Exception) -> None:
        """See `watchd.sources.worker.Sink`."""
        self._intake.call(self._source_lost, worker, error)

    def flush(self) -> None:
        """See `watchd.sources.worker.Sink`."""
        self._intake.flush()

    # ---- what of that is done in the loop's thread ------------------------------------------------------------------

    def take_in(self) -> None:
        """Do what the workers have told so far."""
        self._intake.take_in()

    def sequence_of(self, number: int) -> int:
        """The sequence number of the last change of a batch."""
        return self._intake.sequence_of(number)

    def _record(self, number: int, worker: Worker, batch: Batch) -> None:
        self._intake.append(number, batch.changes)
        self._metrics.events(worker.source.backend, batch.records)
        if batch.complete_ns:
            self._gaps.complete_until(self._layers_of(worker), batch.complete_ns)
        self._gaps.note_marks_if_due()

    def _overflowed(self, worker: Worker) -> None:
        self._gaps.overflowed(self._layers_of(worker))
        # What was lost may have been the event of a barrier; whoever waits for it waits for the scan now.
        self._barriers.reached_all(worker)

    def _recorded(self, worker: Worker, moved_in: Sequence[MovedIn], reading: int) -> None:
        """All that came of the readings up to this one was given to the journal, but for what came with directories."""
        scans = [(layer, moved) for moved in moved_in for layer in self._layers_of(worker) if layer.name == moved.layer]
        kept, receipt = self._kept.get(worker), None
        if kept is not None and not self._journal.failure:
            receipt = kept.ledger.recorded(reading, upto=self._journal.last_seq, scans=len(scans))
        for layer, moved in scans:
            self._gaps.moved_in(layer, worker, moved, partial(self._scanned, kept, receipt))
        self._store.committed(self._journal.durable_seq)

    def _scanned(self, kept: KeptGroup | None, receipt: Receipt | None) -> None:
        """One of the directories that came with a reading was looked through."""
        if kept is not None and receipt is not None:
            kept.ledger.scanned(receipt, self._journal.last_seq)
            self._store.committed(self._journal.durable_seq)

    def _source_lost(self, worker: Worker, error: Exception) -> None:
        if not self._closing:
            log.warning("a source was lost: %s", error)
        for layer in self._layers_of(worker):
            self._gaps.desync(layer, "source-lost")
            layer.lose_worker()
            layer.become("failed", str(error))
            layer.retry_at = 0.0
        self._discard_unused()

    def _unreadable(self, layer: Layer, error: Exception) -> None:
        """A scan of the layer failed."""
        layer.lose_worker()
        layer.become("failed", str(error))
        layer.retry_at = time.monotonic() + RETRY_S
        self._discard_unused()

    def is_known(self, layer: Layer) -> bool:
        """Whether a scan could say exactly what changed in the layer."""
        return self._knowledge.knows(layer)

    def queue_bytes(self) -> int:
        """What the kernel holds for the sources to read; for any thread."""
        return sum(worker.queued_bytes() for worker in list(self._workers.values()))

    def muted_directories(self) -> int:
        """Directories outside of all layers that are busy and not heard; for any thread."""
        sources = [worker.source for worker in list(self._workers.values())]
        return sum(len(source.mutes) for source in sources if isinstance(source, FanotifySource))

    async def barrier(self, layers: Sequence[Layer]) -> None:
        """Returns when everything that the layers' sources had queued before the call was recorded and handed on."""
        await self._barriers.wait({layer.worker for layer in layers if layer.worker is not None})
        for layer in layers:
            if layer.arrivals:
                await asyncio.wait(set(layer.arrivals))
            await layer.settled.wait()

    def _layers_of(self, worker: Worker) -> list[Layer]:
        return [layer for layer in self.layers.values() if layer.worker is worker]
