"""Walk the directories of a tree that may change meanwhile, with a handful of descriptors and without recursion.

Facts
* A directory is opened as a single component below the descriptor of its parent, by openat2 that follows no link and crosses
  no mount.
* One path may have 4095 bytes at most (PATH_MAX), a tree may be deeper: long paths are opened piece by piece.
* A directory that was closed meanwhile and is opened by its path again may be another one by then. It is compared by device
  and inode, and left alone if it is another.
* A filesystem counts subdirectories in a directory's links, or it does not (btrfs, overlayfs, many FUSE servers). Where a
  parent has exactly two links more than subdirectories it does, and there a directory with two links has no
  subdirectories: who looks for directories only need not list it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat

from watchd.kernel.files import O_PATH_DIRECTORY, openat2

LISTABLE = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

PATH_PIECE = 4000

Failed = Callable[[bytes, OSError], None]


def join(path: bytes, name: bytes) -> bytes:
    """The path of a name in a directory whose path is b"" for the root."""
    return path + b"/" + name if path else name


@dataclass(slots=True, eq=False)
class Directory:
    """A directory on the walk. Its descriptor is the walk's and open only until the walk goes on."""

    path: bytes
    """From the root of the walk; b"" is the root."""
    name: bytes = b""
    """Its last component."""
    parent: Directory | None = None
    descriptor: int = -1
    tag: int = 0
    """For whoever walks."""
    descend: list[bytes] = field(default_factory=list)
    """The names of the subdirectories to walk, filled in by whoever walks, before the walk goes on."""
    descend_tags: Sequence[int] = ()
    """Their tags, where whoever walks knows them by then."""
    identity: tuple[int, int] | None = None
    _packed: bytes = b""
    counts_links: bool = False

    def child(self, name: bytes) -> bytes:
        """The path of a name in this directory."""
        return join(self.path, name)

    def is_leaf(self) -> bool:
        """Whether this surely has no subdirectories, known without listing it; False may mean anything. Raises OSError."""
        return self.parent is not None and self.parent.counts_links and os.fstat(self.descriptor).st_nlink == 2

    def pack(self) -> None:
        """Its turn to be descended into comes later: a tenth of the memory holds its names until then."""
        self._packed, self.descend = b"\0".join(self.descend), []

    def unpack(self) -> None:
        """Its turn has come."""
        if self._packed:
            self._packed, self.descend = b"", self._packed.split(b"\0")

    def close(self) -> None:
        """Close the descriptor, if it is open."""
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)


def open_below(root: int, path: bytes, *, flags: int = O_PATH_DIRECTORY) -> int:
    """Open a directory by its path below `root`, however long, following nothing; an owned descriptor. Raises OSError."""
    base = -1
    try:
        while len(path) > PATH_PIECE:
            cut = path.rfind(b"/", 0, PATH_PIECE)
            if cut < 0:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            base, previous = openat2(root if base < 0 else base, path[:cut], flags=O_PATH_DIRECTORY), base
            if previous >= 0:
                os.close(previous)
            path = path[cut + 1 :]
        return openat2(root if base < 0 else base, path or b".", flags=flags)
    finally:
        if base >= 0:
            os.close(base)


class Walk:
    """Iterates over the directory at `start` and all below that its user asks for in `Directory.descend`, parents first.

    What cannot be opened or listed is told to `failed` with its path and left out.
    """

    def __init__(self, root: int, start: bytes = b"", *, failed: Failed) -> None:
        self._root = root
        self._start = start
        self._failed = failed
        self._pending: list[Directory] = []
        self._newest: Directory | None = None

    def __iter__(self) -> Iterator[Directory]:
        parent = child = self._enter(self._root, self._start, Directory(self._start))
        try:
            if child is not None:
                yield child
                self._leave(child)
            while self._pending:
                parent = self._pending.pop()
                if parent is self._newest:
                    self._newest = None
                if not self._reopen(parent):
                    continue
                parent.unpack()
                for name, tag in zip(parent.descend, chain(parent.descend_tags, repeat(0)), strict=False):
                    child = self._enter(parent.descriptor, name, Directory(parent.child(name), name, parent, tag=tag))
                    if child is not None:
                        yield child
                        self._leave(child)
                parent.close()
                parent.descend, parent.descend_tags = [], ()
        finally:
            for directory in (parent, child, self._newest):
                if directory is not None:
                    directory.close()

    def entries(self, directory: Directory) -> Iterator[tuple[bytes, bool, os.DirEntry[str]]]:
        """List the directory that was yielded last: name, whether it is a directory, and the entry itself."""
        try:
            with os.scandir(directory.descriptor) as entries:
                for entry in entries:
                    yield os.fsencode(entry.name), entry.is_dir(follow_symlinks=False), entry
        except OSError as error:
            self._failed(directory.path, error)

    def subdirectories(self, directory: Directory) -> list[bytes]:
        """The names of the directories in the directory that was yielded last."""
        if directory.is_leaf():
            return []
        return [name for name, is_dir, _ in self.entries(directory) if is_dir]

    def _enter(self, base: int, path: bytes, directory: Directory) -> Directory | None:
        try:
            # Single components need not pass through open_below: a walk spends its time here.
            enter = openat2 if directory.parent else open_below
            directory.descriptor = enter(base, path, flags=LISTABLE)
        except OSError as error:
            self._failed(directory.path, error)
            return None
        return directory

    def _leave(self, directory: Directory) -> None:
        """Close it, except that the newest with subdirectories stays open: it is mostly the next to be descended into."""
        if not directory.descend:
            directory.close()
            return
        status = os.fstat(directory.descriptor)
        directory.identity = (status.st_dev, status.st_ino)
        directory.counts_links = status.st_nlink == 2 + len(directory.descend)
        self._pending.append(directory)
        if self._newest is not None:
            self._newest.close()
            self._newest.pack()
        self._newest = directory

    def _reopen(self, directory: Directory) -> bool:
        if directory.descriptor >= 0:
            return True
        try:
            directory.descriptor = open_below(self._root, directory.path, flags=LISTABLE)
            status = os.fstat(directory.descriptor)
            if (status.st_dev, status.st_ino) != directory.identity:
                raise OSError(errno.ESTALE, "another directory took its place")
        except OSError as error:
            directory.close()
            self._failed(directory.path, error)
            return False
        return True
