"""One round on one mount: verify, act if something is stale, verify again."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import msgspec

from watchd.coherence.actions import Tools, actions_on, replacing
from watchd.coherence.damage import Window, find_damage, remaining
from watchd.coherence.evict import tidy
from watchd.coherence.ladder import Climb, Ladder, Step
from watchd.coherence.replace import clear_up
from watchd.coherence.target import Target
from watchd.coherence.view import STRUCTURE, Stale, View
from watchd.errors import RefusedError
from watchd.records import Kind

ANYTHING = sum(Kind)
"""`Kind` bits of a path of which nothing is known."""

STALE_COUNTED_MAX = 1000
"""Verification before an action stops here: that much is stale, and all of it is verified again afterwards."""

LISTINGS_TRIED_MAX = 4
"""So few directories are tried at once, which mostly saves another round; more wait for it."""

LISTING_SLICE_NS = 5_000_000
"""Comparing listings keeps names of the mount waiting for no longer than this."""


@dataclass(frozen=True, slots=True)
class Task:
    """What one round takes from a mount."""

    suspects: Mapping[bytes, int]
    """Path -> `Kind` bits."""
    stale: tuple[Stale, ...] = ()
    """What the last round left stale."""
    must_act: bool = False
    """Anything may be stale."""
    upto: int = 0
    oldest_ns: int | None = None
    asked: int = 0
    listings: Collection[bytes] = ()
    """Directories in which names came or went before. Their listings are pinned by whoever has read and holds them."""
    lists: bool = False
    """It is time to compare listings."""
    lists_all: bool = False
    """All of them, however long that takes."""
    displaced: str = ""
    """Why a layer's path does not lead to the layer any more."""
    may_replace: bool = False
    """What is stale has been held for long enough to be worth a new mount."""
    recheck: bool = False
    """It is time to see whether what was left stale can be healed by now."""
    untidy: Collection[bytes] = ()
    """Where something that evicting needed is still in the upper."""
    wrong_since_ns: Mapping[bytes, int] = field(default_factory=dict)
    """When what could be written through was verified stale, CLOCK_REALTIME."""
    damage: tuple[Stale, ...] = ()
    """What is known of it."""


@dataclass(frozen=True, slots=True)
class Round:
    """What one round on a mount came to."""

    target: Target
    steps: tuple[Step, ...]
    """What was done; nothing if nothing was stale, or in mode observe."""
    result: str
    """coherent, stale or failed."""
    stale_before: int
    stale_after: int
    upto: int
    """The greatest batch number covered."""
    latency_ns: int | None
    """From the reading of the oldest event covered to the end of the round."""
    error: str = ""
    healed: tuple[bytes, ...] = ()
    """What was stale and is not any more; at most STALE_COUNTED_MAX of them, and none where it was not looked at before."""
    doubted: bool = False
    """The whole mount was invalidated without looking at it first."""
    replaced_by: Target | None = None
    listing_cost_ns: int = 0
    """CPU time of comparing listings."""
    untidy: Collection[bytes] = ()
    """Where something that evicting needed has to stay in the upper for now."""
    new_damage: tuple[Stale, ...] = ()

    @property
    def cost_ns(self) -> int:
        """CPU time of invalidations, which is what the budget is for; the slower actions are taken ever less often anyway."""
        return sum(step.cost_ns for step in self.steps if step.method == "invalidate")


@dataclass(frozen=True, slots=True)
class Finding:
    """What is stale before anything is done."""

    stale: tuple[Stale, ...] = ()
    is_news: bool = False
    """Some of it was not known to be stale."""
    listings: Collection[bytes] = ()
    """To be compared later."""
    listing_cost_ns: int = 0


class Outcome(NamedTuple):
    """All that a round leaves."""

    round: Round
    stale: tuple[Stale, ...]
    damage: tuple[Stale, ...] = ()
    listings: Collection[bytes] = ()
    """Of directories, to be compared later."""


