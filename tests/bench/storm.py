"""`storm`: thousands of names a second become stale in one mount, for a while; single changes are timed meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Callable

import msgspec

from tests.bench.background import Done, stale_names
from tests.bench.daemon import Watchd, WatchdFanotify
from tests.bench.latency import BARE_LOOP
from tests.bench.loads import Healed, light_load
from tests.bench.measure import cpu_ns, percentile
from tests.bench.report import WATCHD, Row, Target
from tests.bench.session import Session
from tests.bench.subjects import BareLoop, Subject

SUBJECTS: dict[str, type[Subject]] = {WATCHD: WatchdFanotify, BARE_LOOP: BareLoop}
INTERVAL_S = 0.05
PATIENCE_S = 5.0
BUDGET = Target(10.0)
"""In percent of the time, the default of the configuration."""


class Observation(msgspec.Struct, frozen=True):
    """One subject through the storm."""

    rounds: list[Healed]
    load: Done
    cpu_ns: int
    acting_s: float | None


def measure(session: Session) -> list[Row]:
    """One table."""
    seen = {
        name: session.attempt(f"storm with {name}", functools.partial(_observe, session, kind))
        for name, kind in session.selected(SUBJECTS).items()
    }

    def row(name: str, unit: str, value: Callable[[Observation], float | None], target: Target | None = None) -> Row:
        values = {subject: value(one) if one else None for subject, one in seen.items()}
        return Row("storm", name, unit, values, BARE_LOOP, target)

    return [
        row("names made stale", "/s", lambda one: one.load.per_second),
        row("CPU", "%", lambda one: one.cpu_ns / 1e7 / one.load.seconds),
        row("p50 of a change", "ms", lambda one: milliseconds(one.rounds, 50)),
        row("p99 of a change", "ms", lambda one: milliseconds(one.rounds, 99)),
        row("time in invalidations", "%", _acting, BUDGET),
        row(f"not healed in {PATIENCE_S:g} s", "", lambda one: unhealed(one.rounds), Target(0)),
    ]


def milliseconds(rounds: list[Healed], percent: float) -> float:
    """A percentile; a change that was not healed counts as the whole patience."""
    return percentile([PATIENCE_S if one.all_s is None else one.all_s for one in rounds], percent) * 1000


def unhealed(rounds: list[Healed]) -> int:
    """How many changes were not seen in time."""
    return sum(one.all_s is None for one in rounds)


def _acting(one: Observation) -> float | None:
    return None if one.acting_s is None else one.acting_s * 100 / one.load.seconds


def _observe(session: Session, kind: type[Subject]) -> Observation:
    arena, scale = session.small_arena, session.scale
    rounds = max(3, int(scale.storm_s / INTERVAL_S))
    probe = light_load(arena, rounds=rounds, interval_s=INTERVAL_S, patience_s=PATIENCE_S)
    with probe as prepared, kind(session.workspace, arena) as subject:
        before = cpu_ns(subject.process.pid)
        with stale_names(arena, scale.storm_rate) as load:
            healed = prepared.run()
        used = cpu_ns(subject.process.pid) - before
        return Observation(healed, load.done, used, subject.acting_s() if isinstance(subject, Watchd) else None)
