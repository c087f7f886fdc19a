"""The ladder: actions taken one after the other until nothing is stale any more, each followed by a verification.

Nothing here knows what the actions do (`watchd.coherence.actions`) nor which of them are worth trying
(`watchd.coherence.round`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from watchd.coherence.target import Target
from watchd.coherence.view import Stale
from watchd.errors import LayerError, MountError, NotPermittedError, RefusedError

ATTEMPTS = 2
"""A name that somebody is looking up at this very moment survives an invalidation, and a change between the two looks of one
comparison makes it seem stale; both are over at the second attempt."""


@dataclass(frozen=True, slots=True)
class Step:
    """One action that was taken, and what it came to."""

    method: str
    result: str
    """coherent, stale or failed."""
    stale_before: int
    stale_after: int
    duration_ns: int
    """Of the action alone, without the verification."""
    cost_ns: int = 0
    """CPU time of it, which the mount's budget is charged with: waiting for a processor is no load."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Climb:
    """How far up the ladder it went."""

    steps: tuple[Step, ...]
    stale: tuple[Stale, ...]
    """What is left; those that an action could do nothing about say why."""
    replaced_by: Target | None = None
    """The mount that stands there now; the old one is nobody's business any more."""
    error: str = ""
    """Why nothing could be done at all."""
    refusals: tuple[str, ...] = ()
    """Of actions that did nothing."""
    tried: tuple[str, ...] = ()
    """The actions that were taken, those too that helped nothing and are no step."""


@dataclass(frozen=True, slots=True)
class Done:
    """What an action tells of itself; whether it helped is for the verification to say."""

    refused: Mapping[bytes, str] = field(default_factory=dict)
    """Paths that it could do nothing about, and why."""
    replaced_by: Target | None = None


Action = Callable[[Sequence[Stale]], Done]
"""Told what is stale. Raises RefusedError if nothing was done, MountError, LayerError, NotPermittedError or OSError if it
failed."""

Verify = Callable[[Target | None], tuple[Stale, ...]]
"""What is stale now, of everything that it is about; told what the mount was replaced by. Raises LayerError, OSError."""


@dataclass
class Ladder:
    """The actions that there are, and how to see whether they helped."""

    actions: Mapping[str, Action]
    verify: Verify
    fatal: tuple[type[Exception], ...] = ()
    """Errors of actions that end it, for whoever asked for a single action; else the next one is tried."""

    def climb(self, methods: Sequence[str], stale: Sequence[Stale], *, doubted: bool = False) -> Climb:
        """Take these actions until nothing is stale. `doubted`: what is stale is not known, so one of them has to succeed.

        Raises as `verify`, and what is `fatal`.
        """
        climb = Climb((), tuple(stale))
        for method in methods:
            untouched = all(step.result == "failed" for step in climb.steps)
            if climb.replaced_by is not None or not (climb.stale or (doubted and untouched)):
                break
            climb = dataclasses.replace(self._take(method, climb), tried=(*climb.tried, method))
        errors = [step.error for step in climb.steps]
        return dataclasses.replace(climb, error=errors[0]) if errors and all(errors) else climb

    def _take(self, method: str, climb: Climb) -> Climb:
        """One action and its verification."""
        before, left = len(climb.stale), climb.stale
        duration_ns = cost_ns = 0
        done = Done()
        for _ in range(ATTEMPTS if method == "invalidate" else 1):
            started_ns, started_cpu_ns = time.monotonic_ns(), time.thread_time_ns()
            try:
                done = self.actions[method](left)
            except RefusedError as refusal:
                stale = _refused(method, left, dict.fromkeys(_paths(left), str(refusal)))
                return Climb(climb.steps, stale, refusals=(*climb.refusals, f"{method}: {refusal}"))
            except self.fatal:
                raise
            except (MountError, LayerError, NotPermittedError, OSError) as error:
                duration_ns += time.monotonic_ns() - started_ns
                failed = Step(method, "failed", before, len(left), duration_ns, cost_ns, str(error) or repr(error))
                return Climb((*climb.steps, failed), left, refusals=climb.refusals)
            duration_ns += time.monotonic_ns() - started_ns
            cost_ns += time.thread_time_ns() - started_cpu_ns
            left = _refused(method, self.verify(done.replaced_by), done.refused)
            if not left:
                break
        if before and set(done.refused) >= set(_paths(climb.stale)):
            return Climb(climb.steps, left, refusals=climb.refusals)  # it did nothing about any of them
        step = Step(method, "stale" if left else "coherent", before, len(left), duration_ns, cost_ns)
        return Climb((*climb.steps, step), left, done.replaced_by, refusals=climb.refusals)


def _paths(stale: Sequence[Stale]) -> list[bytes]:
    return [entry.path for entry in stale]


def _refused(method: str, stale: Sequence[Stale], reasons: Mapping[bytes, str]) -> tuple[Stale, ...]:
    return tuple(
        msgspec.structs.replace(entry, reason=f"{method}: {reasons[entry.path]}") if entry.path in reasons else entry
        for entry in stale
    )
