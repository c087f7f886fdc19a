"""What the journal may be missing of each layer, and how that is found.

When events may have been lost (overflow, restart, a source that broke) the desync is recorded at once, and when the journal
could not be written as soon as it can; then the source recovers, so that nothing falls between, a scan compares the layer with
what is known of it, the mounts over it are invalidated, and the resync is recorded. There is one path for all of them. A layer
of which nothing is known yet is scanned by times.

All methods run in the event loop's thread where nothing else is said.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

import msgspec

from watchd.coherence.engine import Engine
from watchd.errors import LayerError
from watchd.journal.format import LayerMark
from watchd.journal.known import KnownError
from watchd.journal.writer import Journal
from watchd.metrics import Metrics
from watchd.records import Change, Desync, Resync
from watchd.service.intake import Intake, suspects_of
from watchd.service.knowledge import Knowledge
from watchd.service.layer import Layer
from watchd.sources.base import MovedIn
from watchd.sources.compare import differences, unless_told
from watchd.sources.scan import changed_since, everything_below
from watchd.sources.told import Told
from watchd.sources.worker import Worker

log = logging.getLogger(__name__)

MARK_INTERVAL_NS = 1_000_000_000
MARK_COST_NS = 50_000_000
"""How far each layer is complete is noted in the journal this often at most, the less often the more layers there are; a
restart scans from there."""

MARKS_MAX = 1000
"""Of layers that are not watched any more so many are remembered. One that was forgotten begins anew when it comes back; its
desync then stays open in the journal, which tells readers all the same."""


class Gaps:
    """How far the journal is complete for every layer."""

    def __init__(
        self,
        journal: Journal,
        engine: Engine,
        metrics: Metrics,
        *,
        intake: Intake,
        knowledge: Knowledge,
        watched: Callable[[], Iterable[Layer]],
        lost: Callable[[Worker, Exception], None],
        failed: Callable[[Layer, Exception], None],
    ) -> None:
        """`watched` gives all layers; `lost` is told, in the worker's thread, of a source that cannot recover, `failed` of a
        layer that cannot be read."""
        self._journal, self._engine, self._metrics, self._intake = journal, engine, metrics, intake
        self._knowledge = knowledge
        knowledge.on_lost = self._nothing_known
        self._tasks: set[asyncio.Task[None]] = set()
        self._watched, self._lost, self._failed = watched, lost, failed
        self._marks: dict[str, LayerMark] = dict(journal.recovered.layers)
        self._marked_ns = 0
        self._unmarked = False
        self._untold: set[str] = set()
        """Layers whose desync could not be recorded."""

    def began(self, layer: Layer, started_ns: int, *, unbroken: bool = False) -> None:
        """A source watches the layer since `started_ns`; what happened before is looked for if the journal knew it, unless
        everything that the journal does not know is still to be read (`unbroken`)."""
        mark = self._marks.get(layer.name)
        is_noted = mark is not None and mark.path == layer.directory.path
        layer.since_seq = mark.since_seq if mark is not None and is_noted else self._journal.last_seq
        was_there = is_noted or self._knowledge.knows(layer)
        if unbroken and mark is not None and not mark.open_desync:
            layer.complete_ns = mark.complete_until_ns
            self._live(layer)
            log.info("layer %s: nothing was missed since the restart", layer.name)
        elif layer.desync_seq or was_there:
            if not layer.desync_seq and mark is not None:
                layer.complete_ns, layer.desync_seq = mark.complete_until_ns, mark.open_desync
            self.desync(layer, "restart")
            self._recover(layer)
        else:
            layer.complete_ns = started_ns
            self._live(layer)
            self._engine.doubt(layer.devices)  # mounts that were there before it was watched
            self._unmarked = True
            self.note_marks()

    def complete_until(self, layers: Iterable[Layer], complete_ns: int) -> None:
        """Everything before was recorded for these layers, as far as they have no gap."""
        for layer in layers:
            if not layer.desync_seq and not self._journal.failure:
                layer.complete_ns = max(layer.complete_ns, complete_ns)
        self._unmarked = True

    def note_marks_if_due(self) -> None:
        """Note them now and then."""
        interval_ns = MARK_INTERVAL_NS + len(self._marks) * MARK_COST_NS
        if self._unmarked and time.monotonic_ns() - self._marked_ns > interval_ns:
            self.note_marks()

    def note_marks(self) -> None:
        """Note in the journal how far each layer is complete."""
        watched = list(self._watched())
        for layer in watched:
            if layer.complete_ns:
                self._marks.pop(layer.name, None)  # so that the longest gone come first
                self._marks[layer.name] = LayerMark(
                    layer.directory.path, layer.complete_ns, layer.desync_seq, layer.since_seq
                )
        while len(self._marks) > max(MARKS_MAX, len(watched)):
            del self._marks[next(iter(self._marks))]
        self._journal.note(self._marks)
        self._marked_ns, self._unmarked = time.monotonic_ns(), False

    def desync(self, layer: Layer, reason: str) -> None:
        """From here on changes of the layer may be missing; said once until it is closed."""
        layer.become("desynced", reason)
        self._knowledge.stop_walk(layer)
        if layer.desync_seq:
            return
        if self._journal.failure:
            self._untold.add(layer.name)
        layer.desync_seq = self._journal.append([Desync(time.time_ns(), layer.name, reason)])
        self._metrics.desync(layer.name, reason)
        self.note_marks()
        log.warning("layer %s: changes may have been missed (%s)", layer.name, reason)

    def journal_lost(self) -> None:
        """The journal has failed: changes of every layer are missing from now on."""
        for layer in self._watched():
            if layer.state == "live" and layer.complete_ns:
                layer.become("desynced", "limit")

    def journal_back(self) -> None:
        """The journal is written again: every layer has missed something, and how far it was complete is what is on disk."""
        self._renumber()
        noted = {**self._marks, **self._journal.recovered.layers}
        for layer in self._watched():
            if not layer.complete_ns:
                continue  # it has no records of its own
            mark = noted.get(layer.name)
            if mark is not None and mark.path == layer.directory.path:
                layer.complete_ns = mark.complete_until_ns
            state, layer.desync_seq, layer.differences = (layer.state, layer.reason), 0, 0
            self.desync(layer, "limit")
            if layer.worker is None:
                layer.become(*state)  # it is scanned when it can be watched
            elif state[0] == "scanning":
                layer.become("scanning", "limit")
                layer.scan_again = True
            else:
                self._recover(layer)
            self._untold.discard(layer.name)
        self._tell_of_the_dropped()

    def _renumber(self) -> None:
        """The journal may have begun anew, and numbers with it."""
        last_seq = self._journal.last_seq
        for name, mark in self._marks.items():
            self._marks[name] = msgspec.structs.replace(mark, since_seq=min(mark.since_seq, last_seq))
        for layer in self._watched():
            layer.since_seq = min(layer.since_seq, last_seq)

    def _tell_of_the_dropped(self) -> None:
        """Layers that nobody watches any more, since a time when that could not be recorded."""
        for name in self._untold & self._marks.keys():
            seq = self._journal.append([Desync(time.time_ns(), name, "limit")])
            self._marks[name] = msgspec.structs.replace(self._marks[name], open_desync=seq)
        self._untold.clear()
        self.note_marks()

    def overflowed(self, layers: Iterable[Layer]) -> None:
        """Events of these layers were lost, and their source goes on."""
        for layer in layers:
            scanning = layer.state == "scanning"
            self.desync(layer, "overflow")
            if scanning:
                layer.become("scanning", "overflow")
                layer.scan_again = True
            else:
                self._recover(layer)

    def moved_in(self, layer: Layer, worker: Worker, moved: MovedIn, done: Callable[[], None]) -> None:
        """Tell of everything in a directory that came with contents, and then that it is `done`."""
        arrival: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        layer.arrivals.add(arrival)

        def arrived() -> None:
            if arrival in layer.arrivals:
                layer.arrivals.remove(arrival)
                arrival.set_result(None)
            done()

        def ended(error: Exception | None) -> None:
            if error is not None and not isinstance(error, LayerError):
                log.warning("a directory that was moved in could not be scanned: %s", error)
            self._intake.call(arrived)

        worker.scan(everything_below(layer.watched, moved.path), partial(self._found, layer, None), ended)

    def _recover(self, layer: Layer) -> None:
        """Find what was missed: the source first, so that nothing falls between, then a scan."""
        worker = layer.worker
        assert worker is not None
        layer.become("scanning", layer.reason)
        layer.scan_again = False
        told = Told()

        def recover() -> None:
            worker.source.recover()
            self._knowledge.listen(layer.name, told)

        worker.submit(recover).add_done_callback(partial(self._recovered, layer, worker, told))

    def _recovered(self, layer: Layer, worker: Worker, told: Told, done: Future[None]) -> None:
        """In the worker's thread: a source that cannot recover is lost."""
        error = None if done.cancelled() else done.exception()
        if isinstance(error, Exception):
            self._lost(worker, error)
        else:
            # All that was read before this is recorded before that is called, all after it is in `told`.
            self._intake.call(self._look_soon, layer, worker, told)
        self._intake.flush()

    def _look_soon(self, layer: Layer, worker: Worker, told: Told) -> None:
        self._keep(self._look(layer, worker, told))

    async def _look(self, layer: Layer, worker: Worker, told: Told) -> None:
        """Have the layer scanned."""
        started_ns = time.time_ns()
        tree = None if layer.by_times else await self._knowledge.tree(layer)
        if layer.worker is not worker:
            return
        if tree is None:
            scan = changed_since(layer.watched, layer.complete_ns)
        else:
            scan = unless_told(differences(layer.watched, tree, told=told), told)

        def done(error: Exception | None) -> None:
            self._knowledge.unlisten(layer.name, told)
            self._intake.call(self._scanned, layer, worker, started_ns, error)

        worker.scan(scan, partial(self._found, layer, None if tree is None else told), done)

    def _found(self, layer: Layer, told: Told | None, changes: list[Change]) -> None:
        """A slice of a scan, of which events may have told something just now; in the worker's thread."""
        if told is not None:
            changes = [change for change in changes if change.path not in told.recent]
        number = self._intake.next_number()
        self._intake.call(self._record_found, layer, number, changes)
        self._intake.worked(self._intake.suspect(suspects_of(changes), number, time.monotonic_ns()))

    def _record_found(self, layer: Layer, number: int, changes: list[Change]) -> None:
        layer.differences += len(changes)
        self._intake.append(number, changes)

    def _scanned(self, layer: Layer, worker: Worker, started_ns: int, error: Exception | None) -> None:
        if layer.worker is not worker:
            return
        layer.by_times = isinstance(error, KnownError)
        if isinstance(error, KnownError):
            self._keep(self._knowledge.forget(layer, error))
            self._recover(layer)
            return
        if error is not None:
            self._failed(layer, error)
            return
        if layer.scan_again:
            self._recover(layer)
            return
        self._engine.doubt(layer.devices | layer.data_of)
        if self._journal.failure:
            layer.become("desynced", "limit")
            return
        self._journal.append([Resync(time.time_ns(), layer.name, layer.desync_seq, layer.differences)])
        log.info("layer %s: in step again, %d differences", layer.name, layer.differences)
        layer.desync_seq = layer.differences = 0
        layer.complete_ns = max(layer.complete_ns, started_ns)
        self._live(layer)
        self.note_marks()

    def _live(self, layer: Layer) -> None:
        layer.become("live")
        self._knowledge.walk(layer)

    def _nothing_known(self) -> None:
        for layer in self._watched():
            if layer.state == "live":
                self._knowledge.walk(layer)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it some time."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
