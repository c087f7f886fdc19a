"""One run of the benchmarks: its size, its arenas, its subjects, and what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from tests.bench.arena import Arena, Workspace
from tests.bench.daemon import WatchdFanotify, WatchdInotify
from tests.bench.report import WATCHD
from tests.bench.subjects import BareReader, Inotifywait, Pyinotify, Subject, SubjectError, UnavailableError

T = TypeVar("T")

BARE_READER = "bare reader"
INOTIFYWAIT = "inotifywait"
PYINOTIFY = "pyinotify"
SUBJECTS: dict[str, dict[str, type[Subject]]] = {
    "fanotify": {WATCHD: WatchdFanotify, BARE_READER: BareReader},
    "inotify": {WATCHD: WatchdInotify, INOTIFYWAIT: Inotifywait, PYINOTIFY: Pyinotify},
}
"""By backend: who is measured beside whom."""


class Scale(msgspec.Struct, frozen=True):
    """How much of everything."""

    small_tree: int = 10_000
    tree: int = 100_000
    files: int = 200_000
    rounds: int = 500
    round_interval_s: float = 0.01
    overlays: tuple[int, ...] = (1, 50, 500)
    rounds_of_many: int = 60
    storm_rate: int = 10_000
    storm_s: int = 30
    write_rate: int = 5_000
    create_rate: int = 50_000
    noise_s: int = 5
    neighbour_files: int = 100_000
    neighbour_rate: int = 100
    neighbour_walks: int = 3
    neighbour_turns: int = 3
    starts: int = 3
    audited: int = 1_000_000
    records: int = 10_000_000
    append_s: float = 2.0
    journal_bytes: int = 1 << 30
    journal_segment_bytes: int = 64 << 20
    scanned: int = 1_000_000


SMALL = Scale(
    small_tree=20,
    tree=100,
    files=300,
    rounds=9,
    overlays=(1, 3),
    rounds_of_many=6,
    storm_rate=500,
    storm_s=0,
    write_rate=500,
    create_rate=1000,
    noise_s=0,
    neighbour_files=200,
    neighbour_walks=1,
    neighbour_turns=1,
    starts=1,
    audited=3000,
    records=20_000,
    append_s=0.02,
    journal_bytes=100_000,
    journal_segment_bytes=30_000,
    scanned=3000,
)


class Session:
    """What every benchmark is given."""

    def __init__(self, workspace: Workspace, scale: Scale, *, with_watchd: bool) -> None:
        self.workspace = workspace
        self.scale = scale
        self.with_watchd = with_watchd
        self.notes: list[str] = []
        self.failed = False

    @property
    def small_arena(self) -> Arena:
        """The arena with the smaller tree."""
        return self.workspace.arena(self.scale.small_tree)

    @property
    def arena(self) -> Arena:
        """The arena with the full tree."""
        return self.workspace.arena(self.scale.tree)

    def selected(self, subjects: dict[str, type[Subject]]) -> dict[str, type[Subject]]:
        """The subjects that take part in this run."""
        return {name: kind for name, kind in subjects.items() if self.with_watchd or name != WATCHD}

    def attempt(self, what: str, measurement: Callable[[], T]) -> T | None:
        """Run one measurement. If it cannot be done, the others go on, and the report says why this one is missing."""
        try:
            return measurement()
        except UnavailableError as error:
            self.notes.append(f"{what} not measured: {error}")
        except (SubjectError, OSError) as error:
            self.notes.append(f"{what} FAILED: {error}")
            self.failed = True
        return None
