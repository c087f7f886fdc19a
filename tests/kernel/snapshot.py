"""What is in a tree, and by what two such looks differ: written without a line of watchd's."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator
from typing import NamedTuple

Json = dict[str, object]


class Seen(NamedTuple):
    """An object at a path."""

    inode: int
    mode: int
    owner: tuple[int, int]
    size: int
    ctime_ns: int
    mtime_ns: int

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


Snapshot = dict[bytes, Seen]
"""By path below the root, which is b""."""


def snapshot(root: bytes) -> Snapshot:
    """Everything in the tree."""
    return dict(_look(root, b""))


def _look(root: bytes, path: bytes) -> Iterator[tuple[bytes, Seen]]:
    full = os.path.join(root, path) if path else root
    status = os.lstat(full)
    owner = status.st_uid, status.st_gid
    yield path, Seen(status.st_ino, status.st_mode, owner, status.st_size, status.st_ctime_ns, status.st_mtime_ns)
    if stat.S_ISDIR(status.st_mode):
        for name in sorted(os.listdir(full)):
            yield from _look(root, os.path.join(path, name) if path else name)


def differences(before: Snapshot, after: Snapshot) -> dict[bytes, frozenset[str]]:
    """Path -> kinds, for every path that is another than before."""
    replaced = {path for path in before.keys() & after.keys() if _is_other(before[path], after[path])}
    found = {}
    for path in before.keys() | after.keys():
        if path not in after:
            found[path] = frozenset({"delete"})
        elif path not in before:
            found[path] = frozenset({"create"})
        elif path in replaced or any(above in replaced for above in _above(path)):
            found[path] = frozenset({"create", "delete"})
        else:
            found[path] = _changed(before[path], after[path])
    return {path: kinds for path, kinds in found.items() if kinds}


def only_tagged(before: Snapshot, after: Snapshot) -> set[bytes]:
    """Directories of which only an attribute without a place in stat(2) changed: names that came and went may hide it."""
    return {
        path
        for path, kinds in differences(before, after).items()
        if path in before
        and after.get(path, before[path]).is_directory
        and kinds == {"attrib"}
        and (before[path].mode, before[path].owner) == (after[path].mode, after[path].owner)
    }


def _above(path: bytes) -> Iterator[bytes]:
    while path:
        path = path.rpartition(b"/")[0]
        yield path


def _is_other(before: Seen, after: Seen) -> bool:
    return before.inode != after.inode or stat.S_IFMT(before.mode) != stat.S_IFMT(after.mode)


def _changed(before: Seen, after: Seen) -> frozenset[str]:
    kinds = set()
    if (before.mode, before.owner) != (after.mode, after.owner):
        kinds.add("attrib")
    if not after.is_directory and (before.mtime_ns, before.size) != (after.mtime_ns, after.size):
        kinds.add("modify")
    if not kinds and before.ctime_ns != after.ctime_ns and before.mtime_ns == after.mtime_ns:
        kinds.add("attrib")
    return frozenset(kinds)


class Wilderness:
    """Does at random to a tree what can be done to one."""

    def __init__(self, root: bytes, random: random.Random) -> None:
        self._root, self._random = root, random
        self._number = 0

    def grow(self, entries: int) -> None:
        """Make so many things."""
        for _ in range(entries):
            self._make()

    def churn(self, steps: int) -> None:
        """Do so many things."""
        for _ in range(steps):
            action = self._random.choice(
                [self._make, self._make, self._write, self._chmod, self._chown, self._remove, self._rename, self._tag]
            )
            action()

    def _paths(self, *, directories: bool) -> list[bytes]:
        found = [self._root] if directories else []
        for base, below, files in os.walk(self._root):
            found += [os.path.join(base, name) for name in (below if directories else [*below, *files])]
        return sorted(found)

    def _new(self) -> bytes:
        self._number += 1
        name = self._random.choice([b"n%d", b"\xff%d", b"a%d", b"z z%d"]) % (self._number % 40)
        return os.path.join(self._random.choice(self._paths(directories=True)), name)

    def _any(self) -> bytes | None:
        paths = self._paths(directories=False)
        return self._random.choice(paths) if paths else None

    def _make(self) -> None:
        path = self._new()
        if os.path.lexists(path):
            return
        sort = self._random.randrange(4)
        if sort == 0:
            os.symlink(b"target", path)
        elif sort == 1:
            with open(path, "wb") as file:
                file.write(b"x" * self._random.randrange(100))
        else:
            os.mkdir(path)

    def _write(self) -> None:
        path = self._any()
        if path is not None and stat.S_ISREG(os.lstat(path).st_mode):
            with open(path, "ab") as file:
                file.write(b"more")

    def _chmod(self) -> None:
        path = self._any()
        if path is not None and not os.path.islink(path):
            os.chmod(path, self._random.choice([0o700, 0o755, 0o711]))

    def _chown(self) -> None:
        path = self._any()
        if path is not None:
            os.chown(path, self._random.randrange(3), 0, follow_symlinks=False)

    def _tag(self) -> None:
        path = self._any()
        if path is not None and not os.path.islink(path):
            os.setxattr(path, b"trusted.tag", b"%d" % self._random.randrange(100))

    def _remove(self) -> None:
        path = self._any()
        if path is None:
            return
        if not os.path.isdir(path) or os.path.islink(path):
            os.unlink(path)
            return
        for base, below, files in os.walk(path, topdown=False):
            for name in files:
                os.unlink(os.path.join(base, name))
            for name in below:
                full = os.path.join(base, name)
                os.unlink(full) if os.path.islink(full) else os.rmdir(full)
        os.rmdir(path)

    def _rename(self) -> None:
        path, new = self._any(), self._new()
        if path is not None and not (new + b"/").startswith(path + b"/"):
            try:
                os.rename(path, new)
            except OSError:
                return  # onto something that is in the way
