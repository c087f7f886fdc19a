"""A merged mount as the coherence code sees it: how to open it and its layers, and what may be done to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from watchd.kernel.namespaces import mount_namespace
from watchd.overlay.model import MountPoint, Overlay, ResolvedStack
from watchd.overlay.upper import Upper


@dataclass(frozen=True)
class LayerRoot:
    """One layer of a stack, the upper included."""

    path: bytes
    open: Callable[[], int] = field(repr=False, compare=False)
    """A detached mount rooted at the layer's directory, as an owned descriptor. Raises LayerError."""
    key: object = None
    """What makes two layers the same directory."""
    cache_tells: bool = True
    """RESOLVE_CACHED answers truly for this filesystem (see `watchd.coherence.view`)."""


@dataclass(frozen=True)
class Outer:
    """An overlay one of whose lowers lies in the merged mount of another one."""

    device: str
    below: bytes | None
    """Where in the inner merged mount that lower lies; b"" is its root, None if that is not known."""

    def translate(self, path: bytes) -> bytes | None:
        """What `path` of the inner mount is in that lower; None if it lies outside."""
        if not self.below:
            return path
        if path == self.below:
            return b""
        return path[len(self.below) + 1 :] if path.startswith(self.below + b"/") else None


@dataclass(frozen=True)
class Target:
    """A superblock of overlayfs that watchd keeps true."""

    device: str
    """major:minor"""
    mount_point: bytes
    """The one to speak of."""
    mount_points: tuple[bytes, ...]
    """All of them, each in its own namespace."""
    layers: tuple[LayerRoot, ...]
    """Top first, the upper included, data-only layers left out."""
    open: Callable[[], int] = field(repr=False, compare=False)
    """A detached clone of the merged mount, as an owned descriptor. Raises MountError."""
    around: tuple[MountPoint, ...] = ()
    """Mounts of overlays around this one, through which its objects may be held; `root` is the directory of this one that each
    shows."""
    has_upper: bool = False
    """The first of the layers is the upper."""
    read_only: bool = False
    """The superblock is read-only."""
    userxattr: bool = False
    splits_files: bool = False
    """metacopy is on, so a file's content may be another file's."""
    data_only: tuple[LayerRoot, ...] = ()
    renames_directories: bool = False
    """redirect_dir is on, so a path in a lower need not be the path in the merged mount."""
    on_server: bool = False
    """Its mount point lies on a filesystem that somebody serves, so getting there may let one wait."""
    observe: bool = False
    """Verify and report, but do nothing."""
    actions: tuple[str, ...] = ("invalidate",)
    """The ladder: what may be done about it, in this order."""
    evict_limit_bytes: int = 256 << 20
    """A larger file is not copied to evict it."""
    overlay: Overlay | None = field(default=None, repr=False, compare=False)
    stack: ResolvedStack | None = field(default=None, repr=False, compare=False)
    """What it was built from; None in tests only."""
    open_upper: Callable[[], Upper] | None = field(default=None, repr=False, compare=False)
    """The upper and its workdir, writable. Raises LayerError. None without an upper."""
    budget: float = 0.1
    """Share of the time that may go into invalidating this mount."""

    @property
    def copies_metadata(self) -> bool:
        """An upper file may have its content from a lower."""
        return self.has_upper and self.splits_files

    @property
    def shown_at(self) -> Sequence[MountPoint]:
        """Where it is mounted, with the namespaces and the mounts that show a part of it only."""
        if self.overlay is not None:
            return self.overlay.mount_points
        return [MountPoint(path, mount_namespace(), os.getpid()) for path in self.mount_points]
