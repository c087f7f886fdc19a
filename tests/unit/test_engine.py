"""The engine with its rounds stepped by hand: who is worked on when, by how many threads, and what is told of it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import pytest

from watchd.coherence import engine as module
from watchd.coherence.actions import Tools
from watchd.coherence.drop_caches import DropCaches
from watchd.coherence.engine import (
    CALM,
    INLINE_DURATION_MAX_NS,
    RECHECK_FIRST_NS,
    RECHECK_LAST_NS,
    REPLACE_AFTER_NS,
    REPLACE_AGAIN_MAX_NS,
    Engine,
)
from watchd.coherence.handles import Handles
from watchd.coherence.ladder import Step
from watchd.coherence.round import ANYTHING, Outcome, Round, Task
from watchd.coherence.target import LayerRoot, Target
from watchd.coherence.view import Stale
from watchd.errors import MountError
from watchd.kernel.namespaces import Courier
from watchd.records import Kind

PATIENCE_S = 30.0
CREATE, ATTRIB = int(Kind.CREATE), int(Kind.ATTRIB)
FOREVER_NS = 1 << 62
HOUR_NS = 3_600_000_000_000
"""More than a test takes, so that nobody wakes before the clock is set forward."""


class Clock:
    """A clock that stands still until it is set forward."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000

    def __call__(self) -> int:
        return self.now_ns


class Call:
    """One round under way. The test says how it ends."""

    def __init__(
        self, target: Target, suspects: Mapping[bytes, int], must_act: bool, upto: int, oldest_ns: int | None
    ) -> None:
        self.target, self.suspects, self.must_act = target, dict(suspects), must_act
        self.upto, self.oldest_ns = upto, oldest_ns
        self.may_replace = False
        self._replaced_by: Target | None = None
        self.thread = threading.current_thread().name
        self._over = threading.Event()
        self._error: Exception | None = None
        self._stale: tuple[Stale, ...] = ()
        self._method: str | None = None
        self._duration_ns = 0

    def end(
        self,
        *stale: bytes,
        method: str | None = None,
        duration_ns: int = 0,
        replaced_by: Target | None = None,
    ) -> None:
        self._replaced_by = replaced_by
        self._stale = tuple(Stale(path, "ghost") for path in stale)
        self._method, self._duration_ns = method, duration_ns
        self._over.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._over.set()

    def result(self) -> Outcome:
        assert self._over.wait(PATIENCE_S), "the test forgot to end a round"
        if self._error:
            raise self._error
        stale = len(self._stale)
        result = "stale" if stale else "coherent"
        steps = ()
        if self._method:
            steps = (Step(self._method, result, stale, stale, self._duration_ns, self._duration_ns),)
        round = Round(self.target, steps, result, stale, stale, self.upto, None, replaced_by=self._replaced_by)
        return Outcome(round, self._stale)


