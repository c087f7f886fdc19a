"""Records as the kernel lays them out go through the decoder and come out merged; anything else is a WireError."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watchd.errors import WireError
from watchd.kernel import fanotify as fan
from watchd.wire.fanotify import MASK, MASK_BITS, Events, by_directory, decode, file_handle, split

FSID_LEN = 8
FID = fan.FAN_EVENT_INFO_TYPE_FID
NAME = fan.FAN_EVENT_INFO_TYPE_DFID_NAME
OLD_NAME, NEW_NAME = fan.FAN_EVENT_INFO_TYPE_OLD_DFID_NAME, fan.FAN_EVENT_INFO_TYPE_NEW_DFID_NAME


def record(mask: int, pid: int = 1, infos: bytes = b"", *, version: int = fan.FANOTIFY_METADATA_VERSION) -> bytes:
    return struct.pack("<IBBHQii", 24 + len(infos), version, 0, 24, mask, -1, pid) + infos


def info(kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    return struct.pack("<BBH", kind, 0, 4 + len(body)) + body


@dataclass(frozen=True)
class Touched:
    """An event on a name; `child` only where the kernel reports the object too."""

    mask: int
    directory: bytes
    name: bytes
    child: bytes
    pid: int

    def encode(self) -> bytes:
        return record(
            self.mask,
            self.pid,
            info(NAME, self.directory + self.name + b"\0") + (info(FID, self.child) if self.child else b""),
        )


@dataclass(frozen=True)
class Renamed:
    mask: int
    old: tuple[bytes, bytes]
    new: tuple[bytes, bytes]
    child: bytes
    pid: int

    def encode(self) -> bytes:
        names = info(OLD_NAME, b"".join(self.old) + b"\0") + info(NEW_NAME, b"".join(self.new) + b"\0")
        return record(self.mask | fan.FAN_RENAME, self.pid, names + info(FID, self.child))


@dataclass(frozen=True)
class Overflowed:
    def encode(self) -> bytes:
        return record(fan.FAN_Q_OVERFLOW, 0)


@dataclass(frozen=True)
class ObjectOnly:
    """No name at all, as for events on an object whose parent is not known."""

    child: bytes

    def encode(self) -> bytes:
        return record(fan.FAN_ATTRIB, 1, info(FID, self.child))


Event = Touched | Renamed | Overflowed | ObjectOnly

handles = st.builds(
    lambda fsid, kind, fid: fsid + struct.pack("<Ii", len(fid), kind) + fid,
    st.sampled_from([bytes(8), b"\x01fsid\0\0\0"]),
    st.integers(0, 255),
    st.sampled_from([b"\x01\0\0\0", b"\x02\0\0\0", bytes(8), b"\xff" * 12])
    | st.binary(min_size=4, max_size=128).map(lambda fid: fid[: len(fid) // 4 * 4]),
)
"""The kernel makes handles of 32 bit words."""

names = st.sampled_from([b".", b"a", b"b", b"\xff\xfe", b" ", b"x" * 255]) | st.binary(min_size=1, max_size=255).map(
    lambda name: name.replace(b"\0", b"0").replace(b"/", b"_")
)
masks = st.sampled_from(
    [fan.FAN_CREATE, fan.FAN_DELETE, fan.FAN_MODIFY, fan.FAN_ATTRIB, fan.FAN_CREATE | fan.FAN_DELETE]
)
directory_bit = st.sampled_from([0, fan.FAN_ONDIR])
pids = st.integers(0, 2**22)
touched = st.builds(
    lambda mask, on_dir, *rest: Touched(mask | on_dir, *rest),
    masks,
    directory_bit,
    handles,
    names,
    handles | st.just(b""),
    pids,
)
renamed = st.builds(Renamed, directory_bit, st.tuples(handles, names), st.tuples(handles, names), handles, pids)
events = st.lists(touched | renamed | st.just(Overflowed()) | st.builds(ObjectOnly, handles), max_size=12)


@dataclass
class Expected:
    """What the events amount to, merged by name."""

    masks: dict[bytes, int] = field(default_factory=dict)
    pids: dict[bytes, int] = field(default_factory=dict)
    children: dict[bytes, tuple[bytes, tuple[bytes, ...]]] = field(default_factory=dict)
    renames: dict[bytes, bytes] = field(default_factory=dict)
    overflow: bool = False

    def take(self, event: Event) -> None:
        if isinstance(event, Overflowed):
            self.overflow = True
        elif isinstance(event, Touched):
            self.name(event.directory + event.name, event.mask, event.pid)
            self.child(event.child, event.directory + event.name, event.mask)
        elif isinstance(event, Renamed):
            old, new = b"".join(event.old), b"".join(event.new)
            self.name(old, event.mask | fan.FAN_MOVED_FROM, event.pid)
            self.name(new, event.mask | fan.FAN_MOVED_TO, event.pid)
            self.renames[new] = old
            self.child(event.child, new, event.mask, origin=event.old[0])

    def name(self, key: bytes, mask: int, pid: int) -> None:
        self.masks[key] = self.masks.get(key, 0) | mask
        self.pids.setdefault(key, pid)

    def child(self, child: bytes, key: bytes, mask: int, *, origin: bytes | None = None) -> None:
        if child and mask & fan.FAN_ONDIR:
            origins = self.children.get(child, (b"", ()))[1]
            new = () if origin is None or origin in origins else (origin,)
            self.children[child] = (key, (*origins, *new))


def decoded(buffers: Sequence[bytes]) -> Events:
    found = Events()
    for buffer in buffers:
        decode(buffer, found)
    return found


@given(events, st.integers(0, 12))
def test_no_name_and_no_bit_is_lost_in_merging_within_and_across_reads(told: list[Event], cut: int) -> None:
    expected = Expected()
    for event in told:
        expected.take(event)
    halves = [b"".join(event.encode() for event in part) for part in (told[:cut], told[cut:])]
    found = decoded(halves)
    assert {key: value & MASK for key, value in found.names.items()} == expected.masks
    assert {key: value >> MASK_BITS for key, value in found.names.items()} == expected.pids
    assert found.children == expected.children
    assert found.renames == expected.renames
    assert (found.overflow, found.records) == (expected.overflow, len(told))


@given(handles, names)
def test_a_name_comes_apart_into_what_it_was_put_together_of(directory: bytes, name: bytes) -> None:
    (key,) = decoded([Touched(fan.FAN_CREATE, directory, name, b"", 1).encode()]).names
    assert split(key) == (directory, name)
    assert file_handle(directory) == directory[FSID_LEN:]


@given(events)
def test_grouping_by_directory_takes_every_name_apart_alike(told: list[Event]) -> None:
    found = decoded([b"".join(event.encode() for event in told)]).names
    grouped = by_directory(found)
    apart = [(directory, *entry) for directory, entries in grouped.items() for entry in entries]
    assert sorted(apart) == sorted((*split(key), value, key) for key, value in found.items())


def test_the_overflow_record_that_carries_nothing_ends_no_batch() -> None:
    """Several tools die on exactly that record."""
    directory = bytes(8) + struct.pack("<Ii", 4, 1) + b"\x01\0\0\0"
    around = [Touched(fan.FAN_CREATE, directory, name, b"", 1).encode() for name in (b"before", b"after")]
    found = decoded([around[0] + Overflowed().encode() + around[1]])
    assert found.overflow
    assert [split(key)[1] for key in found.names] == [b"before", b"after"]


@given(st.lists(touched | renamed, min_size=1, max_size=3), st.data())
def test_a_read_that_is_cut_short_anywhere_is_told(told: list[Event], data: st.DataObject) -> None:
    whole = b"".join(event.encode() for event in told)
    borders = {0}
    for event in told:
        borders.add(max(borders) + len(event.encode()))
    cut = data.draw(st.integers(1, len(whole) - 1).filter(lambda position: position not in borders))
    with pytest.raises(WireError):
        decode(whole[:cut], Events())


@given(st.binary(max_size=512))
def test_no_bytes_raise_anything_but_wire_errors(buffer: bytes) -> None:
    with contextlib.suppress(WireError):
        decode(buffer, Events())


@given(touched | renamed, st.data())
def test_no_damage_to_a_record_raises_anything_but_wire_errors(event: Event, data: st.DataObject) -> None:
    buffer = bytearray(event.encode())
    for position in data.draw(st.lists(st.integers(0, len(buffer) - 1), max_size=8)):
        buffer[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(WireError):
        decode(bytes(buffer), Events())


@given(touched, st.integers(0, 255).filter(lambda version: version != fan.FANOTIFY_METADATA_VERSION))
def test_another_version_of_the_format_is_refused(event: Touched, version: int) -> None:
    buffer = bytearray(event.encode())
    buffer[4] = version
    with pytest.raises(WireError, match=f"version {version} "):
        decode(bytes(buffer), Events())
