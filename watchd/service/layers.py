"""The layers that are watched: which source watches which, and what the journal may be missing of each.

A layer's life: adopted (a source watches it from now on) -> live. When events may have been lost (overflow, restart, a source
that broke) its desync is recorded at once; then the source recovers, a scan looks for what changed since the journal was last
complete, the mounts over it are invalidated, and the resync is recorded -> live again. There is one path for all of them.

All methods run in the event loop's thread. What the workers tell arrives there in the order in which it happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from watchd.coherence.engine import Engine
from watchd.coherence.round import ANYTHING, Round
from watchd.config.schema import Sources
from watchd.errors import LayerError, UnsupportedError, WatchdError
from watchd.journal.format import LayerMark
from watchd.journal.writer import Journal
from watchd.kernel.files import FileHandle
from watchd.kernel.filesystems import OVERLAYFS_SUPER_MAGIC
from watchd.metrics import Metrics
from watchd.overlay.model import LayerDirectory
from watchd.records import Change, Desync, Kind, Resync, Via
from watchd.service.barriers import Barriers
from watchd.service.names import NameBook
from watchd.service.patience import LIMIT_S, Waiting, in_thread
from watchd.sources.base import Batch, MovedIn, Source, Suspects, WatchedLayer
from watchd.sources.fanotify import FanotifySource
from watchd.sources.inotify import InotifySource
from watchd.sources.scan import changed_since, everything_below
from watchd.sources.worker import Worker

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0
"""So long the last collection before the end may take."""

STUCK_S = 2.0
"""What takes so long is said to be waited for."""

RETRY_S = 5.0
"""A layer that could not be watched is tried again after so long."""

MARK_INTERVAL_NS = 1_000_000_000
MARK_COST_NS = 50_000_000
"""How far each layer is complete is noted in the journal this often at most, the less often the more layers there are; a
restart scans from there."""

MARKS_MAX = 1000
"""Of layers that are not watched any more so many are remembered. One that was forgotten begins anew when it comes back; its
desync then stays open in the journal, which tells readers all the same."""

SEQUENCES_KEPT = 4096

ROOM_INTERVAL_S = 0.05

INBOX_MAX = 8
PENDING_MAX = 10_000
"""With more batches waiting for the loop, or more records waiting for the disk, a worker waits before it reads on; what is not
read stays in the kernel's queue, where it is merged."""

_UNSETTLES_DATA = int(Kind.DELETE | Kind.RENAME)
"""Content that was looked for in vain is looked for again, so what is new in a data-only layer makes nothing stale."""

Key = tuple[int, int, FileHandle | None]


