"""Which actions a round finds worth trying."""

from __future__ import annotations

from watchd.coherence.pins import Holder
from watchd.coherence.round import ANYTHING, Finding, Task, worth_trying
from watchd.coherence.target import Target
from watchd.coherence.view import Stale

ALL = ("invalidate", "evict", "replace", "drop_caches")
STALE = Stale(b"a", "replaced")
HELD = Stale(b"a", "replaced", (Holder(1, "sh", "open"),))
RECHECK = Task({}, (STALE,), recheck=True, may_replace=True)


def target(*actions: str, observe: bool = False) -> Target:
    return Target("0:1", b"/m", (b"/m",), (), lambda: -1, actions=actions or ALL, observe=observe)


def news(entry: Stale = STALE) -> Finding:
    return Finding((entry,), is_news=True)


def test_whoever_tells_of_changes_is_kept_for_no_longer_than_an_invalidation_takes() -> None:
    task = Task({b"a": ANYTHING})
    assert worth_trying(target(), task, news(), thorough=False) == ("invalidate",)
    assert worth_trying(target("evict"), task, news(), thorough=False) == ()


def test_what_became_stale_just_now_is_not_worth_a_new_mount() -> None:
    assert worth_trying(target(), Task({b"a": ANYTHING}), news(), thorough=True) == (
        "invalidate",
        "evict",
        "drop_caches",
    )


def test_what_is_held_is_not_flushed_again_and_again() -> None:
    assert worth_trying(target(), RECHECK, Finding((HELD,)), thorough=True) == ("evict", "replace")
    assert worth_trying(target(), RECHECK, Finding((STALE,)), thorough=True) == ALL


def test_a_change_that_made_nothing_stale_does_not_flush_for_what_was_stale_before() -> None:
    task = Task({b"other": ANYTHING}, (STALE,))
    assert worth_trying(target(), task, Finding((STALE,)), thorough=True) == ()


def test_nothing_is_done_in_mode_observe_nor_where_nothing_is_stale() -> None:
    assert worth_trying(target(observe=True), RECHECK, Finding((STALE,)), thorough=True) == ()
    assert worth_trying(target(), Task({b"a": ANYTHING}), Finding(), thorough=True) == ()


def test_a_mount_in_doubt_is_acted_on_though_nothing_is_known_to_be_stale() -> None:
    assert worth_trying(target(), Task({}, must_act=True), Finding(), thorough=True)[0] == "invalidate"