def work(target: Target, task: Task, tools: Tools, *, around: Sequence[Target] = (), thorough: bool = False) -> Outcome:
    """One round.

    `thorough`: it may take its time, so holders are named, listings compared and actions taken that are slower than an
    invalidation. `around`: overlays that hold references into this one, outermost first.
    Raises MountError, LayerError, OSError.
    """
    if task.displaced:
        return _replace_displaced(target, task, tools)
    with View(target, tools.handles) as view:
        found = _find(view, target, task, thorough=thorough)
        damage = _damage(view, target, task, found, thorough=thorough)
        methods = worth_trying(target, task, found, thorough=thorough)
        climb = Climb((), found.stale)
        if methods:
            known = {entry.path: ANYTHING for entry in task.stale}
            about = {**{entry.path: ANYTHING for entry in found.stale}, **task.suspects, **known}
            ladder = Ladder(
                actions_on(view, target, tools, around=around),
                lambda new: _verify(view, about, task) if new is None else _verify_new(new, tools, about, task),
            )
            climb = ladder.climb(methods, found.stale, doubted=task.must_act)
        stale, untidy = _remembering(climb.stale, task.stale), task.untidy
        if thorough and climb.replaced_by is None:
            if stale and (climb.tried or found.is_news):  # else nothing was done since the holders were asked for
                stale = view.pinned(stale)
            untidy = _tidy(view, target, task, climb)
    if climb.replaced_by is not None or (task.must_act and "replace" in target.actions and not target.observe):
        # The view is closed, so a mount that was replaced may be gone now.
        clear_up(climb.replaced_by or target, tools.courier)
    new = tuple(entry for entry in damage if entry not in task.damage)
    round = _outcome(target, task, found, climb, stale, untidy=untidy, new_damage=new)
    return Outcome(round, stale, damage, found.listings)


def _damage(view: View, target: Target, task: Task, found: Finding, *, thorough: bool) -> tuple[Stale, ...]:
    """What was written through stale names; looked for before anything is done to them."""
    still = {entry.path for entry in found.stale}
    windows = {path: Window(since) for path, since in task.wrong_since_ns.items() if path not in task.untidy}
    is_due = thorough or target.copies_metadata or not windows.keys() <= still
    if not (target.has_upper and is_due and (windows or task.damage or target.copies_metadata)):
        return task.damage
    damage = {entry.path: entry for entry in remaining(view, task.damage)}
    suspects = task.suspects if target.copies_metadata else ()
    new = find_damage(view, suspects, windows=windows)
    return (*damage.values(), *(entry for entry in new if entry.path not in damage))


def _find(view: View, target: Target, task: Task, *, thorough: bool) -> Finding:
    if task.must_act:  # not asked where it makes no difference
        return Finding(_everything(view), is_news=True) if target.observe else Finding()
    old = {entry.path: ANYTHING for entry in task.stale}
    known = tuple(view.stale(old, acted=True)) if old else ()
    new = _new(view, target, task)
    listings = _listings(view, target, task)
    new |= {path: Stale(path, "listing") for path in listings.stale if path not in old}
    stale = (*(entry for entry in known if entry.path not in new), *new.values())
    if thorough and stale and not new:
        stale = view.pinned(stale)
    return Finding(stale, bool(new), listings.later, listings.cost_ns)


class _Listings(NamedTuple):
    stale: list[bytes]
    later: Collection[bytes]
    """Directories that are still to be compared."""
    cost_ns: int = 0
    """CPU time."""


def _listings(view: View, target: Target, task: Task) -> _Listings:
    if len(target.layers) == 1:
        return _Listings([], ())
    started_ns = time.thread_time_ns()
    touched = {path.rpartition(b"/")[0] for path, kinds in task.suspects.items() if kinds & STRUCTURE and path}
    if not task.lists:
        few = len(touched) <= LISTINGS_TRIED_MAX
        later = [path for path in touched if view.may_list_from_memory(path)] if few else touched
        return _Listings([], later, time.thread_time_ns() - started_ns)
    stale, pending = [], [*touched, *(path for path in task.listings if path not in touched)]
    while pending and (task.lists_all or time.thread_time_ns() - started_ns < LISTING_SLICE_NS):
        if view.lists_otherwise(path := pending.pop()):
            stale.append(path)
    return _Listings(stale, pending, time.thread_time_ns() - started_ns)


def _new(view: View, target: Target, task: Task) -> dict[bytes, Stale]:
    """What is stale among the suspects; as yet unseen damage counts where an invalidation will come."""
    acts = "invalidate" in target.actions and not target.observe
    if target.renames_directories and acts:
        return {path: Stale(path, "replaced") for path in itertools.islice(task.suspects, 1)}
    stale = view.stale(task.suspects, acted=not acts)
    return {entry.path: entry for entry in itertools.islice(stale, STALE_COUNTED_MAX)}


