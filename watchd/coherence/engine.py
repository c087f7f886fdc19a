"""Keep merged mounts coherent: take in suspects, and decide when which mount has a round, and in which thread.

What a round does is said in `watchd.coherence.round`.

A mount is worked on by one thread at a time; what arrives meanwhile is gathered and taken in one go. The first change is acted
on at once, further ones no more often than the mount's budget allows: an invalidation that took t keeps the mount waiting for
t * (1 / budget - 1). A mount with something left stale is looked at again by itself, ever less often, because whoever pins it
may have let go.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from watchd.coherence.actions import Tools
from watchd.coherence.round import Outcome, Round, Task, work
from watchd.coherence.target import Outer, Target
from watchd.coherence.view import Stale
from watchd.errors import WatchdError

log = logging.getLogger(__name__)

SUSPECTS_MAX = 50_000
"""Beyond so many suspects a mount is invalidated without looking at each of them first; counted as `flooded`."""

LISTINGS_MAX = 10_000
"""Directories whose listings are still to be compared; beyond so many the mount is doubted as a whole."""

LISTINGS_AFTER_NS = 20_000_000
"""A pinned listing harms less than a wrong name and takes longer to see: it is looked at this long after names came or
went, and no more often than the mount's budget allows."""

HEIRS_MAX = 100
"""Mounts that took the place of others and were not found yet; those that never are must not be remembered for ever."""

REPLACE_AFTER_NS = 50_000_000
"""What is held for less than this is not worth a new mount."""

REPLACE_AGAIN_MAX_NS = 60_000_000_000
CALM = 50
"""Whoever works in a mount notices that it was replaced. So each replacement doubles how long something has to be held before
there is another, up to REPLACE_AGAIN_MAX_NS, and CALM times as long without one begins anew."""

WRITABLE = frozenset({"missing", "ghost", "replaced"})
"""Kinds of stale names through which somebody may do damage."""

RECHECK_FIRST_NS = 10_000_000
RECHECK_LAST_NS = 60_000_000_000
STOP_TIMEOUT_S = 2.0
_NEVER = 1 << 63

OVERDUE_NS = 1_000_000_000
"""A round that takes longer waits for somebody's filesystem: its thread does not count any more, another takes its place."""

BRISK_NS = 20_000_000
"""A round that takes no longer waits for nobody but the interpreter, which two of them would take from each other: 50 mounts of
one lower are healed sooner one by one than by four threads at a time. So it is the only one of its age."""

THREADS_MAX = 256
"""With so many threads, nearly all of them waiting for filesystems, nothing more is begun until one returns."""

INLINE_SUSPECTS_MAX = 64
INLINE_DURATION_MAX_NS = 2_000_000
"""Few suspects of a single mount on plain local filesystems, whose last invalidation was quick, are worked on in the thread
that tells of them: waking another one takes as long as the whole round."""


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
    damage: tuple[Stale, ...] = ()
    """What was written through names that were stale. No harm of caches: a new mount would show it too."""
    waiting_since_ns: int | None = None
    """Since when a round takes longer than OVERDUE_NS; CLOCK_MONOTONIC."""
    displaced: bool = False
    """A layer's path does not lead to the layer; `error` says which."""


