from __future__ import annotations

from watchd.sources.watchtree import ROOT, WatchTree


def tree(*places: tuple[int, int, bytes]) -> WatchTree:
    result = WatchTree()
    result.place(1, ROOT, b"")
    for wd, parent, name in places:
        result.place(wd, parent, name)
    return result


def test_paths_follow_a_renamed_directory() -> None:
    watches = tree((2, 1, b"a"), (3, 2, b"b"), (4, 1, b"c"))
    assert watches.path(3) == b"a/b"
    watches.leave(1, b"a")
    watches.place(2, 4, b"moved")
    assert watches.path(3) == b"c/moved/b"
    assert watches.lost() == []


def test_a_directory_that_left_takes_all_below_it_along() -> None:
    watches = tree((2, 1, b"a"), (3, 2, b"b"), (4, 3, b"c"), (5, 1, b"d"))
    watches.leave(1, b"a")
    assert sorted(watches.lost()) == [2, 3, 4]
    assert len(watches) == 2
    assert watches.path(5) == b"d"
    assert watches.path(3) is None


def test_a_new_directory_in_the_place_of_one_that_left_survives_it() -> None:
    watches = tree((2, 1, b"a"), (3, 2, b"b"))
    assert watches.place(9, 1, b"a")
    assert sorted(watches.lost()) == [2, 3]
    assert watches.path(9) == b"a"


def test_contradicting_renames_make_no_endless_climb() -> None:
    watches = tree((2, 1, b"a"), (3, 2, b"b"))
    watches.place(2, 3, b"a")
    assert watches.path(2) is None
    assert watches.path(3) is None
    watches.place(2, 1, b"a")
    assert watches.path(3) == b"a/b"


def test_a_place_that_was_asked_for_before_it_was_known_is_found_afterwards() -> None:
    watches = tree()
    assert watches.path(2) is None
    watches.place(2, 1, b"a")
    assert watches.path(2) == b"a"


def test_an_ended_watch_does_not_take_the_name_from_its_successor() -> None:
    watches = tree((2, 1, b"a"))
    watches.place(3, 1, b"a")
    watches.forget(2)
    assert watches.wd_at(1, b"a") == 3


def test_a_directory_below_one_that_left_is_in_the_layer_only_while_the_other_half_of_the_rename_may_come() -> None:
    watches = tree((2, 1, b"a"), (3, 2, b"b"))
    assert watches.is_rooted(3, but_for=frozenset())
    watches.leave(1, b"a")
    assert not watches.is_rooted(3, but_for=frozenset())
    assert watches.is_rooted(3, but_for=frozenset({2}))
    assert not watches.is_rooted(9, but_for=frozenset())


def test_contradicting_renames_are_not_taken_for_a_departure() -> None:
    watches = tree((2, 1, b"a"), (3, 2, b"b"))
    watches.place(2, 3, b"a")
    assert watches.is_rooted(2, but_for=frozenset())
