from __future__ import annotations

import struct

from watchd.sources.held import HELD_MAX, TRIES_MAX, Held
from watchd.wire.inotify import IN_CREATE, IN_MODIFY, IN_MOVED_TO, Events, decode


def events(wd: int, mask: int, name: bytes) -> Events:
    result = Events()
    decode(struct.pack("=iIII16s", wd, mask, 0, 16, name), result)
    return result


def test_what_is_held_comes_again_with_what_happened_since_and_where_it_came_from() -> None:
    held, key, old = Held(), (2, b"file"), (3, b"old")
    held.hold_names(2, {b"file": IN_MOVED_TO}, {key: old, (2, b"other"): old})
    held.hold_arrival((2, b"dir"), 7)
    later = events(2, IN_MODIFY, b"file")
    assert held.take(later) == {(2, b"dir"): 7}
    assert later.names == {2: {b"file": IN_MOVED_TO | IN_MODIFY}}
    assert later.renames == {key: old}
    assert not held


def test_where_a_name_came_from_before_is_forgotten_when_another_comes_from_outside() -> None:
    held = Held()
    held.hold_names(2, {b"file": IN_MOVED_TO}, {(2, b"file"): (3, b"old")})
    later = events(2, IN_MOVED_TO, b"file")
    held.take(later)
    assert later.renames == {}


def test_only_a_directory_that_was_never_found_in_between_is_in_vain() -> None:
    held = Held()
    for number in range(3 * TRIES_MAX):
        held.take(Events())
        held.hold_names(2 + number % 2, {b"file": IN_CREATE}, {})
    assert not held.is_in_vain
    for _ in range(TRIES_MAX):
        held.take(Events())
        held.hold_names(2, {b"file": IN_CREATE}, {})
    assert held.is_in_vain
    held.clear()
    assert not held.is_in_vain


def test_no_more_is_held_than_the_bound() -> None:
    held = Held()
    held.hold_names(2, {b"%d" % number: IN_CREATE for number in range(HELD_MAX + 1)}, {})
    assert held.is_in_vain


def test_a_barrier_is_kept_back_by_what_was_held_before_it_and_by_nothing_later() -> None:
    held = Held()
    held.hold_names(2, {b"file": IN_CREATE}, {})
    assert held.release((b"first",)) == ()
    held.take(Events())
    held.hold_names(3, {b"file": IN_CREATE}, {})
    assert held.release((b"second",)) == (b"first",)
    held.take(Events())
    assert held.release(()) == (b"second",)
    assert held.release(()) == ()
