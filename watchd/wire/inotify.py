"""Decode what read(2) of an inotify instance returns.

Format (inotify(7), include/uapi/linux/inotify.h), native byte order: `struct inotify_event`, `=iIII` (wd, mask, cookie, len),
then `len` bytes that hold a name, padded with NULs. An event about the watched directory itself has no name (len 0).

Facts and what they mean for us
* A read returns whole events. The kernel pads names to a multiple of 16, but a few filesystems have names longer than
  NAME_MAX, so a length is bounded by the buffer alone.
* The events of one instance are queued in the order in which things happened, and only an event equal to the last one queued
  is dropped. So directories can be followed by replaying what came, went and moved, while names are merged per
  directory: they are looked at afterwards.
* IN_MOVED_FROM and IN_MOVED_TO of one rename have the same cookie. They are queued one after the other, not as one: another
  event, or the end of a read, may come between them. A half that stays alone was a move across the border of what is watched.
* The overflow event has wd -1 and no name.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from watchd.errors import WireError

IN_MODIFY = 0x2
IN_ATTRIB = 0x4
IN_CLOSE_WRITE = 0x8
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_UNMOUNT = 0x2000
IN_Q_OVERFLOW = 0x4000
IN_IGNORED = 0x8000
IN_ISDIR = 0x40000000

EVENT_LEN = 16

_MOVES = IN_MOVED_FROM | IN_MOVED_TO
_ENDS = IN_UNMOUNT | IN_IGNORED
_TREE = _MOVES | IN_CREATE | IN_DELETE
_SPECIAL = _MOVES | _ENDS | IN_Q_OVERFLOW | IN_ISDIR

_header = struct.Struct("=iIII")

Key = tuple[int, bytes]
"""A name in a watched directory: watch descriptor and name."""


class Step(NamedTuple):
    """Something that changes the tree of watches: a directory came, went or moved, or a watch ended."""

    wd: int
    mask: int
    cookie: int
    name: bytes


class Events:
    """One batch of decoded events, merged by name. Filled by `decode`, emptied by its reader."""

    __slots__ = ("_departures_before", "departures", "names", "overflow", "records", "renames", "steps")

    def __init__(self, departures: dict[int, Key] | None = None) -> None:
        self.names: dict[int, dict[bytes, int]] = {}
        """Watch descriptor -> name -> event mask; the name of the watched directory itself is b""."""
        self.steps: list[Step] = []
        self.renames: dict[Key, Key] = {}
        """New name -> old name."""
        self.departures: dict[int, Key] = {}
        """Cookie -> old name of the renames whose second half has not come yet."""
        self._departures_before = departures or {}
        self.overflow = False
        self.records = 0

    def add_special(self, wd: int, mask: int, cookie: int, name: bytes) -> bool:
        """Note what goes beyond a touched name; returns whether there is a touched name in it at all."""
        if mask & IN_Q_OVERFLOW:
            self.overflow = True
            return False
        if mask & _ENDS or (mask & IN_ISDIR and mask & _TREE):
            self.steps.append(Step(wd, mask, cookie, name))
        if mask & IN_MOVED_FROM:
            self.departures[cookie] = (wd, name)
        elif mask & IN_MOVED_TO:
            old = self.departures.pop(cookie, None) or self._departures_before.pop(cookie, None)
            if old is None:
                self.renames.pop((wd, name), None)
            else:
                self.renames[wd, name] = old
        return not mask & _ENDS


def decode(buffer: bytes, events: Events) -> None:
    """Merge the events of one read into `events`. Raises WireError."""
    names = events.names
    unpack = _header.unpack_from
    offset, end, records = 0, len(buffer), 0
    try:
        while offset < end:
            wd, mask, cookie, length = unpack(buffer, offset)
            start = offset + EVENT_LEN
            offset = start + length
            if offset > end:
                raise WireError(f"inotify: name of {length} bytes at byte {start} of {end}")
            name = buffer[start:offset].rstrip(b"\0")
            records += 1
            if mask & _SPECIAL and not events.add_special(wd, mask, cookie, name):
                continue
            directory = names.get(wd)
            if directory is None:
                directory = names[wd] = {}
            directory[name] = directory.get(name, 0) | mask
    except struct.error:
        raise WireError(f"inotify: event cut short at byte {offset} of {end}") from None
    events.records += records