def _verify_new(target: Target, tools: Tools, suspects: Mapping[bytes, int], task: Task) -> tuple[Stale, ...]:
    with View(target, tools.handles) as view:
        return _verify(view, suspects, task)


def _verify(view: View, suspects: Mapping[bytes, int], task: Task) -> tuple[Stale, ...]:
    stale = {entry.path: entry for entry in view.stale(suspects, acted=True)}
    if task.must_act:  # little is cached now, so all of that can be looked at
        stale = {entry.path: entry for entry in (*_everything(view), *stale.values())}
    return tuple(stale.values())


def _everything(view: View) -> tuple[Stale, ...]:
    return tuple(view.stale(dict(view.cached_names()), acted=True))


def _remembering(stale: tuple[Stale, ...], known: Sequence[Stale]) -> tuple[Stale, ...]:
    """With the reasons why an earlier round could not repair it, where this one did not try."""
    reasons = {(entry.path, entry.kind): entry.reason for entry in known if entry.reason}
    if not reasons:
        return stale
    return tuple(
        entry if entry.reason else msgspec.structs.replace(entry, reason=reasons.get((entry.path, entry.kind), ""))
        for entry in stale
    )


def worth_trying(target: Target, task: Task, found: Finding, *, thorough: bool) -> tuple[str, ...]:
    """Which actions are worth trying."""
    if target.observe or not (found.stale or task.must_act):
        return ()
    if not (found.is_news or task.must_act or task.recheck):
        return ()  # its recheck, which also asks again who holds it, comes by itself, ever less often
    left_out = set()
    if not thorough:
        left_out |= {"evict", "replace", "drop_caches"}
    elif not found.is_news and not task.must_act and all(entry.pinned_by for entry in found.stale):
        left_out |= {"invalidate", "drop_caches"}  # as long as it is held, dropping caches disturbs for nothing
    if not task.may_replace:
        left_out |= {"replace"}
    return tuple(method for method in target.actions if method not in left_out)


def _tidy(view: View, target: Target, task: Task, climb: Climb) -> Collection[bytes]:
    """Take away what evicting left in the upper, also in an earlier life; returns where some of it has to stay."""
    is_due = "evict" in climb.tried or task.must_act or (task.untidy and task.recheck)
    if target.observe or "evict" not in target.actions or not is_due:
        return task.untidy
    try:
        return tuple(tidy(view, drop=task.recheck))
    except RefusedError:  # another watchd is at it
        return task.untidy or (b"",)


def _replace_displaced(target: Target, task: Task, tools: Tools) -> Outcome:
    """The overlay goes on with layers that nobody can get at by path any more: only a new mount helps."""
    layer = Stale(b"", "layer", reason=task.displaced)
    methods = ("replace",) if "replace" in target.actions and not target.observe else ()
    ladder = Ladder(
        replacing(target, tools),
        lambda new: (layer,) if new is None else _verify_new(new, tools, task.suspects, task),
    )
    climb = ladder.climb(methods, (layer,))
    if climb.refusals:
        layer = msgspec.structs.replace(layer, reason="; ".join((task.displaced, *climb.refusals)))
        climb = replace(climb, stale=(layer,))
    found = Finding((layer,))
    return Outcome(_outcome(target, task, found, climb, climb.stale, untidy=task.untidy), climb.stale, task.damage)


def _outcome(
    target: Target,
    task: Task,
    found: Finding,
    climb: Climb,
    stale: Sequence[Stale],
    *,
    untidy: Collection[bytes] = (),
    new_damage: tuple[Stale, ...] = (),
) -> Round:
    still = {entry.path for entry in stale}
    was = dict.fromkeys(entry.path for entry in (*found.stale, *task.stale))
    result = "failed" if climb.error else "stale" if stale else "coherent"
    return Round(
        target,
        climb.steps,
        result,
        len(found.stale),
        len(stale),
        task.upto,
        None if task.oldest_ns is None else time.monotonic_ns() - task.oldest_ns,
        climb.error,
        healed=tuple(path for path in was if path not in still) if not target.observe and not climb.error else (),
        doubted=task.must_act and not target.observe,
        replaced_by=climb.replaced_by,
        listing_cost_ns=found.listing_cost_ns,
        untidy=untidy,
        new_damage=new_damage,
    )
