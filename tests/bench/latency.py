"""`latency`: from a change of a lower until a process on the merged mount sees it, under a light load."""

from __future__ import annotations

import functools
from collections.abc import Callable

from tests.bench.daemon import WatchdFanotify
from tests.bench.loads import light_load
from tests.bench.measure import percentile
from tests.bench.report import WATCHD, Row, Target
from tests.bench.session import Session
from tests.bench.subjects import BareLoop, InotifywaitRemount, Subject, SubjectError

BARE_LOOP = "bare loop"
REMOUNT = "inotifywait | mount -o remount"
SUBJECTS: dict[str, type[Subject]] = {WATCHD: WatchdFanotify, BARE_LOOP: BareLoop, REMOUNT: InotifywaitRemount}

PATIENCE_S = 1.0
P50_TARGET = Target(2.5, is_ratio=True)
P99_TARGET = Target(5.0, is_ratio=True)


def measure(session: Session) -> list[Row]:
    """Percentiles over all rounds; one that was never healed counts as the whole patience."""
    _check_that_nothing_heals_by_itself(session)
    seen = {
        name: session.attempt(f"latency of {name}", functools.partial(_observe, session, kind))
        for name, kind in session.selected(SUBJECTS).items()
    }

    def row(name: str, unit: str, value: Callable[[list[float | None]], float], target: Target) -> Row:
        values = {subject: value(rounds) if rounds else None for subject, rounds in seen.items()}
        return Row("latency", name, unit, values, BARE_LOOP if unit else None, target)

    return [
        row("p50", "ms", lambda rounds: _milliseconds(rounds, 50), P50_TARGET),
        row("p99", "ms", lambda rounds: _milliseconds(rounds, 99), P99_TARGET),
        row(f"not healed in {PATIENCE_S:g} s", "", lambda rounds: rounds.count(None), Target(0)),
    ]


def _milliseconds(rounds: list[float | None], percent: float) -> float:
    return percentile([PATIENCE_S if healed is None else healed for healed in rounds], percent) * 1000


def _observe(session: Session, kind: type[Subject]) -> list[float | None]:
    arena, scale = session.small_arena, session.scale
    load = light_load(arena, rounds=scale.rounds, interval_s=scale.round_interval_s, patience_s=PATIENCE_S)
    with load as rounds, kind(session.workspace, arena):
        return rounds.run()


def _check_that_nothing_heals_by_itself(session: Session) -> None:
    """Without this the figures could be those of a load that never makes anything stale."""
    with light_load(session.small_arena, rounds=3, interval_s=0, patience_s=0.05) as rounds:
        if any(healed is not None for healed in rounds.run()):
            raise SubjectError("the merged mount heals by itself: something else on this host drops its caches")