@dataclass(eq=False)
class _Mount:
    target: Target
    suspects: dict[bytes, int] = field(default_factory=dict)
    listings: dict[bytes, None] = field(default_factory=dict)
    listings_at_ns: int = 0
    list_all: bool = False
    must_act: bool = False
    displaced: str = ""
    upto: int = 0
    oldest_ns: int | None = None
    rounds_asked: int = 0
    rounds_done: int = 0
    busy: bool = False
    begun_ns: int = 0
    queued: bool = False
    not_before_ns: int = 0
    last_duration_ns: int = 0
    recheck_ns: int = RECHECK_FIRST_NS
    recheck_at_ns: int = _NEVER
    recheck_due: bool = False
    untidy: Collection[bytes] = ()
    wrong_since_ns: dict[bytes, int] = field(default_factory=dict)
    damage: tuple[Stale, ...] = ()
    stale_since_ns: int = 0
    stale: tuple[Stale, ...] = ()
    error: str = ""
    actions: dict[str, int] = field(default_factory=dict)
    replace_after_ns: int = REPLACE_AFTER_NS
    replaced_at_ns: int = 0
    """When it took its predecessor's place; 0 if it had none."""
    removed: bool = False

    def inherit(self, other: _Mount, now_ns: int) -> None:
        """It was put in the place of the other one."""
        self.actions = dict(Counter(self.actions) + Counter(other.actions))
        self.replace_after_ns = min(2 * other.patience_ns(now_ns), REPLACE_AGAIN_MAX_NS)
        self.replaced_at_ns = now_ns

    def patience_ns(self, now_ns: int) -> int:
        """How long something has to be held before this mount is replaced."""
        is_calm = now_ns - self.replaced_at_ns > CALM * self.replace_after_ns
        return REPLACE_AFTER_NS if is_calm else self.replace_after_ns


