"""Keep merged mounts coherent: take in suspects, verify, invalidate, verify again.

A mount is worked on by one thread at a time; what arrives meanwhile is gathered and taken in one go. The first change is acted
on at once, further ones no more often than the mount's budget allows: an invalidation that took t keeps the mount waiting for
t * (1 / budget - 1). A mount with something left stale is looked at again by itself, ever less often, because whoever pins it
may have let go.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from watchd.coherence.handles import Handles
from watchd.coherence.invalidate import invalidate
from watchd.coherence.target import Outer, Target
from watchd.coherence.view import Stale, View
from watchd.errors import MountError, WatchdError
from watchd.records import Kind

log = logging.getLogger(__name__)

SUSPECTS_MAX = 50_000
"""Beyond so many suspects a mount is invalidated without looking at each of them first; counted as `flooded`."""

STALE_COUNTED_MAX = 1000
"""Verification before an action stops here: that much is stale, and all of it is verified again afterwards."""

ATTEMPTS = 2
"""A name that somebody is looking up at this very moment survives an invalidation, and a change between the two looks of one
comparison makes it seem stale; both are over at the second attempt."""

RECHECK_FIRST_NS = 10_000_000
RECHECK_LAST_NS = 60_000_000_000
STOP_TIMEOUT_S = 5.0
_NEVER = 1 << 63

ANYTHING = sum(Kind)
"""`Kind` bits of a path of which nothing is known."""

INLINE_SUSPECTS_MAX = 64
INLINE_DURATION_MAX_NS = 2_000_000
"""Few suspects of a single mount on plain local filesystems, whose last invalidation was quick, are worked on in the thread
that tells of them: waking another one takes as long as the whole round."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round of work on a mount."""

    target: Target
    method: str | None
    """What was done; None if nothing was stale, or in mode observe."""
    result: str
    """coherent, stale or failed."""
    stale_before: int
    stale_after: int
    duration_ns: int
    """Of the action alone."""
    upto: int
    """The greatest batch number covered."""
    latency_ns: int | None
    """From the reading of the oldest event covered to the end of the round."""
    error: str = ""
    cost_ns: int | None = None
    """CPU time of the action, which its budget is charged with: waiting for a processor is no load. None: `duration_ns`."""


class Observer(Protocol):
    """Told of every round, in the thread that worked on it; must not block."""

    def round(self, round: Round) -> None:
        """A round ended."""


@dataclass(frozen=True)
class MountState:
    """What is known of a mount now."""

    state: str
    """coherent, stale, pinned (everything stale is held by somebody), failed or observed."""
    stale: tuple[Stale, ...]
    actions: Mapping[str, int]
    error: str = ""


@dataclass(eq=False)
class _Mount:
    target: Target
    suspects: dict[bytes, int] = field(default_factory=dict)
    must_act: bool = False
    upto: int = 0
    oldest_ns: int | None = None
    rounds_asked: int = 0
    rounds_done: int = 0
    busy: bool = False
    queued: bool = False
    not_before_ns: int = 0
    last_duration_ns: int = 0
    recheck_ns: int = RECHECK_FIRST_NS
    recheck_at_ns: int = _NEVER
    stale: tuple[Stale, ...] = ()
    error: str = ""
    actions: dict[str, int] = field(default_factory=dict)
    removed: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """What one round takes from a mount."""

    suspects: Mapping[bytes, int]
    stale: tuple[Stale, ...] = ()
    """What the last round left stale."""
    must_act: bool = False
    upto: int = 0
    oldest_ns: int | None = None
    asked: int = 0

    @property
    def is_recheck(self) -> bool:
        """Nothing is new: it is only to be seen whether what is stale can be healed by now."""
        return bool(self.stale) and not self.suspects and not self.must_act


