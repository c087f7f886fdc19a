"""Look at names of a directory and say what is there: the step from "something happened here" to a Change.

Facts: a record says where to look, never what is true now. Names are looked up one component at a time below a descriptor of
their directory and never followed, so nothing in a layer can lead elsewhere.

What this means for us: where something else is now, that a directory went, with everything below it, has to be said apart.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

import msgspec

from watchd.records import Change, Kind, Via, pack_status
from watchd.sources.who import Commands

SELF = b"."

_ATTRIB, _EVENT = int(Kind.ATTRIB), int(Via.EVENT)  # flags are slow
_WENT = int(Kind.DELETE | Kind.RENAME)


class Place(msgspec.Struct, frozen=True, gc=False):
    """Where a directory lies: in which layer, at which path from its root (b"" is the root)."""

    layer: str
    path: bytes

    def child(self, name: bytes) -> bytes:
        """The path of a name in this directory; of the directory itself for `SELF`."""
        if name == SELF:
            return self.path
        return self.path + b"/" + name if self.path else name


class Touch(msgspec.Struct, frozen=True, gc=False):
    """What happened to one name of a directory."""

    name: bytes
    path: bytes
    """From the root of the layer."""
    kinds: int
    """watchd.records.Kind bits."""
    was_dir: bool = False
    """An event said that the object is a directory; tells nothing of what is there now."""
    pid: int | None = None
    from_path: bytes | None = None


def look(
    directory: int | None,
    layer: str,
    touches: Iterable[Touch],
    time_ns: int,
    *,
    linked: set[str] | None = None,
    commands: Commands | None = None,
) -> list[Change]:
    """Changes for the touched names, as they are now below `directory` (None: the directory itself is gone).

    `commands` names the processes that touched them. The layer's name is added to `linked` if attributes changed of an object
    that has other names too, which no event tells.
    """
    changes = []
    for touch in touches:
        exists, is_dir, inode, packed = False, touch.was_dir, None, None
        if directory is not None:
            try:
                status = os.stat(touch.name, dir_fd=directory, follow_symlinks=False)
            except OSError:
                pass
            else:
                exists = status.st_nlink > 0  # 0: a directory that was removed while somebody holds it open
                is_dir, inode = stat.S_ISDIR(status.st_mode), status.st_ino
                packed = pack_status(status) if exists else None
                if exists and touch.was_dir and not is_dir and touch.kinds & _WENT:
                    changes.append(Change(time_ns, layer, touch.path, touch.kinds & _WENT, False, True))
                if linked is not None and touch.kinds & _ATTRIB and status.st_nlink > 1 and not is_dir:
                    linked.add(layer)
        changes.append(
            Change(
                time_ns,
                layer,
                touch.path,
                touch.kinds,
                exists,
                is_dir,
                touch.from_path,
                inode,
                touch.pid,
                commands.of(touch.pid) if commands is not None and touch.pid else None,
                _EVENT,
                packed,
            )
        )
    return changes
