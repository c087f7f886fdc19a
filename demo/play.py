"""One case on one stage: look, change the lower layer, look again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from demo.cases import Case
from demo.daemon import LADDER, Daemon
from demo.stage import Stage
from watchd.errors import WatchdError

PATIENCE_S = 4.0
"""A merged view that is not true by then never will be."""

CLIMB_PATIENCE_S = 15.0
"""What is held is tried again ever less often, and a new mount is the last that is tried."""


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    case: Case
    without: str
    """What the merged view said after the change, without watchd."""
    healed: str
    """What it said with watchd in the end."""
    took_ms: float
    """From the end of the change to the first look that showed the truth, or to the end of all patience."""
    report: str = ""
    """What `watchd sync` says of a pinned name."""
    climbed: str = ""
    """What the merged view said of it in the end where watchd may do more than to invalidate."""
    healed_by: str = ""
    """The action that helped there; a mount that was put in the place of another is invalidated once besides."""
    climb_report: str = ""
    """What `watchd sync` says there, which is nothing if all went well."""

    @property
    def was_stale(self) -> bool:
        """Without watchd, the merged view said something else than the lower layer holds."""
        return self.without != self.case.after

    @property
    def is_true(self) -> bool:
        """With watchd, the merged view says what the lower layer holds."""
        return self.healed == self.case.after

    @property
    def is_good(self) -> bool:
        """As promised: true, or, where something holds on to the old state, reported, and true with the whole ladder."""
        if self.case.pin is None:
            return self.is_true
        return bool(self.report) and self.climbed == self.case.after


def play(case: Case, bare: Stage, kept: Stage, daemon: Daemon) -> Outcome:
    """The case without watchd on one stage, and with it on the other. Raises WatchdError if it cannot be played here."""
    daemon.check()
    with _changed(case, bare):
        without = case.says(bare)
    with _changed(case, kept):
        if case.pin is None:
            return Outcome(case, without, *_look_until_true(case, kept))
        status, words = daemon.sync(kept.merged)
        return Outcome(case, without, case.says(kept), 0.0, words if status == 1 else "")


def climb(outcome: Outcome, ladder: Stage, daemon: Daemon) -> Outcome:
    """What came of a pinned case, played once more where all actions are allowed. Raises WatchdError."""
    case = outcome.case
    before = len(daemon.healings(ladder.merged))
    with _changed(case, ladder):
        said, took_ms = _look_until_true(case, ladder, patience_s=CLIMB_PATIENCE_S)
        status, words = daemon.sync(ladder.merged)  # a mount that was put in the place of another is known by then
        taken = daemon.healings(ladder.merged)[before:]
    return replace(
        outcome,
        climbed=said,
        took_ms=took_ms,
        healed_by=max(taken, key=LADDER.index, default=""),
        climb_report=words if status else "",
    )


@contextlib.contextmanager
def _changed(case: Case, stage: Stage) -> Iterator[None]:
    """The stage after the change, the old state being cached, and held if the case is about that."""
    said = case.says(stage)
    if said != case.before:
        raise WatchdError(f"{case.name}: the merged view says {said!r} before the change, not {case.before!r}")
    with case.pin(stage) if case.pin else contextlib.nullcontext():
        case.change(stage)
        yield


def _look_until_true(case: Case, stage: Stage, *, patience_s: float = PATIENCE_S) -> tuple[str, float]:
    """What the merged view says in the end, and after how many milliseconds."""
    changed = time.monotonic()
    while True:
        time.sleep(case.look_every_s)
        said = case.says(stage)
        elapsed = time.monotonic() - changed
        if said == case.after or elapsed > patience_s:
            return said, elapsed * 1000