class Engine:
    """The mounts that are kept coherent and the threads that do it. All methods may be called from any thread."""

    def __init__(
        self,
        observer: Observer,
        tools: Tools,
        *,
        threads: int = 4,
        brisk_ns: int = BRISK_NS,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`clock` tells nanoseconds of CLOCK_MONOTONIC."""
        self._observer, self._tools, self._brisk_ns = observer, tools, brisk_ns
        self._clock = clock
        lock = threading.RLock()
        self._condition = threading.Condition(lock)
        """Something to do: for the one thread that keeps watch."""
        self._reserve = threading.Condition(lock)
        """For the others that have nothing to do: somebody has to keep watch in the place of one that went to work."""
        self._is_watched, self._watched_until_ns = False, _NEVER
        self._over = threading.Condition(lock)
        """A round is over: for those who wait to settle, who must not take a thread's place in line."""
        self._mounts: dict[str, _Mount] = {}
        self._outers: Mapping[str, tuple[Outer, ...]] = {}
        self._ready: deque[_Mount] = deque()
        self._delayed: dict[_Mount, int] = {}
        """Mounts that have to wait, for their budget or to be looked at again -> until when."""
        self._stopping = False
        self._ancestors: dict[str, _Mount] = {}
        """The predecessor of a mount that was put in its place and not found yet."""
        self.flooded = 0
        self._limit = threads
        self._working: set[_Mount] = set()
        """What the threads are at."""
        self._numbers = itertools.count()
        self._threads: set[threading.Thread] = set()
        for _ in range(threads):
            self._start_thread()

    def add(self, target: Target) -> None:
        """Keep this mount coherent from now on; it is invalidated once, since what it cached before is not known."""
        with self._condition:
            self._mounts[target.device] = mount = _Mount(target)
            if ancestor := self._ancestors.pop(target.device, None):
                mount.inherit(ancestor, self._clock())
            mount.must_act = True
            self._ask(mount)
            self._condition.notify()

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
                self._condition.notify()
                return None
            mount = mounts[0]
            mount.rounds_asked += 1
            task = self._take(mount, thorough=False)
        return self._round(mount, task, thorough=False)  # what is left to the recheck, which follows soon, is slow

    def doubt(self, devices: Iterable[str]) -> None:
        """Anything in these mounts may have become stale, for instance because events were lost."""
        with self._condition:
            for device in devices:
                if mount := self._mounts.get(device):
                    mount.must_act = True
                    self._ask(mount)
            self._condition.notify()

    def displace(self, device: str, reason: str) -> bool:
        """Why a layer's path does not lead to the layer that the overlay goes on with; "" if all of them do. Returns whether
        that is new."""
        with self._condition:
            mount = self._mounts.get(device)
            if mount is None or mount.displaced == reason:
                return False
            mount.displaced = reason
            self._ask(mount)
            self._condition.notify()
            return True

    def settle(self, devices: Iterable[str], deadline_ns: int) -> bool:
        """Wait until everything told so far was worked on and what is stale was looked at anew; false at the deadline
        (CLOCK_MONOTONIC)."""
        with self._condition:
            mounts = [mount for device in devices if (mount := self._mounts.get(device))]
            # What was under way may have left listings to be compared.
            return self._settle(mounts, deadline_ns) and (
                not any(mount.listings for mount in mounts) or self._settle(mounts, deadline_ns)
            )

    def _settle(self, mounts: Iterable[_Mount], deadline_ns: int) -> bool:
        waiting = []
        for mount in mounts:
            mount.recheck_due |= bool(mount.stale or mount.untidy)
            mount.listings_at_ns, mount.list_all = 0, True
            if mount.stale or mount.error or mount.listings or mount.untidy or mount.damage:
                self._ask(mount)
            waiting.append((mount, mount.rounds_asked))
        self._condition.notify()
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
            if mount.displaced:
                layer = Stale(b"", "layer", reason=mount.displaced)
                others = tuple(entry for entry in mount.stale if entry.kind != "layer")
                told = [entry for entry in mount.stale if entry.kind == "layer"]
                stale = (*others, *(told or [layer]))
                return MountState("stale", stale, dict(mount.actions), mount.displaced, mount.damage, displaced=True)
            state = "failed" if mount.error else "coherent"
            if mount.stale and not mount.error:
                state = "pinned" if all(entry.pinned_by for entry in mount.stale) else "stale"
            if mount.target.observe and state == "coherent":
                state = "observed"
            overdue = mount.busy and self._clock() - mount.begun_ns > OVERDUE_NS
            since_ns = mount.begun_ns if overdue else None
            actions = dict(mount.actions)
            return MountState(state, mount.stale, actions, mount.error, mount.damage, waiting_since_ns=since_ns)

    def at_rest(self, device: str) -> bool:
        """Whether nothing remains to be done about a mount, or it is not kept."""
        with self._condition:
            mount = self._mounts.get(device)
            return mount is None or (mount.rounds_done >= mount.rounds_asked and not mount.stale and not mount.error)

    def close(self) -> None:
        """Finish the rounds under way and end the threads."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
            self._reserve.notify_all()
            self._over.notify_all()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for thread in list(self._threads):  # one that hangs on a filesystem ends with the process
            thread.join(max(0.0, deadline - time.monotonic()))
        self._tools.handles.expire()

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
        """Have a round on this mount as soon as its budget allows. To be followed by a notification of the threads, unless it
        is one of them that asks."""
        mount.rounds_asked += 1
        if mount.queued or mount.busy:
            return
        mount.queued = True
        if mount.not_before_ns > self._clock():
            self._delayed[mount] = mount.not_before_ns
        else:
            self._delayed.pop(mount, None)
            self._ready.append(mount)

    def _start_thread(self) -> None:
        if len(self._threads) < THREADS_MAX:
            thread = threading.Thread(target=self._run, name=f"coherence-{next(self._numbers)}", daemon=True)
            self._threads.add(thread)
            thread.start()

    @property
    def _spare(self) -> int:
        """How many threads have no mount to work on."""
        return len(self._threads) - len(self._working)

    def _run(self) -> None:
        while True:
            with self._condition:
                mount = self._next()
                if mount is None:
                    self._threads.discard(threading.current_thread())
                    self._reserve.notify()
                    return
                task = self._take(mount, thorough=True)
                self._working.add(mount)
                if not self._spare:
                    self._start_thread()
                elif not self._is_watched:
                    self._reserve.notify()
            self._observer.round(self._round(mount, task, thorough=True))

    def _round(self, mount: _Mount, task: Task, *, thorough: bool) -> Round:
        outcome = self._work(mount, task, thorough=thorough)
        with self._condition:
            self._finish(mount, task, outcome)
            if not thorough and (self._ready or self._delayed):  # in another thread than ours, which do not know of it
                self._condition.notify()
        return outcome.round

    def _is_quick(self, mount: _Mount) -> bool:
        """Whether a round is short and waits for nobody."""
        return (
            not mount.busy
            and mount.target.device not in self._outers
            and not mount.queued
            and not mount.displaced
            and not mount.target.on_server
            and mount.not_before_ns <= self._clock()
            and len(mount.suspects) <= INLINE_SUSPECTS_MAX
            and mount.last_duration_ns <= INLINE_DURATION_MAX_NS
            and all(layer.cache_tells for layer in mount.target.layers)
        )

    def _next(self) -> _Mount | None:
        """Wait for a mount that is due; None when stopping, or when there are threads enough that wait."""
        while not self._stopping and self._spare <= self._limit + 1:
            now = self._clock()
            for mount in [mount for mount, due_ns in self._delayed.items() if due_ns <= now]:
                del self._delayed[mount]
                if not mount.queued:  # time to look again at what was stale
                    mount.queued = True
                    mount.rounds_asked += 1
                if mount.recheck_at_ns <= now:
                    mount.recheck_at_ns, mount.recheck_due = _NEVER, True
                self._ready.append(mount)
            while self._ready and self._has_room(now):
                mount = self._ready.popleft()
                if not mount.removed:
                    return mount
            self._rest(now)
        return None

    def _has_room(self, now: int) -> bool:
        """Whether another round may begin. Those that are overdue take no processor time."""
        ages = [now - mount.begun_ns for mount in self._working]
        return all(age >= self._brisk_ns for age in ages) and sum(age <= OVERDUE_NS for age in ages) < self._limit

    def _rest(self, now: int) -> None:
        """Keep watch until something is due, and let go of layers that were used; or wait until nobody keeps watch."""
        due_ns = self._due(now)
        if self._is_watched:
            if due_ns < self._watched_until_ns:  # who keeps watch does not know of it
                self._condition.notify()
            self._reserve.wait()
            return
        self._is_watched, self._watched_until_ns = True, due_ns
        self._condition.wait((due_ns - now) / 1e9 if due_ns != _NEVER else None)
        self._is_watched = False

    def _due(self, now: int) -> int:
        """When there is something to do next, unless somebody asks for it before."""
        due = [*self._delayed.values(), self._tools.handles.expire(now_ns=now) or _NEVER]
        if self._ready:  # until there is room
            room = (mount.begun_ns + age for mount in self._working for age in (self._brisk_ns, OVERDUE_NS + 1))
            due += [due_ns for due_ns in room if due_ns > now]
        return min(due)

    def _take(self, mount: _Mount, *, thorough: bool) -> Task:
        now = self._clock()
        lists, listings = thorough and mount.listings_at_ns <= now, mount.listings
        if lists:
            mount.listings = {}
        task = Task(
            mount.suspects,
            mount.stale,
            mount.must_act,
            mount.upto,
            mount.oldest_ns,
            mount.rounds_asked,
            listings=listings if lists else (),
            lists=lists,
            lists_all=lists and mount.list_all,
            displaced=mount.displaced,
            may_replace=bool(mount.stale) and now - mount.stale_since_ns >= mount.patience_ns(now),
            recheck=thorough and mount.recheck_due,
            untidy=mount.untidy,
            wrong_since_ns=mount.wrong_since_ns,
            damage=mount.damage,
        )
        mount.suspects, mount.must_act, mount.oldest_ns = {}, False, None
        mount.queued, mount.busy, mount.begun_ns = False, True, now
        mount.recheck_due &= not thorough
        mount.list_all &= not lists
        self._delayed.pop(mount, None)
        return task

    def _finish(self, mount: _Mount, task: Task, outcome: Outcome) -> None:
        round, stale = outcome.round, outcome.stale
        mount.busy = False
        self._working.discard(mount)
        if round.result != "failed" and not task.displaced:
            self._forward(task, self._outers.get(mount.target.device, ()))
        else:
            self._put_back(mount, task)
        self._list_later(mount, outcome.listings)
        mount.rounds_done = task.asked
        mount.stale_since_ns = mount.stale_since_ns if mount.stale else self._clock()
        mount.stale, mount.damage, mount.error, mount.untidy = stale, outcome.damage, round.error, round.untidy
        if round.result != "failed":
            since = mount.wrong_since_ns
            began_ns = time.time_ns() - (self._clock() - mount.begun_ns)
            mount.wrong_since_ns = {e.path: since.get(e.path, began_ns) for e in stale if e.kind in WRITABLE}
        self._charge(mount, task, round)
        if round.replaced_by is not None:
            self._succeed(mount, round.replaced_by)
        elif mount.rounds_asked > task.asked:
            mount.rounds_asked -= 1
            self._ask(mount)
        else:
            self._come_back(mount)
        self._over.notify_all()

    def _list_later(self, mount: _Mount, directories: Collection[bytes]) -> None:
        mount.listings |= dict.fromkeys(directories)
        if len(mount.listings) > LISTINGS_MAX:
            mount.listings.clear()
            mount.must_act = True
            self._ask(mount)
            self.flooded += 1

    def _charge(self, mount: _Mount, task: Task, round: Round) -> None:
        """Make the mount wait for what the round cost."""
        share = 1 / mount.target.budget - 1
        if task.lists:
            mount.listings_at_ns = self._clock() + max(LISTINGS_AFTER_NS, int(round.listing_cost_ns * share))
        for step in round.steps:
            mount.actions[step.method] = mount.actions.get(step.method, 0) + 1
        if round.steps:
            mount.last_duration_ns = round.cost_ns
            mount.not_before_ns = self._clock() + int(round.cost_ns * share)

    def _succeed(self, mount: _Mount, target: Target) -> None:
        """Another mount stands in its place; whoever keeps the books finds it there."""
        if heir := self._mounts.get(target.device):  # found already
            heir.inherit(mount, self._clock())
        else:
            self._ancestors = {target.device: mount, **dict(itertools.islice(self._ancestors.items(), HEIRS_MAX))}
        mount.removed = True
        if self._mounts.get(mount.target.device) is mount:
            del self._mounts[mount.target.device]

    def _come_back(self, mount: _Mount) -> None:
        """Look again at what is stale or untidy, at a time that other rounds until then do not put off, and at listings."""
        if not (mount.stale or mount.error or mount.untidy):
            mount.recheck_ns, mount.recheck_at_ns = RECHECK_FIRST_NS, _NEVER
        elif mount.recheck_at_ns == _NEVER:
            mount.recheck_at_ns = self._clock() + mount.recheck_ns
            mount.recheck_ns = min(mount.recheck_ns * 2, RECHECK_LAST_NS)
        if mount.listings and not mount.listings_at_ns:
            mount.listings_at_ns = self._clock() + LISTINGS_AFTER_NS
        due_ns = min(mount.recheck_at_ns, mount.listings_at_ns if mount.listings else _NEVER)
        if due_ns != _NEVER and not mount.removed:
            self._delayed[mount] = max(due_ns, mount.not_before_ns)

    def _put_back(self, mount: _Mount, task: Task) -> None:
        """Nobody could look: what was suspected is suspected still."""
        self._gather(mount, task.suspects)
        self._list_later(mount, task.listings)
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

    def _work(self, mount: _Mount, task: Task, *, thorough: bool) -> Outcome:
        target = mount.target
        try:
            around = self._around(target.device)
            return work(target, task, self._tools, around=around, thorough=thorough)
        except Exception as error:  # whatever it is, it concerns this mount only, and its thread goes on
            if not isinstance(error, WatchdError | OSError):
                log.exception("a round on %s failed", target.device)
            known = mount.stale
            message = str(error) or repr(error)
            failed = Round(target, (), "failed", len(known), len(known), task.upto, None, message, untidy=mount.untidy)
            return Outcome(failed, known, mount.damage)
