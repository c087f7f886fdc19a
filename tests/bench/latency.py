"""`latency`: from a change of a lower until processes on the merged mounts see it, under a light load.

With several overlays on the lower all of them have the stale name cached, and a change is over when all of them show it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import msgspec

from tests.bench.daemon import WatchdFanotify
from tests.bench.loads import Healed, light_load
from tests.bench.measure import cpu_ns, percentile
from tests.bench.report import WATCHD, Row, Target
from tests.bench.session import Session
from tests.bench.subjects import BareLoop, InotifywaitRemount, Subject, SubjectError

BARE_LOOP = "bare loop"
REMOUNT = "inotifywait | mount -o remount"
SUBJECTS: dict[str, type[Subject]] = {WATCHD: WatchdFanotify, BARE_LOOP: BareLoop, REMOUNT: InotifywaitRemount}

PATIENCE_S = 1.0
P50_TARGET = Target(2.5, is_ratio=True)
P99_TARGET = Target(5.0, is_ratio=True)


class Observation(msgspec.Struct, frozen=True):
    """One subject through all rounds."""

    rounds: list[Healed]
    cpu_ns: int


def measure(session: Session) -> list[Row]:
    """The rows for every number of overlays."""
    return [row for overlays in session.scale.overlays for row in _rows(session, overlays)]


def _rows(session: Session, overlays: int) -> list[Row]:
    """Percentiles over all rounds; one that was never healed counts as the whole patience."""
    _check_that_nothing_heals_by_itself(session, overlays)
    subjects = {name: kind for name, kind in SUBJECTS.items() if overlays == 1 or name != REMOUNT}
    seen = {
        name: session.attempt(
            f"latency of {name} with {overlays} overlays", functools.partial(_observe, session, kind, overlays)
        )
        for name, kind in session.selected(subjects).items()
    }

    def row(name: str, unit: str, value: Callable[[Observation], float], target: Target | None = None) -> Row:
        values = {subject: value(one) if one else None for subject, one in seen.items()}
        return Row("latency", f"{overlays} overlays, {name}", unit, values, BARE_LOOP if unit else None, target)

    rows = [
        row("asked, p50", "ms", lambda one: _milliseconds([healed.asked_s for healed in one.rounds], 50)),
        row("asked, p99", "ms", lambda one: _milliseconds([healed.asked_s for healed in one.rounds], 99)),
    ]
    return [
        *(rows if overlays > 1 else []),
        row("all, p50", "ms", lambda one: _milliseconds([healed.all_s for healed in one.rounds], 50), P50_TARGET),
        row("all, p99", "ms", lambda one: _milliseconds([healed.all_s for healed in one.rounds], 99), P99_TARGET),
        row("CPU per change", "ms", lambda one: one.cpu_ns / 1e6 / len(one.rounds)),
        row(
            f"not healed in {PATIENCE_S:g} s",
            "",
            lambda one: sum(healed.all_s is None for healed in one.rounds),
            Target(0),
        ),
    ]


def _milliseconds(rounds: list[float | None], percent: float) -> float:
    return percentile([PATIENCE_S if healed is None else healed for healed in rounds], percent) * 1000


def _observe(session: Session, kind: type[Subject], overlays: int) -> Observation:
    scale, arena = session.scale, session.workspace.arena(session.scale.small_tree, overlays)
    rounds = scale.rounds if overlays == 1 else scale.rounds_of_many
    load = light_load(arena, rounds=rounds, interval_s=scale.round_interval_s, patience_s=PATIENCE_S)
    with load as prepared, kind(session.workspace, arena) as subject:
        before = cpu_ns(subject.process.pid)
        healed = prepared.run()
        return Observation(healed, cpu_ns(subject.process.pid) - before)


def _check_that_nothing_heals_by_itself(session: Session, overlays: int) -> None:
    """Without this the figures could be those of a load that never makes anything stale."""
    arena = session.workspace.arena(session.scale.small_tree, overlays)
    with light_load(arena, rounds=3, interval_s=0, patience_s=0.05) as rounds:
        if any(healed.asked_s is not None for healed in rounds.run()):
            raise SubjectError("the merged mount heals by itself: something else on this host drops its caches")
