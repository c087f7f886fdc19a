"""Keep merged mounts coherent: take in suspects, verify, invalidate, verify again.

A mount is worked on by one thread at a time; what arrives meanwhile is gathered and taken in one go. The first change is acted
on at once, further ones no more often than the mount's budget allows: an invalidation that took t keeps the mount waiting for
t * (1 / budget - 1). A mount with something left stale is looked at again by itself, ever less often, because whoever pins it
may have let go.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from watchd.coherence.handles import Handles
from watchd.coherence.invalidate import invalidate
from watchd.coherence.target import Target
from watchd.coherence.view import Stale, View
from watchd.errors import WatchdError
from watchd.records import Kind

SUSPECTS_MAX = 50_000
"""Beyond so many suspects a mount is invalidated without looking at each of them first; counted as `flooded`."""

STALE_COUNTED_MAX = 1000
"""Verification before an action stops here: that much is stale, and all of it is verified again afterwards."""

ATTEMPTS = 2
"""A name that somebody is looking up at this very moment survives an invalidation, and a change between the two looks of one
comparison makes it seem stale; both are over at the second attempt."""

RECHECK_FIRST_NS = 10_000_000
RECHECK_LAST_NS = 60_000_000_000

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


class Observer(Protocol):
    """Told of every round, in the thread that worked on it; must not block."""

    def round(self, round: Round) -> None:
        """A round ended."""


@dataclass(frozen=True)
class MountState:
    """What is known of a mount now."""

    state: str
    """coherent, stale, failed or observed."""
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
    stale: tuple[Stale, ...] = ()
    error: str = ""
    actions: dict[str, int] = field(default_factory=dict)
    removed: bool = False


@dataclass(frozen=True, slots=True)
class _Task:
    """What one round takes from a mount."""

    suspects: dict[bytes, int]
    must_act: bool
    upto: int
    oldest_ns: int | None
    asked: int


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
        return self._round(mount, task)

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
            state = "failed" if mount.error else "stale" if mount.stale else "coherent"
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
            thread.join()
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
            self._observer.round(self._round(mount, task))

    def _round(self, mount: _Mount, task: _Task) -> Round:
        round, stale = self._work(mount, task)
        with self._condition:
            self._finish(mount, task, round, stale)
        return round

    def _is_quick(self, mount: _Mount) -> bool:
        """Whether a round is short and waits for nobody."""
        return (
            not mount.busy
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

    def _take(self, mount: _Mount) -> _Task:
        task = _Task(mount.suspects, mount.must_act, mount.upto, mount.oldest_ns, mount.rounds_asked)
        mount.suspects, mount.must_act, mount.oldest_ns = {}, False, None
        mount.queued, mount.busy = False, True
        self._delayed.pop(mount, None)
        for stale in mount.stale:
            task.suspects[stale.path] = ANYTHING
        return task

    def _finish(self, mount: _Mount, task: _Task, round: Round, stale: tuple[Stale, ...]) -> None:
        mount.busy = False
        mount.rounds_done = task.asked
        mount.stale, mount.error = stale, round.error
        if round.error:
            self._put_back(mount, task)
        if round.method is not None:
            mount.actions[round.method] = mount.actions.get(round.method, 0) + 1
            mount.last_duration_ns = round.duration_ns
            pause = round.duration_ns / mount.target.budget - round.duration_ns
            mount.not_before_ns = self._clock() + int(pause)
        if mount.rounds_asked > task.asked:
            mount.rounds_asked -= 1
            self._ask(mount)
        elif (stale or round.error) and not mount.removed:
            self._delayed[mount] = max(self._clock() + mount.recheck_ns, mount.not_before_ns)
            mount.recheck_ns = min(mount.recheck_ns * 2, RECHECK_LAST_NS)
        else:
            mount.recheck_ns = RECHECK_FIRST_NS
        self._condition.notify()  # after a round in another thread than ours: there may be something to wait for now
        self._over.notify_all()

    def _put_back(self, mount: _Mount, task: _Task) -> None:
        """Nobody could look: what was suspected is suspected still."""
        self._gather(mount, task.suspects)
        mount.must_act |= task.must_act
        if task.oldest_ns is not None:
            mount.oldest_ns = task.oldest_ns

    def _work(self, mount: _Mount, task: _Task) -> tuple[Round, tuple[Stale, ...]]:
        target = mount.target
        try:
            return work(
                target, self._handles, task.suspects, must_act=task.must_act, upto=task.upto, oldest_ns=task.oldest_ns
            )
        except (WatchdError, OSError) as error:
            known = mount.stale
            failed = Round(target, None, "failed", len(known), len(known), 0, task.upto, None, str(error))
            return failed, known


def work(
    target: Target,
    handles: Handles,
    suspects: Mapping[bytes, int],
    *,
    must_act: bool,
    upto: int = 0,
    oldest_ns: int | None = None,
) -> tuple[Round, tuple[Stale, ...]]:
    """One round on one mount: verify, act if something is stale, verify again. Raises MountError, LayerError, OSError."""
    with View(target, handles) as view:
        before = _some(view, suspects, must_act=must_act, target=target)
        method, duration_ns = None, 0
        stale: tuple[Stale, ...] = before
        if (before or must_act) and not target.observe:
            method, again = "invalidate", suspects
            for _ in range(ATTEMPTS):
                duration_ns += invalidate(view.merged, read_only=target.read_only)
                stale = tuple(view.stale(again, acted=True))
                if not stale:
                    break
                again = {entry.path: suspects[entry.path] for entry in stale}
    latency = None if oldest_ns is None else time.monotonic_ns() - oldest_ns
    result = "stale" if stale else "coherent"
    return Round(target, method, result, len(before), len(stale), duration_ns, upto, latency), stale


def _some(view: View, suspects: Mapping[bytes, int], *, must_act: bool, target: Target) -> tuple[Stale, ...]:
    """What is stale before anything is done; not asked where it makes no difference."""
    if must_act and not target.observe:
        return ()
    if target.renames_directories and suspects:
        return tuple(Stale(path, "replaced") for path in itertools.islice(suspects, 1))
    return tuple(itertools.islice(view.stale(suspects, acted=target.observe), STALE_COUNTED_MAX))
