from __future__ import annotations

import struct
import warnings

import pytest

from watchd.errors import WireError
from watchd.wire import inotify as wire
from watchd.wire.inotify import (
    IN_ATTRIB,
    IN_CREATE,
    IN_DELETE,
    IN_IGNORED,
    IN_ISDIR,
    IN_MODIFY,
    IN_MOVED_FROM,
    IN_MOVED_TO,
    IN_Q_OVERFLOW,
    Events,
    Step,
    decode,
)


def event(wd: int, mask: int, name: bytes = b"", *, cookie: int = 0) -> bytes:
    padded = name + b"\0" * (16 - len(name) % 16) if name else b""
    return struct.pack("=iIII", wd, mask, cookie, len(padded)) + padded


def decoded(*buffers: bytes) -> Events:
    events = Events()
    for buffer in buffers:
        decode(buffer, events)
    return events


def test_constants_are_those_of_pyinotify() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import pyinotify
    names = [name for name in vars(wire) if name.startswith("IN_")]
    assert names
    assert {name: getattr(wire, name) for name in names} == {name: getattr(pyinotify, name) for name in names}


def test_names_that_are_not_utf8_stay_bytes() -> None:
    events = decoded(event(1, IN_CREATE, b"\xff\xfe"))
    assert events.names == {1: {b"\xff\xfe": IN_CREATE}}


def test_events_of_one_name_are_merged_over_several_reads() -> None:
    events = decoded(event(1, IN_CREATE, b"a") + event(2, IN_CREATE, b"a"), event(1, IN_MODIFY, b"a"))
    assert events.names == {1: {b"a": IN_CREATE | IN_MODIFY}, 2: {b"a": IN_CREATE}}
    assert events.records == 3
    assert not events.steps


def test_steps_of_directories_keep_their_order() -> None:
    events = decoded(
        event(1, IN_CREATE | IN_ISDIR, b"d"),
        event(1, IN_DELETE | IN_ISDIR, b"d"),
        event(7, IN_IGNORED),
        event(1, IN_CREATE | IN_ISDIR, b"d"),
    )
    assert events.steps == [
        Step(1, IN_CREATE | IN_ISDIR, 0, b"d"),
        Step(1, IN_DELETE | IN_ISDIR, 0, b"d"),
        Step(7, IN_IGNORED, 0, b""),
        Step(1, IN_CREATE | IN_ISDIR, 0, b"d"),
    ]
    assert 7 not in events.names


def test_attributes_of_a_directory_are_no_step() -> None:
    events = decoded(event(1, IN_ATTRIB | IN_ISDIR))
    assert events.names == {1: {b"": IN_ATTRIB | IN_ISDIR}}
    assert not events.steps


def test_halves_of_a_rename_find_each_other_across_batches() -> None:
    first = decoded(event(1, IN_MOVED_FROM, b"old", cookie=5))
    assert first.departures == {5: (1, b"old")}
    second = Events(first.departures)
    decode(event(2, IN_MOVED_TO, b"new", cookie=5), second)
    assert second.renames == {(2, b"new"): (1, b"old")}


def test_a_name_moved_in_over_a_renamed_one_does_not_inherit_its_origin() -> None:
    events = decoded(
        event(1, IN_MOVED_FROM, b"a", cookie=5),
        event(1, IN_MOVED_TO, b"b", cookie=5),
        event(1, IN_MOVED_TO, b"b", cookie=6),
    )
    assert events.renames == {}


def test_overflow_is_told_and_what_is_queued_beside_it_still_read() -> None:
    events = decoded(event(1, IN_CREATE, b"a") + event(-1, IN_Q_OVERFLOW) + event(1, IN_CREATE, b"b"))
    assert events.overflow
    assert events.names == {1: {b"a": IN_CREATE, b"b": IN_CREATE}}


@pytest.mark.parametrize("buffer", [event(1, IN_CREATE, b"name")[:-1], event(1, IN_CREATE)[:9], b"\0"])
def test_a_buffer_cut_short_is_an_error_not_a_guess(buffer: bytes) -> None:
    with pytest.raises(WireError):
        decoded(buffer)
