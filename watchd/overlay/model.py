r"""What an overlay is: its superblock as mountinfo shows it, and its layers as directories.

Facts (fs/overlayfs/params.c and super.c of 6.1, 6.12 and 6.18)
* `lowerdir=` shows the string that the mounter gave: layers separated by `:`, data-only layers each preceded by `::`, and
  `\` before any character takes it literally. `lowerdir+=` and `datadir+=` are shown once per layer and hold one path as it
  is. The two forms are never mixed.
* `upperdir=` and `workdir=` show the mounter's string too, and it was unescaped once when it was looked up. A mounter that
  passed descriptors (6.13) has plain paths there; such a path with a backslash in it is misread, and found out as a layer
  that does not fit.
* Relative paths are shown as given. Layers that were deleted, renamed or mounted over still show the old string.
* Of the other options those are shown that differ from the module's defaults (/sys/module/overlay/parameters), so one that is
  not shown is not necessarily off.
* The `ro` of the superblock is the first super option; the mount flag of the same name stands in another field.
* One superblock (`major:minor`) is one overlay, however many mounts in however many namespaces show it. A mount may show a
  subdirectory of it only (bind mounts).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

import msgspec

from watchd.kernel.files import FileHandle
from watchd.wire.mountinfo import MountInfo, split_options

_WORD = re.compile(rb"(?:[^:\\]|\\.)+|\\\Z|:+", re.DOTALL)
_ESCAPED = re.compile(rb"\\(.?)", re.DOTALL)
_PATHS = frozenset({"lowerdir", "lowerdir+", "datadir+", "upperdir", "workdir"})


def device_name(device: int) -> str:
    """st_dev as `major:minor`, which is how an overlay is named."""
    return f"{os.major(device)}:{os.minor(device)}"


def device_number(name: str) -> int:
    """The st_dev that `major:minor` means."""
    major, _, minor = name.partition(":")
    return os.makedev(int(major), int(minor))


class View(msgspec.Struct, frozen=True):
    """A mount namespace as one of its processes sees it: paths are looked up from that process's root."""

    pid: int
    namespace: int
    """Inode number of /proc/<pid>/ns/mnt."""


class MountPoint(msgspec.Struct, frozen=True):
    """One mount of an overlay."""

    path: bytes
    """Relative to the root of `pid`."""
    namespace: int
    pid: int
    """A representative process of the namespace."""
    root: bytes = b"/"
    """The directory of the overlay that is mounted here; only `/` shows all of it."""

    @property
    def view(self) -> View:
        """Where `path` holds."""
        return View(self.pid, self.namespace)


class Overlay(msgspec.Struct, frozen=True):
    """One overlay superblock. Layer paths are the mounter's strings, unescaped; see `watchd.overlay.layers`."""

    device: str
    """major:minor"""
    mount_points: tuple[MountPoint, ...]
    lowerdir: tuple[bytes, ...]
    """Uppermost first, without the data-only layers."""
    data_only: tuple[bytes, ...]
    upperdir: bytes | None
    workdir: bytes | None
    options: Mapping[str, str]
    """All other super options as shown (userxattr, metacopy, redirect_dir, ...); a flag has the value ""."""
    read_only: bool
    """The superblock is read-only, whatever the mounts are."""


class LayerDirectory(msgspec.Struct, frozen=True):
    """The directory that a layer's path leads to. Values only, no descriptor: nothing is kept busy."""

    path: bytes
    """As shown in the overlay's options, unescaped."""
    view: View
    device: int = 0
    """st_dev"""
    inode: int = 0
    """st_ino"""
    handle: FileHandle | None = None
    """None where the filesystem has no file handles."""
    magic: int = 0
    """f_type of statfs(2)."""
    error: str = ""
    """Why the layer is unknown; the values above are then meaningless."""


class ResolvedStack(msgspec.Struct, frozen=True):
    """The layers of one overlay as directories."""

    device: str
    """Of the overlay."""
    upper: LayerDirectory | None
    lowers: tuple[LayerDirectory, ...]
    data_only: tuple[LayerDirectory, ...]
    proven: bool
    """The overlay's own file handle agrees with the first layer where all of them were looked up; if not, its status does,
    or the layers are unknown."""


def build_overlays(mounts: Iterable[tuple[View, MountInfo]]) -> tuple[Overlay, ...]:
    """Group overlay mounts, each with the view whose mountinfo showed it, by superblock; in the order of first sight."""
    points: dict[tuple[int, int], list[MountPoint]] = {}
    shown: dict[tuple[int, int], bytes] = {}
    for view, info in mounts:
        point = MountPoint(info.mount_point, view.namespace, view.pid, info.root)
        points.setdefault(info.device, []).append(point)
        shown.setdefault(info.device, info.super_options)
    return tuple(_overlay(device, points[device], super_options) for device, super_options in shown.items())


def split_lowerdir(value: bytes) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    r"""The `lowerdir` option as (layers, data-only layers), with overlay's backslash escapes undone."""
    lower: list[bytes] = []
    data_only: list[bytes] = []
    into = lower
    for word in _WORD.findall(value):
        if word.startswith(b":"):
            into = data_only if len(word) > 1 else into
        else:
            into.append(unescape(word))
    return tuple(lower), tuple(data_only)


def _overlay(device: tuple[int, int], points: list[MountPoint], super_options: bytes) -> Overlay:
    pairs = [(name.decode("ascii", "backslashreplace"), value) for name, value in split_options(super_options)]
    shown = dict(pairs)
    lower, data_only = split_lowerdir(shown.get("lowerdir", b""))
    lower += tuple(value for name, value in pairs if name == "lowerdir+")
    data_only += tuple(value for name, value in pairs if name == "datadir+")
    return Overlay(
        device=f"{device[0]}:{device[1]}",
        mount_points=tuple(points),
        lowerdir=lower,
        data_only=data_only,
        upperdir=unescape(shown["upperdir"]) if "upperdir" in shown else None,
        workdir=unescape(shown["workdir"]) if "workdir" in shown else None,
        options={
            name: value.decode("ascii", "backslashreplace")
            for name, value in shown.items()
            if name not in _PATHS and name not in ("ro", "rw")
        },
        read_only="ro" in shown,
    )


def unescape(path: bytes) -> bytes:
    """A layer path with overlay's backslash escapes undone."""
    return _ESCAPED.sub(rb"\1", path) if b"\\" in path else path