@dataclass(eq=False)
class Layer:
    """A lower layer. Owned by the event loop."""

    name: str
    directory: LayerDirectory
    watched: WatchedLayer
    backend: str
    """What was asked for; `worker.source.backend` is what was got."""
    devices: set[str] = field(default_factory=set)
    """The mounts that it is a lower of."""
    data_of: set[str] = field(default_factory=set)
    """The mounts that it is a data-only layer of."""
    configured: bool = False
    worker: Worker | None = None
    state: str = "scanning"
    reason: str = ""
    complete_ns: int = 0
    desync_seq: int = 0
    scan_again: bool = False
    differences: int = 0
    retry_at: float = 0.0
    watching: asyncio.Task[None] | None = None
    """The attempt to have a source watch it, while it lasts."""
    asked_at: float = 0.0
    """When that began; CLOCK_MONOTONIC, seconds."""
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while nothing is missing that could be had: live or failed."""

    def become(self, state: str, reason: str = "") -> None:
        """Change the state."""
        self.state, self.reason = state, reason
        if state in ("live", "failed"):
            self.settled.set()
        else:
            self.settled.clear()

    def waiting(self, *, longer_than_s: float = STUCK_S) -> Waiting | None:
        """Since when its filesystem gives no answer."""
        since = self.asked_at if self.watching is not None else 0.0 if self.worker is None else self.worker.busy_since
        return Waiting(since) if since and time.monotonic() - since >= longer_than_s else None


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
        self._journal, self._engine, self._metrics = journal, engine, metrics
        self._names, self._on_round = names, on_round
        self._marks: dict[str, LayerMark] = dict(journal.recovered.layers)
        self._barriers = Barriers(barrier_directory)
        self._workers: dict[object, Worker] = {}
        self._starting: list[Worker] = []
        """Asked to watch a layer just now, so not to be discarded though no layer has them yet."""
        self._ending: set[asyncio.Task[None]] = set()
        """Workers that are not needed any more, until they have ended."""
        self._routes: dict[str, tuple[str, ...]] = {}
        self._data_routes: dict[str, tuple[str, ...]] = {}
        self._inbox: deque[tuple[Callable[..., object], tuple[object, ...]]] = deque()
        self._taken_in = threading.Event()
        self._closing = False
        self._numbers = itertools.count(1)
        self._sequences: dict[int, int] = {}
        self._marked_ns = 0
        self._unmarked = False
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
            self._desync(layer, "source-lost")  # while its mark is still kept, so that its return closes this desync
        del self.layers[key_of(layer.directory)]
        self._names.release(layer.name)
        self._unwatch(layer)
        layer.become("failed", "not watched any more")  # for whoever waits for it
        self.reroute()

    def reroute(self) -> None:
        """Which mounts a layer's changes concern was changed."""
        self._routes = {layer.name: tuple(sorted(layer.devices)) for layer in self.layers.values()}
        self._data_routes = {layer.name: tuple(layer.data_of) for layer in self.layers.values() if layer.data_of}

    async def close(self) -> None:
        """Collect what is queued, note how far every layer is complete and end all workers."""
        answering = {layer.worker for layer in self.layers.values() if layer.worker and not layer.waiting()}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._barriers.wait(answering)
        self._closing = True
        self._note_marks()
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
            self._desync(layer, "restart")
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
                self._began(layer, started_ns)
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

    def _began(self, layer: Layer, started_ns: int) -> None:
        """A source watches the layer since `started_ns`; what happened before is looked for if the journal knew it."""
        mark = self._marks.get(layer.name)
        if layer.desync_seq or (mark is not None and mark.path == layer.directory.path):
            if not layer.desync_seq and mark is not None:
                layer.complete_ns, layer.desync_seq = mark.complete_until_ns, mark.open_desync
            self._desync(layer, "restart")
            self._recover(layer)
        else:
            layer.complete_ns = started_ns
            layer.become("live")
            self._engine.doubt(layer.devices)  # mounts that were there before it was watched
            self._unmarked = True
            self._note_marks()

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
        if batch.overflow:
            self._call(self._overflowed, worker)
        number = next(self._numbers)
        suspects = suspects_of(batch.changes) if batch.suspects is None else batch.suspects
        rounds = self._suspect(suspects, number, batch.read_ns)
        self._wait_for_room(worker)
        if batch.look is not None:
            batch.changes += batch.look()
        for name in batch.linked:
            self._engine.doubt(self._routes.get(name, ()))
        if batch.changes or batch.complete_ns:
            self._call(self._record, number, worker, batch)
        for round in rounds:
            self._call(self._on_round, round)
        for moved in batch.moved_in:
            self._call(self._scan_moved_in, worker, moved)
        if batch.barriers:
            self._call(self._barriers.reached, worker, batch.barriers)

    def lost(self, worker: Worker, error: Exception) -> None:
        """See `watchd.sources.worker.Sink`."""
        self._call(self._source_lost, worker, error)

    def flush(self) -> None:
        """See `watchd.sources.worker.Sink`."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the end is near
            self._loop.call_soon_threadsafe(self.take_in)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        """Have something done in the loop's thread, in the order of the calls, at the next flush."""
        self._inbox.append((function, arguments))

    def take_in(self) -> None:
        """Do what the workers have told so far."""
        while self._inbox:
            function, arguments = self._inbox.popleft()
            function(*arguments)
        self._taken_in.set()

    def _wait_for_room(self, worker: Worker) -> None:
        """In a worker's thread: wait while the loop or the disk cannot follow."""
        while (len(self._inbox) > INBOX_MAX or self._journal.pending > PENDING_MAX) and not self._closing:
            worker.rests()
            self._taken_in.clear()
            self.flush()
            self._taken_in.wait(ROOM_INTERVAL_S)

    def _suspect(self, suspects: Suspects, number: int, read_ns: int) -> list[Round]:
        """Tell the engine; returns the rounds that it worked on at once."""
        rounds = []
        for name, paths in suspects.items():
            if name in self._data_routes and any(kinds & _UNSETTLES_DATA for kinds in paths.values()):
                self._engine.doubt(self._data_routes[name])  # which names have their content there is not known
            devices = self._routes.get(name)
            if devices and paths and (round := self._engine.suspect(devices, paths, number=number, read_ns=read_ns)):
                rounds.append(round)
        return rounds

    # ---- records ----------------------------------------------------------------------------------------------------

    def sequence_of(self, number: int) -> int:
        """The sequence number of the last change of a batch."""
        return self._sequences.get(number, 0) if number else 0

    def _record(self, number: int, worker: Worker, batch: Batch) -> None:
        self._append(number, batch.changes)
        self._metrics.events(worker.source.backend, batch.records)
        if batch.complete_ns:
            for layer in self._layers_of(worker):
                if not layer.desync_seq:
                    layer.complete_ns = max(layer.complete_ns, batch.complete_ns)
            self._unmarked = True
        if (
            self._unmarked
            and time.monotonic_ns() - self._marked_ns > MARK_INTERVAL_NS + len(self._marks) * MARK_COST_NS
        ):
            self._note_marks()

    def _append(self, number: int, changes: Sequence[Change]) -> None:
        self._sequences[number] = self._journal.append(changes)
        if len(self._sequences) > SEQUENCES_KEPT:
            self._sequences.pop(next(iter(self._sequences)))
        if changes:
            self._metrics.changes(Counter((change.layer, change.kinds) for change in changes))

    def _note_marks(self) -> None:
        for layer in self.layers.values():
            if layer.complete_ns:
                self._marks.pop(layer.name, None)  # so that the longest gone come first
                self._marks[layer.name] = LayerMark(layer.directory.path, layer.complete_ns, layer.desync_seq)
        while len(self._marks) > max(MARKS_MAX, len(self.layers)):
            del self._marks[next(iter(self._marks))]
        self._journal.note(self._marks)
        self._marked_ns, self._unmarked = time.monotonic_ns(), False

    # ---- losing and finding -----------------------------------------------------------------------------------------

    def _desync(self, layer: Layer, reason: str) -> None:
        """From here on changes of the layer may be missing; said once until it is closed."""
        layer.become("desynced", reason)
        if layer.desync_seq:
            return
        layer.desync_seq = self._journal.append([Desync(time.time_ns(), layer.name, reason)])
        self._metrics.desync(layer.name, reason)
        self._note_marks()
        log.warning("layer %s: changes may have been missed (%s)", layer.name, reason)

    def _overflowed(self, worker: Worker) -> None:
        for layer in self._layers_of(worker):
            scanning = layer.state == "scanning"
            self._desync(layer, "overflow")
            if scanning:
                layer.become("scanning", "overflow")
                layer.scan_again = True
            else:
                self._recover(layer)
        # What was lost may have been the event of a barrier; whoever waits for it waits for the scan now.
        self._barriers.reached_all(worker)

    def _source_lost(self, worker: Worker, error: Exception) -> None:
        log.warning("a source was lost: %s", error)
        for layer in self._layers_of(worker):
            self._desync(layer, "source-lost")
            layer.worker = None
            layer.become("failed", str(error))
            layer.retry_at = 0.0
        self._discard_unused()

    def _recover(self, layer: Layer) -> None:
        """Find what was missed: the source first, so that nothing falls between, then a scan."""
        worker = layer.worker
        assert worker is not None
        layer.become("scanning", layer.reason)
        layer.scan_again = False
        worker.submit(worker.source.recover).add_done_callback(partial(self._recovered, worker))
        worker.scan(
            changed_since(layer.watched, layer.complete_ns),
            partial(self._found, layer),
            lambda error: self._call(self._scanned, layer, worker, error),
        )

    def _recovered(self, worker: Worker, done: Future[None]) -> None:
        """In the worker's thread: a source that cannot recover is lost."""
        error = None if done.cancelled() else done.exception()
        if isinstance(error, Exception):
            self.lost(worker, error)
            self.flush()

    def _scan_moved_in(self, worker: Worker, moved: MovedIn) -> None:
        for layer in self._layers_of(worker):
            if layer.name == moved.layer:
                worker.scan(everything_below(layer.watched, moved.path), partial(self._found, layer), _ignore)

    def _found(self, layer: Layer, changes: list[Change]) -> None:
        """A slice of a scan; in the worker's thread."""
        number = next(self._numbers)
        self._call(self._record_found, layer, number, changes)
        for round in self._suspect(suspects_of(changes), number, time.monotonic_ns()):
            self._call(self._on_round, round)

    def _record_found(self, layer: Layer, number: int, changes: list[Change]) -> None:
        layer.differences += len(changes)
        self._append(number, changes)

    def _scanned(self, layer: Layer, worker: Worker, error: Exception | None) -> None:
        if layer.worker is not worker:
            return
        if error is not None:
            layer.worker = None
            layer.become("failed", str(error))
            layer.retry_at = time.monotonic() + RETRY_S
            self._discard_unused()
            return
        if layer.scan_again:
            self._recover(layer)
            return
        self._engine.doubt(layer.devices | layer.data_of)
        self._journal.append([Resync(time.time_ns(), layer.name, layer.desync_seq, layer.differences)])
        log.info("layer %s: in step again, %d differences", layer.name, layer.differences)
        layer.desync_seq = layer.differences = 0
        layer.become("live")
        self._note_marks()

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


def suspects_of(changes: Sequence[Change]) -> Suspects:
    """What may be stale because of these changes. What was only written in place is not: reads go to the real file."""
    suspects: dict[str, dict[bytes, int]] = {}
    for change in changes:
        kinds = ANYTHING if change.via == Via.SCAN else change.kinds  # a scan sees the result only
        if kinds != Kind.MODIFY:
            suspects.setdefault(change.layer, {})[change.path] = kinds
    return suspects


def key_of(directory: LayerDirectory) -> Key:
    """What makes a layer the same layer."""
    return directory.device, directory.inode, directory.handle


def _ignore(error: Exception | None) -> None:
    if error is not None and not isinstance(error, LayerError):
        log.warning("a directory that was moved in could not be scanned: %s", error)
