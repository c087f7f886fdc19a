"""What the daemon answers, as typed values. Pure.

Paths and commands are bytes. Keys that are not known here are passed over, so that a newer daemon can be asked.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, TypeVar

import msgspec

from watchd.client.protocol import understanding
from watchd.records import STATUS, Action, Change, Damage, Desync, Kind, Record, Resync, Start, Stop, Via

STALE_STATES: Final = frozenset({"stale", "pinned", "failed"})

_NAMES: Final = frozenset({"path", "from", "mount_point", "command", "lowerdir", "upperdir", "workdir"})
"""Keys whose values are bytes of the system and not text."""

T = TypeVar("T")


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """A process that keeps something stale."""

    pid: int
    command: bytes
    how: str
    """exe, mapped, open, cwd, root or watch."""


class Stale(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of a merged mount that is not what the layers have."""

    path: bytes
    kind: str
    """missing, ghost, replaced, permission, listing, layer, shadowed or damage."""
    pinned_by: tuple[Holder, ...] = ()
    reason: str = ""


class MountPoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a mount is seen."""

    path: bytes
    namespace: int = 0
    """Inode number of the mount namespace."""
    pid: int | None = None
    """A process of that namespace, None for the daemon's own."""


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    """An overlay mount."""

    device: str
    """major:minor."""
    mount_points: tuple[MountPoint, ...]
    state: str
    """coherent, stale, pinned, failed or observed."""
    reason: str = ""
    stale: tuple[Stale, ...] = ()
    lowerdir: tuple[bytes, ...] = ()
    upperdir: bytes | None = None
    workdir: bytes | None = None
    read_only: bool = False
    actions: dict[str, int] = {}
    """Method -> how often it was used."""

    @property
    def is_coherent(self) -> bool:
        """Whether nothing in it is known to be stale. Damage is not: a freshly made mount would show it too."""
        return self.state not in STALE_STATES and all(entry.kind == "damage" for entry in self.stale)


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """A lower layer that is watched."""

    name: str
    path: bytes
    state: str
    """live, scanning, desynced or failed."""
    reason: str = ""
    backend: str | None = None
    fstype: str = ""
    mounts: tuple[str, ...] = ()
    """Devices of the mounts that it is a lower of."""


class Journal(msgspec.Struct, frozen=True, kw_only=True):
    """Where the journal is and what it holds."""

    path: bytes
    epoch: str
    first_seq: int
    last_seq: int
    size_bytes: int = msgspec.field(name="bytes")


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """A named position."""

    name: str
    cursor: str
    """EPOCH:SEQ."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """How things are."""

    version: str
    pid: int
    mounts: tuple[Mount, ...]
    layers: tuple[Layer, ...]
    journal: Journal
    cursors: tuple[Cursor, ...] = ()
    problems: tuple[str, ...] = ()


class PathEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A path that changed since a baseline, as it is now."""

    layer: str
    path: bytes
    """From the root of the layer."""
    kinds: tuple[str, ...]
    """create, delete, rename, modify, attrib."""
    exists: bool
    is_dir: bool
    seq: int
    """Of its last record."""
    from_path: bytes | None = msgspec.field(name="from", default=None)
    inode: int | None = None
    recursive: bool = False
    """Everything below it may have changed too: a directory that was renamed or replaced."""


class DirectoryEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A directory that holds something that changed since a baseline."""

    layer: str
    path: bytes
    seq: int
    """Of the last such record."""
    recursive: bool = False
    """See `PathEntry`."""


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """What changed since a baseline."""

    cursor: str
    """The baseline for the next question."""
    fresh: bool
    """Something may be missing: the baseline is older than the journal, or a layer is not in step. Look at everything."""
    entries: tuple[PathEntry, ...]


class ChangedDirectories(msgspec.Struct, frozen=True, kw_only=True):
    """What changed since a baseline, directories only; see `Changes`."""

    cursor: str
    fresh: bool
    entries: tuple[DirectoryEntry, ...]


class Followed(msgspec.Struct, frozen=True):
    """A record, and where to go on behind it."""

    cursor: str
    """EPOCH:SEQ."""
    record: Record

    @property
    def seq(self) -> int:
        """The record's sequence number."""
        return int(self.cursor.rpartition(":")[2])


def convert(answer: Mapping[str, Any], kind: type[T]) -> T:
    """An answer as a value of that type. Raises WatchdError when it is no such thing."""
    with understanding():
        return msgspec.convert(_with_names(answer), kind, builtin_types=(bytes,))


def _with_names(value: Any) -> Any:
    """The same with bytes for names, exact where they are not UTF-8."""
    if isinstance(value, list):
        return [_with_names(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: base64.b64decode(value[f"{key}_b64"])
        if f"{key}_b64" in value
        else _encoded(one)
        if key in _NAMES
        else _with_names(one)
        for key, one in value.items()
    }


def _encoded(value: Any) -> Any:
    if isinstance(value, list):
        return [os.fsencode(one) for one in value]
    return os.fsencode(value) if isinstance(value, str) else value


# ---- records --------------------------------------------------------------------------------------------------------

_RECORDS: Final[Mapping[str, type[Record]]] = {
    kind.__name__.lower(): kind for kind in (Change, Desync, Resync, Action, Damage, Start, Stop)
}
_KINDS: Final = {str(kind.name).lower(): int(kind) for kind in Kind}
_VIAS: Final = {via.name.lower(): int(via) for via in Via}


def record_of(value: Mapping[str, Any]) -> tuple[int, Record] | None:
    """Sequence number and record of an object as `watchd log --json` prints it; None for a type of a newer version.

    Raises what `understanding` makes an error of, when it is no such thing.
    """
    kind = _RECORDS.get(value["type"])
    if kind is None:
        return None
    known = {**value, "time_ns": parse_time(value["time"])}
    if kind is Change:
        known["from_path"] = _name(value, "from")
        known["command"] = _name(value, "command")
        known["kinds"] = sum(_KINDS.get(word, 0) for word in value["kinds"])
        known["via"] = _VIAS.get(value["via"], int(Via.EVENT))
        known["status"] = _status(value)
    for key in ("path", "mount_point"):
        if key in value:
            known[key] = _name(value, key)
    return int(value["seq"]), kind(**{name: known[name] for name in kind.__struct_fields__ if name in known})


def _name(value: Mapping[str, Any], key: str) -> bytes | None:
    """The exact name under this key."""
    if exact := value.get(f"{key}_b64"):
        return base64.b64decode(exact)
    name = value.get(key)
    return None if name is None else name.encode()


def _status(value: Mapping[str, Any]) -> bytes | None:
    if "ctime" not in value:
        return None
    times = parse_time(value["ctime"]), parse_time(value["mtime"])
    return STATUS.pack(int(value["mode"], 8), value["uid"], value["gid"], value["size"], *times)


def parse_time(text: str) -> int:
    """Nanoseconds since the epoch of RFC 3339 in UTC, such as `2026-01-31T12:00:00.123456789Z`."""
    seconds, _, fraction = text.removesuffix("Z").partition(".")
    return _parse_second(seconds) * 1_000_000_000 + int(fraction.ljust(9, "0"))


@lru_cache(1024)  # neighbours share their second
def _parse_second(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())
