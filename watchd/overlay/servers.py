"""Which filesystems that somebody serves (FUSE, network) lie on the way to a mount and its layers: those are what may hang.

Facts: mountinfo tells it without touching any of them. It goes by the text of the paths, so it names candidates; a layer whose
path leads over a symlink or lies inside another overlay is not seen through.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import msgspec

from watchd.errors import WireError
from watchd.overlay.discovery import read_mountinfo
from watchd.overlay.model import Overlay
from watchd.wire.mountinfo import parse_line

_LOCAL = frozenset(
    b"bdev bpf btrfs cgroup cgroup2 configfs debugfs devpts devtmpfs efivarfs erofs exfat ext2 ext3 ext4 f2fs hugetlbfs "
    b"iso9660 mqueue msdos nsfs ntfs3 overlay proc pstore ramfs rootfs securityfs squashfs sysfs tmpfs tracefs udf vfat xfs "
    b"zonefs".split()
)
"""fstype of filesystems that answer by themselves; anything else may let one wait."""

SHOWN_MAX = 3


class Served(msgspec.Struct, frozen=True):
    """A mount of a filesystem that somebody serves."""

    path: bytes
    fstype: bytes

    def __str__(self) -> str:
        return f"{os.fsdecode(self.path)} ({os.fsdecode(self.fstype)})"


def served_mounts(pid: int) -> tuple[Served, ...]:
    """Those that the process sees, the deepest first; none if it is gone."""
    try:
        lines = read_mountinfo(pid).splitlines()
        remote = [parse_line(line) for line in lines if line.rpartition(b" - ")[2].split(b" ", 1)[0] not in _LOCAL]
    except (OSError, WireError):
        return ()
    served = [Served(mount.mount_point, mount.fstype) for mount in remote if mount.fstype not in _LOCAL]
    return tuple(sorted(served, key=lambda mount: -len(mount.path)))


def lies_on(path: bytes, served: Iterable[Served]) -> bool:
    """Whether some of them lies on the way to `path`."""
    return any(_is_below(path, mount.path) for mount in served)


def servers_of(overlay: Overlay) -> str:
    """What may be waited for when nothing about this overlay answers, in words for people; "" if nothing is served."""
    upper = [] if overlay.upperdir is None else [overlay.upperdir]
    layers = [*overlay.lowerdir, *overlay.data_only, *upper]
    found: dict[str, None] = {}
    for point in overlay.mount_points:
        for mount in served_mounts(point.pid):
            if any(_is_below(path, mount.path) for path in (os.path.dirname(point.path), *layers)):
                found[str(mount)] = None
    return ", ".join(list(found)[:SHOWN_MAX])


def servers_on(path: bytes, pid: int) -> str:
    """The same for one path, as the process sees it."""
    found = [str(mount) for mount in served_mounts(pid) if _is_below(path, mount.path)]
    return ", ".join(found[:SHOWN_MAX])


def _is_below(path: bytes, directory: bytes) -> bool:
    return path == directory or path.startswith(directory.rstrip(b"/") + b"/")
