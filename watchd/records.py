"""The values that flow from the sources through the journal to its readers.

All of them are immutable. Paths and commands are bytes, relative to their layer and without a leading slash; the layer's own
root is `b""`. Times are nanoseconds since the epoch, `CLOCK_REALTIME`. Sequence numbers are not part of a record: the
journal assigns them. The structs are encoded as MessagePack arrays whose first element is the integer tag, so fields may be
added at the end and never reordered (docs/journal.md).
"""

from __future__ import annotations

import enum

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
    command: bytes | None = None
    via: int = Via.EVENT


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
