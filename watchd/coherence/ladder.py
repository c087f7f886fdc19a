"""The ladder: the actions that a mount's configuration allows, one after the other until nothing is stale any more.

Every action is followed by a verification, and what could not be repaired says why. Which rungs are worth trying is decided by
the round (`watchd.coherence.round`); here they are taken in the order given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from watchd.coherence.drop_caches import DropCaches
from watchd.coherence.evict import evict
from watchd.coherence.handles import Handles
from watchd.coherence.invalidate import invalidate, invalidate_around
from watchd.coherence.replace import replace
from watchd.coherence.target import Target
from watchd.coherence.view import Stale, View
from watchd.errors import LayerError, MountError, RefusedError
from watchd.kernel.namespaces import Courier

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
    replaced_by: Target | None = None
    """The mount that stands there now; the old one is nobody's business any more."""
    error: str = ""
    """Why nothing could be done at all; what is stale is then not known."""


@dataclass(frozen=True)
class Tools:
    """What actions on all mounts share."""

    handles: Handles
    courier: Courier
    drop_caches: DropCaches


Verify = Callable[[View], tuple[Stale, ...]]
"""What is stale now, of everything that the round is about."""


class Ladder:
    """One climb for one mount."""

    def __init__(
        self, view: View, target: Target, tools: Tools, *, verify: Verify, around: Sequence[Target] = ()
    ) -> None:
        """`around`: overlays that hold references into this one, outermost first; without dropping those nothing is dropped."""
        self._view, self._target, self._tools, self._verify, self._around = view, target, tools, verify, around
        self._actions: Mapping[str, Callable[[Sequence[Stale]], Mapping[bytes, str]]] = {
            "invalidate": self._invalidate,
            "evict": self._evict,
            "replace": self._replace,
            "drop_caches": self._drop_caches,
        }
        self._replaced_by: Target | None = None

    def climb(self, methods: Sequence[str], stale: Sequence[Stale], *, doubted: bool = False) -> Climb:
        """Take the actions until nothing is stale; with `doubted` at least one is taken, because what is stale is not known.

        Raises LayerError, OSError if it cannot be verified.
        """
        steps: list[Step] = []
        left, unknown = tuple(stale), doubted
        for method in methods:
            if not left and not unknown:
                break
            step, left = self._take(method, left)
            if step is not None:
                steps.append(step)
                unknown = unknown and step.result == "failed"
            if self._replaced_by is not None:
                break
        failed = [step for step in steps if step.result == "failed"]
        error = failed[0].error if failed and len(failed) == len(steps) else ""
        return Climb(tuple(steps), left, self._replaced_by, error)

    def _take(self, method: str, stale: tuple[Stale, ...]) -> tuple[Step | None, tuple[Stale, ...]]:
        """One action and its verification. None: it refused, so nothing was done."""
        before, left = len(stale), stale
        duration_ns = cost_ns = 0
        for _ in range(ATTEMPTS if method == "invalidate" else 1):
            started_ns, started_cpu_ns = time.monotonic_ns(), time.thread_time_ns()
            try:
                reasons = self._actions[method](left)
            except RefusedError as refusal:
                return None, _with_reasons(left, dict.fromkeys((entry.path for entry in left), f"{method}: {refusal}"))
            except (MountError, LayerError, OSError) as error:
                duration_ns += time.monotonic_ns() - started_ns
                return Step(method, "failed", before, len(left), duration_ns, cost_ns, str(error)), left
            duration_ns += time.monotonic_ns() - started_ns
            cost_ns += time.thread_time_ns() - started_cpu_ns
            left = _with_reasons(self._look_again(), reasons)
            if not left:
                break
        if reasons and len(reasons) == before:
            return None, left  # each of them was refused
        return Step(method, "stale" if left else "coherent", before, len(left), duration_ns, cost_ns), left

    def _look_again(self) -> tuple[Stale, ...]:
        if self._replaced_by is None:
            return self._verify(self._view)
        with View(self._replaced_by, self._tools.handles) as view:
            return self._verify(view)

    def _invalidate(self, _: Sequence[Stale]) -> Mapping[bytes, str]:
        invalidate_around(self._around)
        invalidate(self._view.merged, read_only=self._target.read_only)
        return {}

    def _evict(self, stale: Sequence[Stale]) -> Mapping[bytes, str]:
        invalidate_around(self._around)
        reasons = evict(self._view, stale)
        return {path: f"evict: {reason}" for path, reason in reasons.items()}

    def _replace(self, _: Sequence[Stale]) -> Mapping[bytes, str]:
        self._replaced_by = replace(self._target, self._tools.courier)
        return {}

    def _drop_caches(self, _: Sequence[Stale]) -> Mapping[bytes, str]:
        self._tools.drop_caches.drop()
        return {}


def _with_reasons(stale: Sequence[Stale], reasons: Mapping[bytes, str]) -> tuple[Stale, ...]:
    return tuple(
        msgspec.structs.replace(entry, reason=reasons[entry.path]) if entry.path in reasons else entry
        for entry in stale
    )