class Stage:
    """An engine, the rounds that it begins, and those that it told of."""

    def __init__(self, threads: int) -> None:
        self.clock = Clock()
        self._calls: SimpleQueue[Call] = SimpleQueue()
        self._begun: list[Call] = []
        self._rounds: SimpleQueue[Round] = SimpleQueue()
        self._threads = threads
        self.brisk_ns = 0

    def start(self) -> None:
        tools = Tools(Handles(), Courier(), DropCaches(0))
        self.engine = Engine(self, tools, threads=self._threads, brisk_ns=self.brisk_ns, clock=self.clock)

    def work(
        self,
        target: Target,
        task: Task,
        tools: Tools,
        *,
        around: Sequence[Target] = (),
        thorough: bool = False,
    ) -> Outcome:
        suspects = {**task.suspects, **{stale.path: ANYTHING for stale in task.stale}}
        call = Call(target, suspects, task.must_act, task.upto, task.oldest_ns)
        call.may_replace = task.may_replace
        self._begun.append(call)
        self._calls.put(call)
        return call.result()

    def round(self, round: Round) -> None:
        self._rounds.put(round)

    def next(self) -> Call:
        return self._calls.get(timeout=PATIENCE_S)

    def told(self) -> Round:
        return self._rounds.get(timeout=PATIENCE_S)

    def close(self) -> None:
        """End the engine, whatever state a failing test left it in."""
        for call in self._begun:
            call.end()
        self.engine.close()

    def is_watched(self) -> bool:
        """Whether a thread waits for something to be due."""
        with self.engine._condition:
            return self.engine._is_watched

    def nothing_under_way(self) -> bool:
        return self._calls.empty()

    def nothing_told(self) -> bool:
        return self._rounds.empty()

    def forward(self, ns: int) -> None:
        """Let time pass, and have the engine look at the clock."""
        with self.engine._condition:
            self.clock.now_ns += ns
            self.engine._condition.notify_all()
            self.engine._over.notify_all()

    def keep(self, device: str = "0:1", **settings: Any) -> None:
        """A mount whose first round is over."""
        self.engine.add(target(device, **settings))
        self.next().end()
        self.told()

    def suspect(self, *paths: bytes, device: str = "0:1", number: int = 1, read_ns: int = 1) -> Round | None:
        return self.engine.suspect([device], dict.fromkeys(paths, CREATE), number=number, read_ns=read_ns)

    def passes_over(self, device: str) -> bool:
        """Whether a mount is left alone although all threads looked for something to do: another one is worked on
        instead, and again, by each of them."""
        for number in range(2 * self._threads):
            self.engine.doubt(["probe"])
            call = self.next()
            call.end()
            self.told()
            if call.target.device == device:
                return False
            assert call.target.device == "probe", number
        return True


def target(device: str = "0:1", *, quick: bool = False, **settings: Any) -> Target:
    """A mount; only a quick one is worked on by whoever tells of changes."""
    return Target(device, b"/m", (b"/m",), (LayerRoot(b"/l", lambda: -1, cache_tells=quick),), lambda: -1, **settings)


@pytest.fixture(params=[4], ids=["4 threads"])
def stage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    stage = Stage(threads=request.param)
    monkeypatch.setattr(module, "work", stage.work)
    stage.start()
    yield stage
    stage.close()


@pytest.fixture
def elsewhere() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def test_a_new_mount_is_invalidated_once_because_nobody_knows_what_it_cached(stage: Stage) -> None:
    stage.engine.add(target())
    call = stage.next()
    assert (call.must_act, call.suspects) == (True, {})
    call.end(method="invalidate")
    assert [step.method for step in stage.told().steps] == ["invalidate"]
    state = stage.engine.state("0:1")
    assert state is not None
    assert (state.state, state.actions) == ("coherent", {"invalidate": 1})


def test_two_threads_never_work_on_one_mount_and_what_arrives_meanwhile_is_one_round(stage: Stage) -> None:
    stage.keep()
    stage.keep("probe")
    stage.suspect(b"a", number=1, read_ns=10)
    first = stage.next()
    for number, path in enumerate([b"b", b"c", b"b"], start=2):
        stage.engine.suspect(["0:1"], {path: CREATE}, number=number, read_ns=10 * number)
    stage.engine.suspect(["0:1"], {b"b": ATTRIB}, number=5, read_ns=50)
    assert stage.passes_over("0:1")
    first.end()
    second = stage.next()
    assert (first.suspects, first.upto, first.oldest_ns) == ({b"a": CREATE}, 1, 10)
    assert (second.suspects, second.upto, second.oldest_ns) == ({b"b": CREATE | ATTRIB, b"c": CREATE}, 5, 20)
    second.end()
    assert [stage.told().upto, stage.told().upto] == [1, 5]
    assert stage.passes_over("0:1")


def test_several_mounts_are_worked_on_at_the_same_time(stage: Stage) -> None:
    devices = ["0:1", "0:2", "0:3", "0:4"]
    for device in devices:
        stage.engine.add(target(device))
    calls = [stage.next() for _ in devices]
    assert sorted(call.target.device for call in calls) == devices
    assert len({call.thread for call in calls}) == len(devices)
    for call in calls:
        call.end()


