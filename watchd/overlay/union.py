"""What the layers of an overlay add up to at one path: the union rules, applied to the layers as they are now.

Facts (Documentation/filesystems/overlayfs.rst, fs/overlayfs/namei.c)
* Layers are searched from the top. The first entry that is no directory ends the search and provides the object; directories
  merge with those below until one is opaque (xattr overlay.opaque = "y") or something else than a directory is met.
* A whiteout is a character device 0:0, or, in a directory whose overlay.opaque is "x", an empty regular file with the xattr
  overlay.whiteout. It hides what is below.
* overlay.redirect on a directory says under which name (or absolute path) the layers below have it.
* The xattrs live in trusted.*, with the option userxattr in user.*. They cannot be read through an O_PATH descriptor, but
  through its /proc/self/fd link.
* Data-only layers provide no names.

Descriptors of directories are kept for the path last asked for and its ancestors only, so asking in sorted order is cheap and
the number of open files is bounded by depth times layers.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field

from watchd.kernel.files import O_PATH_NOFOLLOW, FileHandle, try_openat2
from watchd.overlay.access import handle_of

_OPEN_DIRECTORY = O_PATH_NOFOLLOW | os.O_DIRECTORY
_NOTHING = (errno.ENOENT, errno.ESTALE)
_ABSENT = (*_NOTHING, errno.ENOTDIR, errno.ELOOP)


@dataclass(frozen=True, slots=True)
class Entry:
    """The object that the layers provide at a path."""

    layer: int
    """Index of the layer that provides it, 0 is the top."""
    handle: FileHandle | None
    """None where the layer's filesystem has no file handles, as an overlay that is a layer of another one."""
    is_dir: bool


@dataclass(slots=True)
class _Member:
    """A layer's part of a merged directory."""

    layer: int
    descriptor: int


@dataclass(slots=True)
class _Directory:
    name: bytes
    members: list[_Member] = field(default_factory=list)

    def close(self) -> None:
        if self.name:  # the root's are borrowed
            for member in self.members:
                os.close(member.descriptor)
        self.members.clear()