class Engine:
    """The mounts that are kept coherent and the threads that do it. All methods may be called from any thread."""

    def __init__(self, observer: Observer, *, threads: int = 4, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """`clock` tells nanoseconds of CLOCK_MONOTONIC."""
        self._observer = observer
        self._clock = clock
        lock = threading.RLock()
        self._condition = threading.Condition(lock)
        """Something to do for the threads."""
        self._over = threading.Condition(lock)
        """A round is over: for those who wait to settle, who must not take a thread's place in line."""
        self._mounts: dict[str, _Mount] = {}
        self._outers: Mapping[str, tuple[Outer, ...]] = {}
        self._ready: deque[_Mount] = deque()
        self._delayed: dict[_Mount, int] = {}
        """Mounts that have to wait, for their budget or to be looked at again -> until when."""
        self._stopping = False
        self._handles = Handles()
        self.flooded = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"coherence-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, target: Target) -> None:
        """Keep this mount coherent from now on; it is invalidated once, since what it cached before is not known."""
        with self._condition:
            self._mounts[target.device] = mount = _Mount(target)
            mount.must_act = True
            self._ask(mount)

    def retarget(self, target: Target) -> None:
        """The mount is seen elsewhere or configured otherwise now."""
        with self._condition:
            if mount := self._mounts.get(target.device):
                mount.target = target

    def nest(self, outers: Mapping[str, tuple[Outer, ...]]) -> None:
        """Which overlays have a lower in the merged mount of which (by the inner one's device)."""
        with self._condition:
            self._outers = outers

    def remove(self, device: str) -> None:
        """The mount is gone."""
        with self._condition:
            if mount := self._mounts.pop(device, None):
                mount.removed = True
                self._delayed.pop(mount, None)
                self._over.notify_all()

    def suspect(
        self, devices: Sequence[str], suspects: Mapping[bytes, int], *, number: int, read_ns: int
    ) -> Round | None:
        """These paths (with `Kind` bits) of these mounts may have become stale; `number` is of the batch that tells, read at
        `read_ns`. Returns the round if it was worked on at once, which the observer is then not told of."""
        with self._condition:
            mounts = [mount for device in devices if (mount := self._mounts.get(device))]
            for mount in mounts:
                self._gather(mount, suspects)
                mount.upto = max(mount.upto, number)
                mount.oldest_ns = read_ns if mount.oldest_ns is None else min(mount.oldest_ns, read_ns)
            if len(mounts) != 1 or not self._is_quick(mounts[0]):
                for mount in mounts:
                    self._ask(mount)
                return None
            mount = mounts[0]
            mount.rounds_asked += 1
            task = self._take(mount)
        return self._round(mount, task, name_holders=False)  # the recheck, which follows soon, names them

    def doubt(self, devices: Iterable[str]) -> None:
        """Anything in these mounts may have become stale, for instance because events were lost."""
        with self._condition:
            for device in devices:
                if mount := self._mounts.get(device):
                    mount.must_act = True
                    self._ask(mount)

    def settle(self, devices: Iterable[str], deadline_ns: int) -> bool:
        """Wait until everything told so far was worked on and what is stale was looked at anew; false at the deadline
        (CLOCK_MONOTONIC)."""
        with self._condition:
            waiting = []
            for device in devices:
                if mount := self._mounts.get(device):
                    if mount.stale or mount.error:
                        self._ask(mount)
                    waiting.append((mount, mount.rounds_asked))
            while any(mount.rounds_done < asked and not mount.removed for mount, asked in waiting):
                remaining = deadline_ns - self._clock()
                if remaining <= 0 or self._stopping:
                    return False
                self._over.wait(remaining / 1e9)
        return True

    def state(self, device: str) -> MountState | None:
        """What is known of a mount; None if it is not kept."""
        with self._condition:
            mount = self._mounts.get(device)
            if mount is None:
                return None
            state = "failed" if mount.error else "coherent"
            if mount.stale and not mount.error:
                state = "pinned" if all(entry.pinned_by for entry in mount.stale) else "stale"
            if mount.target.observe and state == "coherent":
                state = "observed"
            return MountState(state, mount.stale, dict(mount.actions), mount.error)

    def close(self) -> None:
        """Finish the rounds under way and end the threads."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
            self._over.notify_all()
        for thread in self._threads:
            thread.join(STOP_TIMEOUT_S)  # one that hangs on a filesystem ends with the process
        self._handles.expire()

    def _gather(self, mount: _Mount, suspects: Mapping[bytes, int]) -> None:
        if len(mount.suspects) + len(suspects) > SUSPECTS_MAX:
            mount.suspects.clear()
            mount.must_act = True
            self.flooded += 1
            return
        gathered = mount.suspects
        for path, kinds in suspects.items():
            gathered[path] = gathered.get(path, 0) | kinds

    def _ask(self, mount: _Mount) -> None:
        """Have a round on this mount as soon as its budget allows."""
        mount.rounds_asked += 1
        if mount.queued or mount.busy:
            return
        mount.queued = True
        if mount.not_before_ns > self._clock():
            self._delayed[mount] = mount.not_before_ns
        else:
            self._delayed.pop(mount, None)
            self._ready.append(mount)
        self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                mount = self._next()
                if mount is None:
                    return
                task = self._take(mount)
            self._observer.round(self._round(mount, task, name_holders=True))

    def _round(self, mount: _Mount, task: Task, *, name_holders: bool) -> Round:
        round, stale = self._work(mount, task, name_holders=name_holders)
        with self._condition:
            self._finish(mount, task, round, stale)
        return round

    def _is_quick(self, mount: _Mount) -> bool:
        """Whether a round is short and waits for nobody."""
        return (
            not mount.busy
            and mount.target.device not in self._outers
            and not mount.queued
            and mount.not_before_ns <= self._clock()
            and len(mount.suspects) <= INLINE_SUSPECTS_MAX
            and mount.last_duration_ns <= INLINE_DURATION_MAX_NS
            and all(layer.cache_tells for layer in mount.target.layers)
        )

    def _next(self) -> _Mount | None:
        """Wait for a mount that is due; None when stopping."""
        while not self._stopping:
            now = self._clock()
            for mount in [mount for mount, due_ns in self._delayed.items() if due_ns <= now]:
                del self._delayed[mount]
                if not mount.queued:  # time to look again at what was stale
                    mount.queued = True
                    mount.rounds_asked += 1
                    mount.recheck_at_ns = _NEVER
                self._ready.append(mount)
            while self._ready:
                mount = self._ready.popleft()
                if not mount.removed:
                    return mount
            self._rest(now)
        return None

    def _rest(self, now: int) -> None:
        """Wait for something to become due; layers that were used are let go meanwhile."""
        expiry = self._handles.expire(now_ns=now)
        due = [*self._delayed.values(), *([expiry] if expiry else [])]
        self._condition.wait((min(due) - now) / 1e9 if due else None)

    def _take(self, mount: _Mount) -> Task:
        task = Task(mount.suspects, mount.stale, mount.must_act, mount.upto, mount.oldest_ns, mount.rounds_asked)
        mount.suspects, mount.must_act, mount.oldest_ns = {}, False, None
        mount.queued, mount.busy = False, True
        self._delayed.pop(mount, None)
        return task

    def _finish(self, mount: _Mount, task: Task, round: Round, stale: tuple[Stale, ...]) -> None:
        mount.busy = False
        if round.result != "failed":
            self._forward(task, self._outers.get(mount.target.device, ()))
        mount.rounds_done = task.asked
        mount.stale, mount.error = stale, round.error
        if round.result == "failed":
            self._put_back(mount, task)
        if round.method is not None:
            mount.actions[round.method] = mount.actions.get(round.method, 0) + 1
            cost_ns = round.duration_ns if round.cost_ns is None else round.cost_ns
            mount.last_duration_ns = cost_ns
            pause = cost_ns / mount.target.budget - cost_ns
            mount.not_before_ns = self._clock() + int(pause)
        if mount.rounds_asked > task.asked:
            mount.rounds_asked -= 1
            self._ask(mount)
        elif (stale or round.error) and not mount.removed:
            self._recheck_later(mount)
        else:
            mount.recheck_ns, mount.recheck_at_ns = RECHECK_FIRST_NS, _NEVER
        self._condition.notify()  # after a round in another thread than ours: there may be something to wait for now
        self._over.notify_all()

    def _recheck_later(self, mount: _Mount) -> None:
        """Look again at what is stale, at a time that other rounds until then do not put off."""
        if mount.recheck_at_ns == _NEVER:
            mount.recheck_at_ns = self._clock() + mount.recheck_ns
            mount.recheck_ns = min(mount.recheck_ns * 2, RECHECK_LAST_NS)
        self._delayed[mount] = max(mount.recheck_at_ns, mount.not_before_ns)

    def _put_back(self, mount: _Mount, task: Task) -> None:
        """Nobody could look: what was suspected is suspected still."""
        self._gather(mount, task.suspects)
        mount.must_act |= task.must_act
        if task.oldest_ns is not None:
            mount.oldest_ns = task.oldest_ns

    def _forward(self, task: Task, outers: Iterable[Outer]) -> None:
        """What changed in an overlay may be stale in those around it, which can be told only now that it is true itself."""
        for outer in outers:
            mount = self._mounts.get(outer.device)
            if mount is None:
                continue
            if task.must_act or (outer.below is None and task.suspects):
                mount.must_act = True
            translated = {outer.translate(path): kinds for path, kinds in task.suspects.items()}
            self._gather(mount, {path: kinds for path, kinds in translated.items() if path is not None})
            if mount.must_act or mount.suspects:
                mount.upto = max(mount.upto, task.upto)
                mount.oldest_ns = mount.oldest_ns or task.oldest_ns
                self._ask(mount)

    def _around(self, device: str) -> tuple[Target, ...]:
        """The overlays around one, the outermost first."""
        found: dict[str, Target] = {}
        with self._condition:
            pending = [device]
            while pending:
                for outer in self._outers.get(pending.pop(), ()):
                    if (mount := self._mounts.get(outer.device)) and not mount.target.observe:
                        found.pop(outer.device, None)
                        found[outer.device] = mount.target
                        pending.append(outer.device)
        return tuple(reversed(found.values()))

    def _work(self, mount: _Mount, task: Task, *, name_holders: bool) -> tuple[Round, tuple[Stale, ...]]:
        target = mount.target
        try:
            around = self._around(target.device)
            return work(target, self._handles, task, around=around, name_holders=name_holders)
        except Exception as error:  # whatever it is, it concerns this mount only, and its thread goes on
            if not isinstance(error, WatchdError | OSError):
                log.exception("a round on %s failed", target.device)
            known = mount.stale
            failed = Round(
                target, None, "failed", len(known), len(known), 0, task.upto, None, str(error) or repr(error)
            )
            return failed, known


def work(
    target: Target, handles: Handles, task: Task, *, around: Sequence[Target] = (), name_holders: bool = False
) -> tuple[Round, tuple[Stale, ...]]:
    """One round on one mount: verify, act if something is stale, verify again.

    `around`: overlays that hold references into this one, outermost first; without dropping those nothing here is dropped.
    Raises MountError, LayerError, OSError.
    """
    with View(target, handles) as view:
        if task.is_recheck and name_holders:
            held = view.pinned(task.stale)
            if all(entry.pinned_by for entry in held):  # as long as it is held, acting disturbs for nothing
                return _round(task, target, None, len(held), held), held
        known = {entry.path: ANYTHING for entry in task.stale}
        suspects = {**task.suspects, **known}
        before = _some(view, suspects, must_act=task.must_act, target=target)
        method, duration_ns, cost_ns = None, 0, 0
        stale: tuple[Stale, ...] = before
        if before and not (target.observe or task.must_act or task.is_recheck or _any_of(before, task.suspects)):
            # Nothing new: its recheck, which also asks again who holds it, comes by itself, ever less often.
            still = {entry.path for entry in view.stale(known, acted=True)}
            stale = tuple(entry for entry in task.stale if entry.path in still)
            return _round(task, target, None, len(stale), stale), stale
        if (before or task.must_act) and not target.observe:
            method = "invalidate"
            stale, duration_ns, cost_ns = _act(view, target, suspects, around)
        if task.must_act and not target.observe:  # little is cached now, so all of that can be looked at
            told = {entry.path for entry in stale}
            stale += tuple(
                entry for entry in view.stale(dict(view.cached_names()), acted=True) if entry.path not in told
            )
        if stale and name_holders:
            stale = view.pinned(stale)
    return _round(task, target, method, len(before), stale, duration_ns, cost_ns), stale


def _act(
    view: View, target: Target, suspects: Mapping[bytes, int], around: Sequence[Target]
) -> tuple[tuple[Stale, ...], int, int]:
    """Invalidate and verify; returns what is stale still, and the time and the CPU time of the invalidations alone."""
    duration_ns = cost_ns = 0
    stale: tuple[Stale, ...] = ()
    for _ in range(ATTEMPTS):
        started_ns, started_cpu_ns = time.monotonic_ns(), time.thread_time_ns()
        for outer in around:
            _invalidate(outer)
        invalidate(view.merged, read_only=target.read_only)
        duration_ns += time.monotonic_ns() - started_ns
        cost_ns += time.thread_time_ns() - started_cpu_ns
        stale = tuple(view.stale(suspects, acted=True))
        if not stale:
            break
        suspects = {entry.path: suspects[entry.path] for entry in stale}
    return stale, duration_ns, cost_ns


def _invalidate(outer: Target) -> None:
    """One that cannot be had is gone, or fails its own round."""
    with contextlib.suppress(MountError):
        merged = outer.open()
        try:
            invalidate(merged, read_only=outer.read_only)
        finally:
            os.close(merged)


def _any_of(stale: Iterable[Stale], paths: Mapping[bytes, int]) -> bool:
    return any(entry.path in paths for entry in stale)


def _round(
    task: Task,
    target: Target,
    method: str | None,
    before: int,
    stale: Sequence[Stale],
    duration_ns: int = 0,
    cost_ns: int = 0,
) -> Round:
    latency = None if task.oldest_ns is None else time.monotonic_ns() - task.oldest_ns
    result = "stale" if stale else "coherent"
    return Round(target, method, result, before, len(stale), duration_ns, task.upto, latency, cost_ns=cost_ns)


def _some(view: View, suspects: Mapping[bytes, int], *, must_act: bool, target: Target) -> tuple[Stale, ...]:
    """What is stale before anything is done; not asked where it makes no difference."""
    if must_act and not target.observe:
        return ()
    if target.renames_directories and suspects:
        return tuple(Stale(path, "replaced") for path in itertools.islice(suspects, 1))
    return tuple(itertools.islice(view.stale(suspects, acted=target.observe), STALE_COUNTED_MAX))
