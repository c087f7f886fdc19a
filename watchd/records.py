"""The values that flow from the sources through the journal to its readers.

All of them are immutable. Paths and commands are bytes, relative to their layer and without a leading slash; the layer's own
root is `b""`. Times are nanoseconds since the epoch, `CLOCK_REALTIME`. Sequence numbers are not part of a record: the
journal assigns them. The structs are encoded as MessagePack arrays whose first element is the integer tag, so fields may be
added at the end and never reordered (docs/journal.md).
"""

from __future__ import annotations

import enum
import os
import struct
from typing import NamedTuple

import msgspec


class Kind(enum.IntFlag):
    """What happened to a name; several may have been merged into one record."""

    CREATE = 1
    DELETE = 2
    RENAME = 4
    MODIFY = 8
    ATTRIB = 16


class Via(enum.IntEnum):
    """How watchd learned of a change."""

    EVENT = 0
    SCAN = 1
    POLL = 2


class Status(NamedTuple):
    """What stat(2) tells of an object, as far as a change of it shows there."""

    mode: int
    uid: int
    gid: int
    size: int
    ctime_ns: int
    mtime_ns: int


STATUS = struct.Struct("<IIIQqq")
"""The fields of `Status` in 36 bytes."""

_TIME_MAX = (1 << 63) - 1


def pack_status(status: os.stat_result) -> bytes:
    """The bytes for `Change.status`."""
    try:
        return STATUS.pack(
            status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_ctime_ns, status.st_mtime_ns
        )
    except (
        struct.error
    ):  # users can set times that no 64 bits of nanoseconds hold, on filesystems that can (btrfs, tmpfs)
        ctime_ns, mtime_ns = (
            max(-_TIME_MAX, min(_TIME_MAX, time_ns)) for time_ns in (status.st_ctime_ns, status.st_mtime_ns)
        )
        return STATUS.pack(status.st_mode, status.st_uid, status.st_gid, max(0, status.st_size), ctime_ns, mtime_ns)


def unpack_status(packed: bytes) -> Status:
    """What `pack_status` packed. Raises struct.error if it is no such thing."""
    return Status(*STATUS.unpack(packed))


class Change(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """A name of a layer that changed, as it was when watchd looked at it."""

    time_ns: int
    layer: str
    path: bytes
    kinds: int
    """`Kind` bits."""
    exists: bool
    is_dir: bool
    from_path: bytes | None = None
    """Where a renamed object came from, if that was inside the same layer."""
    inode: int | None = None
    pid: int | None = None
    """The process that made the change, in watchd's pid namespace; of several, the one that was heard first."""
    command: bytes | None = None
    """What that process called itself when the change was looked at; None when it had ended by then."""
    via: int = Via.EVENT
    status: bytes | None = None
    """`Status`, packed, as looked at together with `inode`; None if it does not exist."""


class Desync(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """From here on changes of the layer may be missing."""

    time_ns: int
    layer: str
    reason: str
    """overflow, restart, source-lost or limit."""


class Resync(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """The layer's records are complete again: what was missed stands before this record."""

    time_ns: int
    layer: str
    closes: int
    """Sequence number of the desync that this one closes."""
    differences: int


class Action(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False):
    """What was done to a merged mount, and whether it helped."""

    time_ns: int
    mount: str
    """major:minor of the superblock."""
    mount_point: bytes
    method: str
    result: str
    """coherent, stale or failed."""
    stale_before: int
    stale_after: int
    duration_ns: int
    upto: int
    """The last sequence number whose changes this action covers."""
    layer: str = ""


class Start(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """A daemon opened the journal."""

    time_ns: int
    version: str
    boot_id: str
    layer: str = ""


class Stop(msgspec.Struct, frozen=True, array_like=True, tag=6, gc=False):
    """A daemon closed the journal in good order."""

    time_ns: int
    version: str
    boot_id: str
    layer: str = ""


class Damage(msgspec.Struct, frozen=True, array_like=True, tag=7, gc=False):
    """What was written through a stale name, so that the upper hides what the lowers have. Nothing repairs that by itself."""

    time_ns: int
    mount: str
    """major:minor of the superblock."""
    mount_point: bytes
    path: bytes
    """Below the mount point."""
    reason: str
    """What happened, a sentence for people."""
    layer: str = ""


Record = Change | Desync | Resync | Action | Start | Stop | Damage