class Union:
    """The union of layers given as descriptors of their root directories (borrowed), top first."""

    def __init__(self, roots: Sequence[int], *, userxattr: bool = False) -> None:
        self._roots = roots
        self._prefix = "user.overlay." if userxattr else "trusted.overlay."
        self._chain: list[_Directory] = []

    def close(self) -> None:
        """Close what the last path left open."""
        while self._chain:
            self._chain.pop().close()

    def lookup(self, path: bytes) -> Entry | None:
        """What the layers provide at `path`; None if nothing. Raises OSError if a layer cannot be read."""
        found = self._locate(path)
        if found is None:
            return None
        descriptor = _open(found[1], found[2])
        if descriptor is None:
            return None
        try:
            return Entry(found[0], handle_of(descriptor), stat.S_ISDIR(os.stat(descriptor).st_mode))
        finally:
            os.close(descriptor)

    def exists(self, path: bytes) -> bool:
        """Whether the layers provide anything at `path`. Raises OSError."""
        return self._locate(path) is not None

    def open(self, path: bytes) -> int | None:
        """An owned O_PATH descriptor of the object that `lookup` describes."""
        found = self._locate(path)
        return None if found is None else _open(found[1], found[2])

    def _locate(self, path: bytes) -> tuple[int, int, bytes] | None:
        """The layer that provides a path, the descriptor (borrowed) of its directory there, and the name in it."""
        if not path:
            return 0, self._roots[0], b"."
        parent, _, name = path.rpartition(b"/")
        for member in self._members(parent):
            try:
                status = os.stat(name, dir_fd=member.descriptor, follow_symlinks=False)
            except OSError as error:
                if error.errno in _ABSENT:
                    continue
                raise
            if self._is_whiteout(status, member, name):
                return None
            return member.layer, member.descriptor, name
        return None

    def listing(self, path: bytes) -> dict[bytes, bool]:
        """The names of a merged directory and whether each is a directory. Raises OSError."""
        names: dict[bytes, bool] = {}
        hidden: set[bytes] = set()
        for member in self._members(path):
            for name, status in _scan(member.descriptor):
                if name in names or name in hidden:
                    continue
                if self._is_whiteout(status, member, name):
                    hidden.add(name)
                else:
                    names[name] = stat.S_ISDIR(status.st_mode)
        return names

    def depth(self, path: bytes) -> int:
        """How many layers merge in the directory at `path`."""
        return len(self._members(path))

    def _members(self, path: bytes) -> list[_Member]:
        """The parts of the merged directory at `path`, top first; empty if it is none."""
        names = path.split(b"/") if path else []
        if not self._chain:
            self._chain.append(self._open_root())
        keep = 0
        while keep < len(names) and keep + 1 < len(self._chain) and self._chain[keep + 1].name == names[keep]:
            keep += 1
        while len(self._chain) > keep + 1:
            self._chain.pop().close()
        while keep < len(names):
            parent = self._chain[-1]
            # Where one layer is left, nothing can hide or redirect what is below, and one step goes all the way.
            alone = len(parent.members) == 1 and parent.members[0].layer == len(self._roots) - 1
            name = b"/".join(names[keep:]) if alone else names[keep]
            self._chain.append(self._descend(parent, name))
            keep = len(names) if alone else keep + 1
        return self._chain[-1].members

    def _open_root(self) -> _Directory:
        return _Directory(b"", [_Member(layer, root) for layer, root in enumerate(self._roots)])

    def _descend(self, parent: _Directory, name: bytes) -> _Directory:
        directory = _Directory(name)
        name_below: bytes = name
        for member in parent.members:
            base, relative = member.descriptor, name_below
            if name_below.startswith(b"/"):
                base, relative = self._roots[member.layer], name_below.strip(b"/")
            descriptor = try_openat2(base, relative, flags=_OPEN_DIRECTORY)
            if descriptor < 0:
                if -descriptor in _NOTHING:
                    continue
                if -descriptor in _ABSENT:
                    break  # not a directory, a whiteout among others: what is below is hidden
                raise OSError(-descriptor, os.strerror(-descriptor), os.fsdecode(relative))
            directory.members.append(_Member(member.layer, descriptor))
            if member.layer == len(self._roots) - 1:
                break
            marks = self._marks(descriptor)
            if "opaque" in marks and self._xattr(descriptor, "opaque") == b"y":
                break
            if "redirect" in marks:
                name_below = self._xattr(descriptor, "redirect") or name_below
        return directory

    def _is_whiteout(self, status: os.stat_result, member: _Member, name: bytes) -> bool:
        if stat.S_ISCHR(status.st_mode):
            return status.st_rdev == 0
        if stat.S_ISREG(status.st_mode) and status.st_size == 0 and self._xattr(member.descriptor, "opaque") == b"x":
            return self._xattr(member.descriptor, "whiteout", name) is not None
        return False

    def _marks(self, descriptor: int) -> set[str]:
        """Which of overlay's xattrs a directory has."""
        try:
            names = os.listxattr(b"/proc/self/fd/%d" % descriptor)
        except OSError:
            return set()
        return {name.removeprefix(self._prefix) for name in names if name.startswith(self._prefix)}

    def _xattr(self, descriptor: int, attribute: str, name: bytes = b"") -> bytes | None:
        path = b"/proc/self/fd/%d" % descriptor + (b"/" + name if name else b"")
        try:
            return os.getxattr(path, self._prefix + attribute, follow_symlinks=not name)
        except OSError:
            return None


def _open(directory: int, name: bytes) -> int | None:
    descriptor = try_openat2(directory, name)
    if descriptor >= 0:
        return descriptor
    if -descriptor in _ABSENT:
        return None
    raise OSError(-descriptor, os.strerror(-descriptor), os.fsdecode(name))


def _scan(directory: int) -> list[tuple[bytes, os.stat_result]]:
    listing = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        found = []
        with os.scandir(listing) as entries:
            for entry in entries:
                try:
                    found.append((os.fsencode(entry.name), entry.stat(follow_symlinks=False)))
                except OSError:  # gone since it was listed
                    continue
        return found
    finally:
        os.close(listing)
