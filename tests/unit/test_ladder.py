"""The ladder with actions that only pretend: which are taken, in which order, and what is told of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from watchd.coherence.ladder import ATTEMPTS, Climb, Done, Ladder
from watchd.coherence.target import Target
from watchd.coherence.view import Stale
from watchd.errors import MountError, NotPermittedError, RefusedError

METHODS = ("invalidate", "evict", "replace", "drop_caches")
NEW = Target("0:2", b"/m", (b"/m",), (), lambda: -1)


class Mount:
    """Names that are stale, and what each action heals, refuses or fails at."""

    def __init__(self, *stale: bytes) -> None:
        self.stale = set(stale)
        self.taken: list[str] = []
        self.heals: dict[str, set[bytes]] = {}
        self.refuses: dict[str, dict[bytes, str]] = {}
        self.raises: dict[str, Exception] = {}
        self.becomes: Target | None = None
        self.verified: list[Target | None] = []

    def _action(self, method: str) -> Callable[[Sequence[Stale]], Done]:
        def act(stale: Sequence[Stale]) -> Done:
            self.taken.append(method)
            if method in self.raises:
                raise self.raises[method]
            self.stale -= self.heals.get(method, set())
            return Done(self.refuses.get(method, {}), self.becomes if method == "replace" else None)

        return act

    def _verify(self, new: Target | None) -> tuple[Stale, ...]:
        self.verified.append(new)
        return tuple(Stale(path, "replaced") for path in sorted(self.stale))

    def climb(self, *methods: str, doubted: bool = False, fatal: tuple[type[Exception], ...] = ()) -> Climb:
        ladder = Ladder({method: self._action(method) for method in METHODS}, self._verify, fatal)
        stale = () if doubted else tuple(Stale(path, "replaced") for path in sorted(self.stale))
        return ladder.climb(methods or METHODS, stale, doubted=doubted)


def summary(climb: Climb) -> list[tuple[str, str, int, int]]:
    return [(step.method, step.result, step.stale_before, step.stale_after) for step in climb.steps]


def test_it_ends_as_soon_as_nothing_is_stale() -> None:
    mount = Mount(b"a", b"b", b"c")
    mount.heals = {"invalidate": {b"a"}, "evict": {b"b", b"c"}}
    climb = mount.climb()
    assert summary(climb) == [("invalidate", "stale", 3, 2), ("evict", "coherent", 2, 0)]
    assert (climb.stale, climb.error, mount.taken) == ((), "", ["invalidate"] * ATTEMPTS + ["evict"])


def test_only_what_is_configured_is_done() -> None:
    mount = Mount(b"a")
    climb = mount.climb("evict")
    assert (mount.taken, summary(climb)) == (["evict"], [("evict", "stale", 1, 1)])


def test_nothing_is_done_where_nothing_is_stale() -> None:
    mount = Mount()
    assert (mount.climb().steps, mount.taken) == ((), [])


def test_a_refusal_is_no_action_and_says_why_beside_the_entry() -> None:
    mount = Mount(b"a")
    mount.raises = {"replace": RefusedError("index=on is in use")}
    climb = mount.climb("replace")
    assert (climb.steps, climb.error) == ((), "")
    assert climb.stale == (Stale(b"a", "replaced", reason="replace: index=on is in use"),)


def test_what_is_refused_for_every_entry_is_no_action_either() -> None:
    mount = Mount(b"a", b"b")
    mount.refuses = {"evict": {b"a": "too large", b"b": "no upper"}}
    climb = mount.climb("evict")
    assert climb.steps == ()
    assert [entry.reason for entry in climb.stale] == ["evict: too large", "evict: no upper"]


def test_what_is_refused_for_some_is_an_action_for_the_others() -> None:
    mount = Mount(b"a", b"b")
    mount.heals, mount.refuses = {"evict": {b"a"}}, {"evict": {b"b": "too large"}}
    climb = mount.climb("evict")
    assert summary(climb) == [("evict", "stale", 2, 1)]
    assert climb.stale == (Stale(b"b", "replaced", reason="evict: too large"),)


def test_a_failure_is_told_and_the_next_action_tried() -> None:
    mount = Mount(b"a")
    mount.raises, mount.heals = {"invalidate": MountError("frozen")}, {"drop_caches": {b"a"}}
    climb = mount.climb("invalidate", "drop_caches")
    assert summary(climb) == [("invalidate", "failed", 1, 1), ("drop_caches", "coherent", 1, 0)]
    assert (climb.steps[0].error, climb.error) == ("frozen", "")


def test_an_action_that_is_not_permitted_hides_neither_what_was_done_nor_what_is_stale() -> None:
    mount = Mount(b"a", b"b")
    mount.heals = {"invalidate": {b"a"}}
    mount.raises = {"drop_caches": NotPermittedError("read-only")}
    climb = mount.climb("invalidate", "drop_caches")
    assert summary(climb) == [("invalidate", "stale", 2, 1), ("drop_caches", "failed", 1, 1)]
    assert ([entry.path for entry in climb.stale], climb.error) == ([b"b"], "")
    with pytest.raises(NotPermittedError):
        mount.climb("drop_caches", fatal=(NotPermittedError,))


@pytest.mark.parametrize("doubted", [False, True])
def test_when_nothing_could_be_done_the_first_error_is_the_answer(doubted: bool) -> None:
    mount = Mount(b"a")
    mount.raises = {"invalidate": MountError("frozen"), "drop_caches": OSError(13, "Permission denied")}
    assert mount.climb("invalidate", "drop_caches", doubted=doubted).error == "frozen"


def test_a_doubted_mount_is_acted_on_once_though_nothing_is_known_to_be_stale() -> None:
    mount = Mount()
    assert summary(mount.climb(doubted=True)) == [("invalidate", "coherent", 0, 0)]


def test_what_was_put_in_its_place_is_what_is_verified_and_the_end() -> None:
    mount = Mount(b"a")
    mount.becomes = NEW
    climb = mount.climb("replace", "drop_caches")
    assert (climb.replaced_by, mount.verified, mount.taken) == (NEW, [NEW], ["replace"])
