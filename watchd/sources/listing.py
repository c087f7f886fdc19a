"""Read what is in directories, in slices, as bytes that can be compared in one go.

Facts: scandir of a descriptor gives names as str, and its entries' stat is an fstatat relative to it, so a name is looked up
nowhere else and no link is followed. A name that goes between the two is left out; whether that is told is the part of events.
One encoding of all names of a directory costs a tenth of one for each.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Generator
from typing import Protocol

from watchd.records import STATUS, pack_status
from watchd.wire.listing import Listing

SLICE_ENTRIES = 1000
SLICE_NS = 3_000_000
"""A slice ends after so many entries or so long, whichever comes first; the clock is looked at every CHECK_ENTRIES."""

CHECK_ENTRIES = 50

_INODE = struct.Struct("<Q")
_pack = struct.Struct("<Q" + STATUS.format.lstrip("<")).pack

Pairs = list[tuple[bytes, bytes]]
"""Names with states, sorted."""


class KnownTree(Protocol):
    """A layer as it was at some moment; belongs to one thread."""

    @property
    def state(self) -> bytes:
        """Of the layer's root directory."""

    @property
    def root(self) -> int:
        """The number of its listing."""

    def listing(self, number: int) -> Listing:
        """Of a directory of the tree. Raises WatchdError if it cannot be read."""

    def close(self) -> None:
        """Let go of it."""


class Budget:
    """How much may be looked at until the end of a slice."""

    def __init__(self, entries: int = SLICE_ENTRIES) -> None:
        self._entries = self._unchecked = entries
        self.left = 0
        """Until `is_spent` has to be asked."""
        self.renew()

    def renew(self) -> None:
        """The next slice begins."""
        self._unchecked, self._end_ns = self._entries, time.monotonic_ns() + SLICE_NS
        self.left = 0
        self.is_spent()

    def is_spent(self) -> bool:
        """Whether the slice ends, asked when nothing is left."""
        if self._unchecked <= 0 or time.monotonic_ns() >= self._end_ns:
            return True
        self.left = min(CHECK_ENTRIES, self._unchecked)
        self._unchecked -= self.left
        return False


def pack_state(status: os.stat_result) -> bytes:
    """The state of an object, see `watchd.wire.listing`."""
    try:
        return _pack(
            status.st_ino,
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_size,
            status.st_ctime_ns,
            status.st_mtime_ns,
        )
    except struct.error:
        return _INODE.pack(status.st_ino) + pack_status(status)


def read_directory(descriptor: int, budget: Budget) -> Generator[None, None, Pairs]:
    """Names and states of an open directory, sorted; gives None at the end of every slice. Raises OSError."""
    names: list[str] = []
    states: list[bytes] = []
    with os.scandir(descriptor) as entries:
        for entry in entries:
            try:
                state = pack_state(entry.stat(follow_symlinks=False))
            except FileNotFoundError:
                continue
            names.append(entry.name)
            states.append(state)
            budget.left -= 1
            if budget.left <= 0 and budget.is_spent():
                yield
                budget.renew()
    return sorted(zip(os.fsencode("\0".join(names)).split(b"\0"), states, strict=True)) if names else []


def joined(pairs: Pairs) -> tuple[bytes, bytes]:
    """Names and states as they stand in a `Listing`."""
    return b"\0".join([name for name, _ in pairs]), b"".join([state for _, state in pairs])
