"""The layers that are watched: which source watches which.

A layer's life: adopted (a source watches it from now on) -> live; what its records may be missing is the part of
`watchd.service.gaps`.

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
from watchd.errors import LayerError, UnsupportedError, WatchdError
from watchd.journal.writer import Journal
from watchd.kernel.filesystems import OVERLAYFS_SUPER_MAGIC
from watchd.metrics import Metrics
from watchd.overlay.model import LayerDirectory
from watchd.service.barriers import Barriers
from watchd.service.gaps import Gaps
from watchd.service.intake import Intake, suspects_of
from watchd.service.layer import Key, Layer, key_of
from watchd.service.names import NameBook
from watchd.service.patience import LIMIT_S, in_thread
from watchd.sources.base import Batch, MovedIn, Source, WatchedLayer
from watchd.sources.fanotify import FanotifySource
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
        barrier_directory: Path,
        names: NameBook,
        on_round: Callable[[Round], None],
    ) -> None:
        """`on_round` is told, in the loop's thread, of rounds that were worked on while their changes were collected."""
        self.settings = settings
        self.layers: dict[Key, Layer] = {}
        self._metrics, self._names = metrics, names
        self._intake = Intake(journal, engine, metrics, on_round=on_round)
        self._gaps = Gaps(
            journal,
            engine,
            metrics,
            intake=self._intake,
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
        self._gaps.journal_lost()

    def journal_back(self) -> None:
        """It is again, and what was not is looked for."""
        self._intake.forget_sequences()
        self._gaps.journal_back()

    async def close(self) -> None:
        """Collect what is queued, note how far every layer is complete and end all workers."""
        answering = {layer.worker for layer in self.layers.values() if layer.worker and not layer.waiting()}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._barriers.wait(answering)
        self._intake.close()
        self._gaps.note_marks()
        attempts = [layer.watching for layer in self.layers.values() if layer.watching is not None]
        for layer in self.layers.values():
            self._unwatch(layer)
        await asyncio.gather(*attempts, return_exceptions=True)
        await asyncio.gather(*self._ending)

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
                layer.worker = await self._start(layer, self._worker(backend, layer))
            except UnsupportedError as error:
                layer.become("failed", str(error))
                if layer.directory.magic == OVERLAYFS_SUPER_MAGIC:
                    break  # no inotify: its watches would pin what they watch in the inner overlay's cache
            except (WatchdError, OSError) as error:
                layer.become("failed", str(error))
                break
            else:
                self._gaps.began(layer, started_ns)
                return
        layer.retry_at = time.monotonic() + RETRY_S
        if layer.directory.magic != OVERLAYFS_SUPER_MAGIC:  # the mount book knows better
            log.warning("layer %s cannot be watched: %s", layer.name, layer.reason)

    async def _start(self, layer: Layer, worker: Worker) -> Worker:
        """Have the worker watch the layer. Raises as `Source.add`."""
        self._starting.append(worker)
        try:
            await asyncio.wrap_future(worker.submit(partial(worker.source.add, layer.watched)))
        except asyncio.CancelledError:
            worker.submit(partial(worker.source.remove, layer.name))  # when it is done adding it
            raise
        finally:
            self._starting.remove(worker)
        if worker.is_broken:  # its loss may have been told before it was the layer's
            raise LayerError("its source was lost as soon as it was there")
        return worker

    def _candidates(self, layer: Layer) -> Sequence[str]:
        wanted = self.settings.backend if layer.backend == "auto" else layer.backend
        return ("fanotify", "inotify") if wanted == "auto" else (wanted,)

    def _worker(self, backend: str, layer: Layer) -> Worker:
        """One worker for all layers of a filesystem with fanotify, one for each layer with inotify. Raises as sources do."""
        key: object = (backend, layer.directory.device if backend == "fanotify" else layer.name)
        worker = self._workers.get(key)
        if worker is None:
            worker = self._workers[key] = Worker(self._source(backend), self, name=f"{backend} {layer.name}")
            worker.start()
        return worker

    def _source(self, backend: str) -> Source:
        barrier = os.fsencode(self._barriers.directory)
        if backend == "fanotify":
            return FanotifySource(
                barrier_directory=barrier,
                content=self.settings.content,
                unlimited_queue=self.settings.queue == "unlimited",
            )
        if backend == "inotify":
            return InotifySource(barrier_directory=barrier, content=self.settings.content)
        raise UnsupportedError(
            f"the backend {backend} is not part of this version", remedy="choose fanotify or inotify"
        )

    def _unwatch(self, layer: Layer) -> None:
        if layer.watching is not None:
            layer.watching.cancel()
            layer.watching = None
        if layer.worker is not None:
            worker, layer.worker = layer.worker, None
            worker.submit(partial(worker.source.remove, layer.name))
        self._discard_unused()

    def _discard_unused(self) -> None:
        """End workers that no layer has; nobody waits for them but the end of the daemon."""
        used = {*self._starting, *(layer.worker for layer in self.layers.values())}
        unused = [(key, worker) for key, worker in self._workers.items() if worker not in used]
        for key, _ in unused:
            del self._workers[key]
        self._barriers.keep(self._workers.values())
        for _, worker in unused:
            ending = self._loop.create_task(in_thread(worker.stop, name="end"))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    # ---- what the workers tell (called in their threads) ------------------------------------------------------------

    def batch(self, worker: Worker, batch: Batch) -> None:
        """See `watchd.sources.worker.Sink`."""
        intake = self._intake
        if batch.overflow:
            intake.call(self._overflowed, worker)
        number = intake.next_number()
        suspects = suspects_of(batch.changes) if batch.suspects is None else batch.suspects
        rounds = intake.suspect(suspects, number, batch.read_ns)
        intake.wait_for_room(worker)
        if batch.look is not None:
            batch.changes += batch.look()
        intake.doubt(batch.linked)
        if batch.changes or batch.complete_ns:
            intake.call(self._record, number, worker, batch)
        intake.worked(rounds)
        for moved in batch.moved_in:
            intake.call(self._scan_moved_in, worker, moved)
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

    def _scan_moved_in(self, worker: Worker, moved: MovedIn) -> None:
        for layer in self._layers_of(worker):
            if layer.name == moved.layer:
                self._gaps.moved_in(layer, worker, moved)

    def _source_lost(self, worker: Worker, error: Exception) -> None:
        log.warning("a source was lost: %s", error)
        for layer in self._layers_of(worker):
            self._gaps.desync(layer, "source-lost")
            layer.worker = None
            layer.become("failed", str(error))
            layer.retry_at = 0.0
        self._discard_unused()

    def _unreadable(self, layer: Layer, error: Exception) -> None:
        """A scan of the layer failed."""
        layer.worker = None
        layer.become("failed", str(error))
        layer.retry_at = time.monotonic() + RETRY_S
        self._discard_unused()

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
            await layer.settled.wait()

    def _layers_of(self, worker: Worker) -> list[Layer]:
        return [layer for layer in self.layers.values() if layer.worker is worker]
