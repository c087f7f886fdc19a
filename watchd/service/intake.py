"""The way of what the workers find: to the engine at once, into the journal in the order in which it was told.

Workers talk to the event loop through one inbox, which is emptied at moments of rest, so that recording does not take the
interpreter from repairing.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from watchd.coherence.engine import Engine
from watchd.coherence.round import ANYTHING, Round
from watchd.journal.writer import Journal
from watchd.metrics import Metrics
from watchd.records import Change, Kind, Via
from watchd.service.layer import Layer
from watchd.sources.base import Suspects
from watchd.sources.worker import Worker

SEQUENCES_KEPT = 4096

ROOM_INTERVAL_S = 0.05

INBOX_MAX = 8
PENDING_MAX = 10_000
"""With more batches waiting for the loop, or more records waiting for the disk, a worker waits before it reads on; what is not
read stays in the kernel's queue, where it is merged."""

_UNSETTLES_DATA = int(Kind.DELETE | Kind.RENAME)
"""Content that was looked for in vain is looked for again, so what is new in a data-only layer makes nothing stale."""


class Intake:
    """The inbox, and which mounts a layer's changes concern."""

    def __init__(
        self, journal: Journal, engine: Engine, metrics: Metrics, *, on_round: Callable[[Round], None]
    ) -> None:
        """`on_round` is told, in the loop's thread, of rounds that were worked on while their changes were collected."""
        self._journal, self._engine, self._metrics, self._on_round = journal, engine, metrics, on_round
        self._routes: dict[str, tuple[str, ...]] = {}
        self._data_routes: dict[str, tuple[str, ...]] = {}
        self._inbox: deque[tuple[Callable[..., object], tuple[object, ...]]] = deque()
        self._taken_in = threading.Event()
        self._closing = False
        self._numbers = itertools.count(1)
        self._sequences: dict[int, int] = {}
        self._loop = asyncio.get_running_loop()

    def reroute(self, layers: Iterable[Layer]) -> None:
        """Which mounts a layer's changes concern was changed."""
        layers = list(layers)
        self._routes = {layer.name: tuple(sorted(layer.devices)) for layer in layers}
        self._data_routes = {layer.name: tuple(layer.data_of) for layer in layers if layer.data_of}

    def close(self) -> None:
        """No worker waits for room any more."""
        self._closing = True

    # ---- in any thread ----------------------------------------------------------------------------------------------

    def next_number(self) -> int:
        """For the next batch."""
        return next(self._numbers)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Have something done in the loop's thread, in the order of the calls, at the next flush."""
        self._inbox.append((function, arguments))

    def flush(self) -> None:
        """See `watchd.sources.worker.Sink`."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the end is near
            self._loop.call_soon_threadsafe(self.take_in)

    def wait_for_room(self, worker: Worker) -> None:
        """In a worker's thread: wait while the loop or the disk cannot follow."""
        while (len(self._inbox) > INBOX_MAX or self._journal.pending > PENDING_MAX) and not self._closing:
            worker.rests()
            self._taken_in.clear()
            self.flush()
            self._taken_in.wait(ROOM_INTERVAL_S)

    def suspect(self, suspects: Suspects, number: int, read_ns: int) -> list[Round]:
        """Tell the engine; returns the rounds that it worked on at once, which are for `worked`."""
        rounds = []
        for name, paths in suspects.items():
            if name in self._data_routes and any(kinds & _UNSETTLES_DATA for kinds in paths.values()):
                self._engine.doubt(self._data_routes[name])  # which names have their content there is not known
            devices = self._routes.get(name)
            if devices and paths and (round := self._engine.suspect(devices, paths, number=number, read_ns=read_ns)):
                rounds.append(round)
        return rounds

    def worked(self, rounds: Iterable[Round]) -> None:
        """Have these rounds recorded, behind the changes that they cover."""
        for round in rounds:
            self.call(self._on_round, round)

    def doubt(self, layers: Iterable[str]) -> None:
        """More may be stale in these layers than is told."""
        for name in layers:
            self._engine.doubt(self._routes.get(name, ()))

    # ---- in the loop's thread ---------------------------------------------------------------------------------------

    def take_in(self) -> None:
        """Do what the workers have told so far."""
        while self._inbox:
            function, arguments = self._inbox.popleft()
            function(*arguments)
        self._taken_in.set()

    def append(self, number: int, changes: Sequence[Change]) -> None:
        """Record the changes of a batch."""
        self._sequences[number] = self._journal.append(changes)
        if len(self._sequences) > SEQUENCES_KEPT:
            self._sequences.pop(next(iter(self._sequences)))
        if changes:
            self._metrics.changes(Counter((change.layer, change.kinds) for change in changes))

    def forget_sequences(self) -> None:
        """The journal has given numbers to records that it lost."""
        self._sequences.clear()

    def sequence_of(self, number: int) -> int:
        """The sequence number of the last change of a batch."""
        return self._sequences.get(number, 0) if number else 0


def suspects_of(changes: Sequence[Change]) -> Suspects:
    """What may be stale because of these changes. What was only written in place is not: reads go to the real file."""
    suspects: dict[str, dict[bytes, int]] = {}
    for change in changes:
        kinds = ANYTHING if change.via == Via.SCAN else change.kinds  # a scan sees the result only
        if kinds != Kind.MODIFY:
            suspects.setdefault(change.layer, {})[change.path] = kinds
    return suspects