def test_a_change_of_a_mount_that_is_not_kept_is_nothing(stage: Stage) -> None:
    stage.keep("probe")
    assert stage.suspect(b"a", device="9:9") is None
    stage.engine.doubt(["9:9"])
    assert stage.engine.settle(["9:9"], 0)
    assert stage.engine.state("9:9") is None
    assert stage.passes_over("9:9")


# ---- budget ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "pause_ns"), [(0.5, HOUR_NS), (0.1, 9 * HOUR_NS), (1.0, 0)])
def test_an_invalidation_keeps_the_mount_waiting_in_proportion_to_what_it_cost(
    stage: Stage, budget: float, pause_ns: int
) -> None:
    stage.keep("probe")
    stage.keep(budget=budget)
    stage.suspect(b"a")
    stage.next().end(method="invalidate", duration_ns=HOUR_NS)
    stage.told()
    stage.suspect(b"b")
    if pause_ns:
        stage.forward(pause_ns - HOUR_NS // 2)
        assert stage.passes_over("0:1")
        stage.suspect(b"c")
        assert stage.passes_over("0:1")
        stage.forward(HOUR_NS // 2)
    call = stage.next()
    assert call.suspects.keys() >= {b"b"}
    call.end()


def test_looking_costs_no_budget(stage: Stage) -> None:
    stage.keep()
    for path in (b"a", b"b"):
        stage.suspect(path)
        call = stage.next()
        assert call.suspects == {path: CREATE}
        call.end(duration_ns=1 << 60)
        stage.told()


def test_looking_again_at_a_pinned_name_keeps_to_the_budget(stage: Stage) -> None:
    stage.keep("probe")
    stage.keep(budget=0.1)
    stage.suspect(b"pinned")
    cost_ns = HOUR_NS
    stage.next().end(b"pinned", method="invalidate", duration_ns=cost_ns)
    stage.told()
    stage.suspect(b"other")
    stage.forward(8 * cost_ns)
    assert stage.passes_over("0:1")
    stage.forward(cost_ns)
    call = stage.next()
    assert call.suspects.keys() == {b"pinned", b"other"}
    call.end()


# ---- floods ---------------------------------------------------------------------------------------------------------


def test_a_flood_is_not_looked_at_name_by_name(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SUSPECTS_MAX", 10)
    stage.keep()
    stage.suspect(b"first")
    first = stage.next()
    stage.suspect(*(b"%d" % number for number in range(10)))
    assert stage.engine.flooded == 0
    stage.suspect(b"one too many")
    assert stage.engine.flooded == 1
    first.end()
    flood = stage.next()
    assert (flood.suspects, flood.must_act) == ({}, True)
    flood.end()


def test_doubt_makes_the_next_round_act_once(stage: Stage) -> None:
    stage.keep()
    stage.engine.doubt(["0:1"])
    call = stage.next()
    assert call.must_act
    call.end()
    stage.told()
    stage.suspect(b"a")
    call = stage.next()
    assert not call.must_act
    call.end()


# ---- settle ---------------------------------------------------------------------------------------------------------


def test_settle_waits_for_everything_that_was_told_before(stage: Stage, elsewhere: ThreadPoolExecutor) -> None:
    for device in ("0:1", "0:2"):
        stage.keep(device)
    for device in ("0:1", "0:2"):
        stage.suspect(b"a", device=device)
    calls = {call.target.device: call for call in (stage.next(), stage.next())}
    stage.suspect(b"b", device="0:1")
    waiting = waiters(stage.engine._over)
    settled = elsewhere.submit(stage.engine.settle, ["0:1", "0:2"], FOREVER_NS)
    waiting(1)
    calls["0:2"].end()
    calls["0:1"].end()
    last = stage.next()
    assert last.suspects == {b"b": CREATE}
    assert not settled.done()
    last.end()
    assert settled.result(timeout=PATIENCE_S) is True


def test_settle_does_not_wait_for_what_is_told_after_it(stage: Stage, elsewhere: ThreadPoolExecutor) -> None:
    stage.keep()
    stage.suspect(b"a")
    first = stage.next()
    waiting = waiters(stage.engine._over)
    settled = elsewhere.submit(stage.engine.settle, ["0:1"], FOREVER_NS)
    waiting(1)
    stage.suspect(b"b")
    first.end()
    second = stage.next()
    assert settled.result(timeout=PATIENCE_S) is True
    second.end()


@pytest.mark.parametrize("stage", [1], indirect=True, ids=["1 thread"])
def test_who_waits_to_settle_is_not_woken_in_place_of_a_thread(stage: Stage, elsewhere: ThreadPoolExecutor) -> None:
    """Else work would lie about until something else happens."""
    stage.keep("probe")
    stage.keep()
    stage.suspect(b"a")
    stage.next().end(method="invalidate", duration_ns=HOUR_NS)
    stage.told()
    stage.suspect(b"waits for its budget")
    waiting = waiters(stage.engine._over)
    settled = [elsewhere.submit(stage.engine.settle, ["0:1"], FOREVER_NS) for _ in range(4)]
    waiting(4)
    resting = waiters(stage.engine._condition)
    for _ in range(3):
        with stage.engine._condition:
            stage.engine._condition.notify()  # the thread looks for something to do, and is last in line again
        resting(1)
        stage.engine.doubt(["probe"])
        stage.next().end()
        stage.told()
        resting(1)
    stage.forward(100 * HOUR_NS)
    stage.next().end()
    assert all(one.result(timeout=PATIENCE_S) for one in settled)


def test_settle_without_anything_to_wait_for_returns_at_once(stage: Stage) -> None:
    stage.keep()
    assert stage.engine.settle(["0:1"], 0) is True


def test_settle_gives_up_at_its_deadline(stage: Stage) -> None:
    stage.keep()
    stage.suspect(b"a")
    call = stage.next()
    assert stage.engine.settle(["0:1"], stage.clock.now_ns) is False
    call.end()


def test_settle_gives_up_when_the_deadline_comes_while_it_waits(stage: Stage, elsewhere: ThreadPoolExecutor) -> None:
    stage.keep()
    stage.suspect(b"a")
    call = stage.next()
    waiting = waiters(stage.engine._over)
    settled = elsewhere.submit(stage.engine.settle, ["0:1"], stage.clock.now_ns + HOUR_NS)
    waiting(1)
    stage.forward(HOUR_NS)
    assert settled.result(timeout=PATIENCE_S) is False
    call.end()


def test_settle_looks_anew_at_what_is_stale(stage: Stage, elsewhere: ThreadPoolExecutor) -> None:
    stage.keep()
    stage.suspect(b"pinned")
    stage.next().end(b"pinned")
    stage.told()
    settled = elsewhere.submit(stage.engine.settle, ["0:1"], FOREVER_NS)
    call = stage.next()
    assert call.suspects == {b"pinned": ANYTHING}
    call.end()
    assert settled.result(timeout=PATIENCE_S) is True
    state = stage.engine.state("0:1")
    assert state is not None
    assert (state.state, state.stale) == ("coherent", ())


def test_a_mount_that_goes_away_keeps_nobody_waiting(stage: Stage, elsewhere: ThreadPoolExecutor) -> None:
    stage.keep()
    stage.suspect(b"a")
    call = stage.next()
    waiting = waiters(stage.engine._over)
    settled = elsewhere.submit(stage.engine.settle, ["0:1"], FOREVER_NS)
    waiting(1)
    stage.engine.remove("0:1")
    assert settled.result(timeout=PATIENCE_S) is True
    assert stage.engine.state("0:1") is None
    call.end()


def test_a_mount_that_went_away_while_it_waited_for_its_budget_is_not_worked_on(stage: Stage) -> None:
    stage.keep("probe")
    stage.keep()
    stage.suspect(b"a")
    stage.next().end(method="invalidate", duration_ns=HOUR_NS)
    stage.told()
    stage.suspect(b"b")
    stage.engine.remove("0:1")
    stage.forward(100 * HOUR_NS)
    assert stage.passes_over("0:1")


# ---- what stays stale, what fails -----------------------------------------------------------------------------------


def test_what_stays_stale_is_looked_at_again_ever_less_often(stage: Stage) -> None:
    stage.keep("probe")
    stage.keep()
    stage.suspect(b"pinned")
    stage.next().end(b"pinned")
    stage.told()
    interval_ns = RECHECK_FIRST_NS
    for _ in range(16):
        stage.forward(interval_ns - 1)
        assert stage.passes_over("0:1")
        stage.forward(1)
        call = stage.next()
        assert call.suspects == {b"pinned": ANYTHING}
        call.end(b"pinned")
        stage.told()
        interval_ns = min(interval_ns * 2, RECHECK_LAST_NS)
    assert interval_ns == RECHECK_LAST_NS
    state = stage.engine.state("0:1")
    assert state is not None
    assert (state.state, state.stale) == ("stale", (Stale(b"pinned", "ghost"),))


def test_who_keeps_watch_learns_of_what_another_thread_has_put_off(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.keep()
    monkeypatch.setattr(stage.engine, "_clock", time.monotonic_ns)  # nobody sets it forward, so nobody is woken by that
    stage.engine.doubt(["0:1"])
    call = stage.next()
    while not stage.is_watched():  # by a thread that knows of nothing that is due
        os.sched_yield()
    call.end(b"pinned")
    stage.next().end()  # comes by itself


def test_once_it_was_let_go_it_is_left_alone(stage: Stage) -> None:
    stage.keep("probe")
    stage.keep()
    stage.suspect(b"pinned")
    stage.next().end(b"pinned")
    stage.told()
    stage.forward(RECHECK_FIRST_NS)
    stage.next().end()
    stage.told()
    stage.forward(10 * RECHECK_LAST_NS)
    assert stage.passes_over("0:1")
    stage.suspect(b"pinned")
    stage.next().end(b"pinned")
    stage.told()
    stage.forward(RECHECK_FIRST_NS)
    stage.next().end()


def held_until_replaced(stage: Stage, number: int) -> int:
    """Nanoseconds that something is held in a mount until that may be replaced, which it is then."""
    stage.suspect(b"pinned", device=f"0:{number}")
    stage.next().end(b"pinned")
    stage.told()
    stale_since_ns, interval_ns = stage.clock.now_ns, RECHECK_FIRST_NS
    while True:
        stage.forward(interval_ns)
        interval_ns = min(interval_ns * 2, RECHECK_LAST_NS)
        call = stage.next()
        if call.may_replace:
            heir = target(f"0:{number + 1}")
            call.end(method="replace", replaced_by=heir)
            stage.told()
            stage.keep(heir.device)
            return stage.clock.now_ns - stale_since_ns
        call.end(b"pinned")
        stage.told()


def test_a_name_that_is_pinned_again_and_again_has_its_mount_replaced_ever_less_often(stage: Stage) -> None:
    stage.keep()
    held_ns = [held_until_replaced(stage, number) for number in range(1, 15)]
    for number, ns in enumerate(held_ns):
        assert ns >= min(REPLACE_AFTER_NS << number, REPLACE_AGAIN_MAX_NS), number
    assert held_ns[0] < 2 * REPLACE_AFTER_NS
    stage.forward((CALM + 1) * REPLACE_AGAIN_MAX_NS)
    assert held_until_replaced(stage, 15) == held_ns[0]


def test_looking_again_and_again_at_a_busy_mount_piles_nothing_up(stage: Stage) -> None:
    stage.keep()
    for _ in range(100):
        stage.suspect(b"pinned")
        stage.next().end(b"pinned")
        stage.told()
    assert len(stage.engine._delayed) == 1


def test_a_round_that_fails_loses_no_suspect(stage: Stage) -> None:
    """Else the mount would be called coherent although nobody ever looked at them."""
    stage.keep()
    stage.engine.doubt(["0:1"])
    failing = stage.next()
    stage.engine.suspect(["0:1"], {b"meanwhile": CREATE}, number=8, read_ns=80)
    failing.fail(MountError("frozen"))
    assert stage.told().result == "failed"
    again = stage.next()
    assert again.must_act
    again.end()
    stage.told()

    stage.suspect(b"a", number=9, read_ns=90)
    stage.next().fail(MountError("frozen"))
    assert stage.told().error == "frozen"
    state = stage.engine.state("0:1")
    assert state is not None
    assert (state.state, state.error) == ("failed", "frozen")
    stage.forward(RECHECK_FIRST_NS)
    again = stage.next()
    assert (again.suspects, again.upto, again.oldest_ns) == ({b"a": CREATE}, 9, 90)
    again.end()
    stage.told()
    state = stage.engine.state("0:1")
    assert state is not None
    assert (state.state, state.error) == ("coherent", "")


def test_what_was_stale_before_a_failure_is_stale_still(stage: Stage) -> None:
    stage.keep()
    stage.suspect(b"pinned")
    stage.next().end(b"pinned")
    stage.told()
    stage.suspect(b"a")
    stage.next().fail(OSError(5, "Input/output error"))
    assert stage.told().stale_after == 1
    state = stage.engine.state("0:1")
    assert state is not None
    assert state.stale == (Stale(b"pinned", "ghost"),)


def test_a_mount_that_is_only_observed_says_so(stage: Stage) -> None:
    stage.keep(observe=True)
    state = stage.engine.state("0:1")
    assert state is not None
    assert state.state == "observed"
    stage.suspect(b"a")
    stage.next().end(b"a")
    stage.told()
    state = stage.engine.state("0:1")
    assert state is not None
    assert state.state == "stale"


def test_a_mount_that_is_seen_elsewhere_is_opened_there_from_then_on(stage: Stage) -> None:
    stage.keep()
    elsewhere = target(read_only=True)
    stage.engine.retarget(elsewhere)
    stage.suspect(b"a")
    call = stage.next()
    assert call.target is elsewhere
    call.end()


# ---- rounds in the thread that tells --------------------------------------------------------------------------------


def test_a_quick_mount_is_worked_on_by_whoever_tells_and_the_observer_is_not_told(
    stage: Stage, elsewhere: ThreadPoolExecutor
) -> None:
    stage.keep(quick=True)
    returned = elsewhere.submit(stage.suspect, b"a", number=3)
    call = stage.next()
    assert not call.thread.startswith("coherence-")
    call.end(method="invalidate", duration_ns=1)
    round = returned.result(timeout=PATIENCE_S)
    assert round is not None
    assert ([step.method for step in round.steps], round.upto) == (["invalidate"], 3)
    assert stage.nothing_told()
    state = stage.engine.state("0:1")
    assert state is not None
    assert state.actions == {"invalidate": 1}


def test_nobody_works_on_a_mount_that_another_thread_works_on(stage: Stage, elsewhere: ThreadPoolExecutor) -> None:
    stage.keep(quick=True)
    returned = elsewhere.submit(stage.suspect, b"a")
    inline = stage.next()
    assert stage.suspect(b"b") is None
    assert stage.nothing_under_way()
    inline.end()
    assert returned.result(timeout=PATIENCE_S) is not None
    call = stage.next()
    assert call.thread.startswith("coherence-")
    assert call.suspects == {b"b": CREATE}
    call.end()
    stage.told()


def test_a_round_that_is_asked_for_while_one_runs_inline_is_waited_for(
    stage: Stage, elsewhere: ThreadPoolExecutor
) -> None:
    stage.keep(quick=True)
    returned = elsewhere.submit(stage.suspect, b"a")
    inline = stage.next()
    waiting = waiters(stage.engine._over)
    settled = elsewhere.submit(stage.engine.settle, ["0:1"], FOREVER_NS)
    waiting(1)
    assert not settled.done()
    inline.end()
    assert settled.result(timeout=PATIENCE_S) is True
    assert returned.result(timeout=PATIENCE_S) is not None


def test_whoever_tells_does_not_wait_for_a_network(stage: Stage) -> None:
    stage.keep(quick=False)
    assert stage.suspect(b"a") is None
    call = stage.next()
    assert call.thread.startswith("coherence-")
    call.end()


def test_whoever_tells_does_not_work_through_many_suspects(stage: Stage) -> None:
    stage.keep(quick=True)
    assert stage.suspect(*(b"%d" % number for number in range(module.INLINE_SUSPECTS_MAX + 1))) is None
    stage.next().end()


def test_whoever_tells_does_not_work_on_several_mounts(stage: Stage) -> None:
    for device in ("0:1", "0:2"):
        stage.keep(device, quick=True)
    assert stage.engine.suspect(["0:1", "0:2"], {b"a": CREATE}, number=1, read_ns=1) is None
    for _ in range(2):
        stage.next().end()


def test_whoever_tells_does_not_wait_for_an_invalidation_that_takes_long(stage: Stage) -> None:
    stage.keep(quick=True, budget=1.0)
    stage.engine.doubt(["0:1"])
    stage.next().end(method="invalidate", duration_ns=INLINE_DURATION_MAX_NS + 1)
    stage.told()
    assert stage.suspect(b"a") is None
    stage.next().end()


def test_whoever_tells_keeps_to_the_budget(stage: Stage) -> None:
    stage.keep(quick=True, budget=0.5)
    stage.engine.doubt(["0:1"])
    stage.next().end(method="invalidate", duration_ns=HOUR_NS)
    stage.told()
    assert stage.suspect(b"a") is None
    assert stage.nothing_under_way()
    stage.forward(HOUR_NS)
    stage.next().end()


# ---- the end --------------------------------------------------------------------------------------------------------


def test_close_finishes_the_rounds_under_way_and_ends_every_thread(stage: Stage, elsewhere: ThreadPoolExecutor) -> None:
    stage.keep()
    stage.suspect(b"a")
    call = stage.next()
    closing = elsewhere.submit(stage.engine.close)
    settled = elsewhere.submit(stage.engine.settle, ["0:1"], FOREVER_NS)
    assert settled.result(timeout=PATIENCE_S) is False
    assert not closing.done()
    call.end()
    closing.result(timeout=PATIENCE_S)
    assert stage.told().result == "coherent"
    assert not any(thread.name.startswith("coherence-") for thread in threading.enumerate())


def waiters(condition: threading.Condition) -> Callable[[int], None]:
    """Count from now on who begins to wait: `waiting(n)` returns once there were n more."""
    begun = threading.Semaphore(0)
    original = condition.wait

    def wait(timeout: float | None = None) -> bool:
        begun.release()
        return original(timeout)

    condition.wait = wait  # type: ignore[method-assign]

    def waiting(count: int) -> None:
        for _ in range(count):
            assert begun.acquire(timeout=PATIENCE_S)

    return waiting


def test_mounts_that_hang_leave_threads_for_the_others_and_say_since_when(stage: Stage) -> None:
    hanging = []
    for number in range(20):
        stage.engine.add(target(f"1:{number}"))
        if number % 4 == 3:
            hanging += [stage.next() for _ in range(4)]
            stage.forward(module.OVERDUE_NS + 1)
    stage.keep("probe")
    waiting = stage.engine.state("1:0")
    assert waiting is not None
    assert waiting.waiting_since_ns is not None
    for call in hanging:
        call.end()
        stage.told()
    answered = stage.engine.state("1:0")
    assert answered is not None
    assert answered.waiting_since_ns is None
    while len(stage.engine._threads) > 5:  # those that are not needed any more end
        os.sched_yield()


def test_no_more_rounds_run_at_a_time_than_there_are_threads_for_while_none_is_overdue(stage: Stage) -> None:
    for number in range(5):
        stage.engine.add(target(f"1:{number}"))
    calls = [stage.next() for _ in range(4)]
    stage.forward(module.OVERDUE_NS)
    assert stage.nothing_under_way()
    calls[0].end()
    calls.append(stage.next())
    for call in calls[1:]:
        call.end()


def test_rounds_that_are_short_do_not_take_the_interpreter_from_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(threads=4)
    stage.brisk_ns = 100
    monkeypatch.setattr(module, "work", stage.work)
    stage.start()
    try:
        for number in range(3):
            stage.engine.add(target(f"1:{number}"))
        first = stage.next()
        stage.forward(99)
        assert stage.nothing_under_way()
        stage.forward(1)
        second = stage.next()
        assert stage.nothing_under_way()
        second.end()
        stage.next().end()
        first.end()
    finally:
        stage.close()
