"""Compare what a merged mount says with what its layers hold, name by name.

Facts
* openat2(RESOLVE_CACHED) answers from the dentry cache alone and leaves it as it was. A name of the merged mount that is not
  cached cannot be stale: its next lookup goes to the layers. So a name that nobody looked up costs one system call, its
  directory's one if that is not cached either, and verification itself caches nothing that could become stale later.
* It never waits, so a mount or rename anywhere on the host at this moment makes it miss what is cached: with somebody mounting
  in a loop 0.9 % of the calls, two in a row 0.01 %. Only several misses in a row mean that a name is not cached.
* A pinned dentry pins its ancestors, so below an uncached directory nothing is stale.
* Exact identity of a cached object: name_to_handle_at(AT_HANDLE_FID) on it reveals the handle of the real inode it stands for
  (6.6; which one is said in `watchd.wire.handles`). It names one object only; for a directory the names in it are compared as
  well. An overlay mounted in a user namespace and an outer one of nested overlays do not tell; there times, type and size have
  to do, which stat(2) gives of the real inode.
* Dentries of filesystems with a d_revalidate (FUSE, NFS, cgroup) are never found by RESOLVE_CACHED; there every name is looked
  up in earnest.
* stat(2) shows the attributes of the real inode, but permission checks use the cached ones: they are told apart only by asking
  for access as another user. A setuid bit that was taken away shows at execve(2) only: an executable whose attributes changed
  and that is still cached after an invalidation, because somebody uses it, cannot be verified and counts as stale.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from watchd.coherence.access import access_differs
from watchd.coherence.handles import Handles
from watchd.coherence.pins import Holder, Wanted, find_holders
from watchd.coherence.target import LayerRoot, Target
from watchd.errors import WireError
from watchd.kernel.files import (
    AT_EMPTY_PATH,
    AT_HANDLE_FID,
    CONFINED,
    RESOLVE_CACHED,
    FileHandle,
    name_to_handle_at,
    try_openat2,
)
from watchd.overlay.union import Entry, Union
from watchd.records import Kind
from watchd.wire.handles import OverlayHandle, parse_overlay_handle

STRUCTURE = int(Kind.CREATE | Kind.DELETE | Kind.RENAME)
CACHED_TRIES = 6
"""Nearly independent, so six misses in a row of something cached are less likely than 1e-10."""

FEW = 4
"""Up to so many suspects their directories are not asked for first."""

UNCACHED = -1
NEGATIVE = -2

_EXECUTABLE = stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH

_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)


class Stale(msgspec.Struct, frozen=True, gc=False):
    """A name whose merged view is wrong. `kind` is one of the contract's words for `stale` in `status --json`."""

    path: bytes
    kind: str
    pinned_by: tuple[Holder, ...] = ()
    reason: str = ""
    """Why it could not be repaired, or what happened to it; a sentence for people."""


class Finding(NamedTuple):
    """What is to be said of one name."""

    is_there: bool
    """An object is cached under that name."""
    kind: str | None = None
    """How it is stale, None if it is not."""
    program: os.stat_result | None = None
    """What the lower has there, if that can be executed: it may be in the cache with a setuid bit that was taken away."""


NOT_CACHED = Finding(is_there=False)
IN_ORDER = Finding(is_there=True)


class View:
    """A merged mount and its layers, open for the length of one piece of work."""

    def __init__(self, target: Target, handles: Handles) -> None:
        """Raises MountError."""
        self.target, self._handles = target, handles
        self._borrowed: list[LayerRoot] = []
        self._union: Union | None = None
        self.merged = target.open()
        self._cache_tells = all(layer.cache_tells for layer in target.layers)

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        if self._union is not None:
            self._union.close()
        for layer in self._borrowed:
            self._handles.give_back(layer)
        os.close(self.merged)

    @property
    def union(self) -> Union:
        """The layers, opened when first asked for. Raises LayerError."""
        if self._union is None:
            roots = []
            for layer in self.target.layers:
                roots.append(self._handles.borrow(layer))
                self._borrowed.append(layer)
            self._union = Union(roots, userxattr=self.target.userxattr)
        return self._union

    def stale(self, suspects: Mapping[bytes, int], *, acted: bool) -> Iterator[Stale]:
        """The stale ones among the suspects (path -> `Kind` bits). Raises LayerError, OSError.

        Before an action (`acted` false) also those that may be stale in a way that cannot be seen from outside.
        """
        cached: dict[bytes, bool] = {b"": True}
        ask_directories = self._cache_tells and len(suspects) > FEW
        for path in sorted(suspects):
            if ask_directories and not self._is_cached(path.rpartition(b"/")[0], cached):
                continue
            kind = self._judge(path, suspects[path], acted=acted)
            if kind is not None:
                yield Stale(path, kind)

    def pinned(self, stale: Sequence[Stale]) -> tuple[Stale, ...]:
        """The same with the processes that hold each. Looks through all processes."""
        device = os.fstat(self.merged).st_dev
        objects = {entry.path: self._object(entry.path) for entry in stale}
        holders = find_holders(Wanted(device, self.target.shown_at, objects))
        return tuple(msgspec.structs.replace(entry, pinned_by=holders.get(entry.path, ())) for entry in stale)

    @property
    def upper(self) -> int | None:
        """The root of the upper (borrowed), None if there is none. Raises LayerError."""
        return self.union.root(0) if self.target.has_upper else None

    def inspect(self, path: bytes) -> Finding:
        """All that can be seen to be wrong with one name by itself, whatever happened to it. Raises LayerError, OSError.

        What a directory lists is not compared. A stale setuid bit is not seen.
        """
        descriptor = self._cached(path)
        if descriptor == UNCACHED:
            return NOT_CACHED
        if descriptor == NEGATIVE:
            return Finding(is_there=False, kind="missing" if self.union.exists(path) else None)
        try:
            taken = self.union.take(path)
            if taken is None:
                return Finding(is_there=True, kind="ghost")
            expected, real = taken
            try:
                if not self._is_same(path, descriptor, expected):
                    return Finding(is_there=True, kind="replaced")
                return IN_ORDER if self._is_upper(expected) else _inspect_attributes(descriptor, real)
            finally:
                os.close(real)
        finally:
            os.close(descriptor)

    def open_cached(self, path: bytes) -> int | None:
        """An owned descriptor (O_PATH) of what the merged mount has cached at a path; None if that is nothing."""
        descriptor = self._cached(path)
        return descriptor if descriptor >= 0 else None

    def _object(self, path: bytes) -> tuple[int, int] | None:
        descriptor = self._cached(path)
        if descriptor < 0:
            return None
        try:
            status = os.stat(descriptor)
            return status.st_dev, status.st_ino
        finally:
            os.close(descriptor)

    def cached_mode(self, path: bytes) -> int | None:
        """st_mode of the object that the merged mount has cached under this name; None if it has none. Raises OSError."""
        descriptor = self._cached(path)
        if descriptor < 0:
            return None
        try:
            return os.stat(descriptor).st_mode
        finally:
            os.close(descriptor)

    def cached_names(self) -> Generator[tuple[bytes, int], None, None]:
        """Every name that the layers have and that the merged mount has cached, as suspects; uncached subtrees are skipped.

        The root, always cached, comes first."""
        yield b"", int(Kind.CREATE)
        pending = [b""]
        while pending:
            directory = pending.pop()
            for name, is_dir in self.union.listing(directory).items():
                path = directory + b"/" + name if directory else name
                descriptor = self._cached(path)
                if descriptor == UNCACHED:
                    continue
                if descriptor >= 0:
                    os.close(descriptor)
                    if is_dir:
                        pending.append(path)
                yield path, int(Kind.CREATE)

    def lists_otherwise(self, directory: bytes) -> bool:
        """Whether a directory that is cached and merged lists other names than its layers have. Raises LayerError, OSError.

        One that a single layer provides is never listed from memory.
        """
        descriptor = self._cached(directory)
        if descriptor < 0:
            return False
        try:
            # Twice, because it may change between the two looks of one comparison.
            return self.union.is_merged(directory) and all(
                self._lists_otherwise(directory, descriptor) for _ in range(2)
            )
        except (FileNotFoundError, NotADirectoryError):
            return False
        finally:
            os.close(descriptor)

    def _is_cached(self, directory: bytes, cached: dict[bytes, bool]) -> bool:
        """Whether a directory is in the merged mount's cache, going down from the root with a memory of the answers."""
        known = cached.get(directory)
        if known is None:
            known = self._is_cached(directory.rpartition(b"/")[0], cached)
            if known:
                descriptor = self._cached(directory)
                known = descriptor != UNCACHED
                if descriptor >= 0:
                    os.close(descriptor)
            cached[directory] = known
        return known

    def _cached(self, path: bytes) -> int:
        """An owned descriptor of a cached object, or UNCACHED, or NEGATIVE. Raises OSError."""
        resolve = CONFINED | (RESOLVE_CACHED if self._cache_tells else 0)
        for _ in range(CACHED_TRIES):
            descriptor = try_openat2(self.merged, path or b".", resolve=resolve)
            if descriptor >= 0:
                return descriptor
            if -descriptor in _NOTHING_THERE:
                return NEGATIVE
            if descriptor != -errno.EAGAIN:
                raise OSError(-descriptor, os.strerror(-descriptor), os.fsdecode(path))
        return UNCACHED

    def _judge(self, path: bytes, kinds: int, *, acted: bool) -> str | None:
        descriptor = self._cached(path)
        if descriptor == UNCACHED:
            return None
        if descriptor == NEGATIVE:
            return "missing" if self.union.exists(path) else None
        try:
            expected = self.union.lookup(path)
            if expected is None:
                return "ghost"
            return self._judge_object(path, descriptor, expected, kinds, acted=acted)
        finally:
            os.close(descriptor)

    def _judge_object(self, path: bytes, descriptor: int, expected: Entry, kinds: int, *, acted: bool) -> str | None:
        if not self._is_same(path, descriptor, expected):
            return "replaced"
        if expected.is_dir and kinds & STRUCTURE and len(self.target.layers) > 1:
            # The handle names one directory only; those merged with it may be others than the cached ones.
            if not acted:
                return "listing"
            if self._lists_otherwise(path, descriptor):
                return "listing"
        if kinds & Kind.ATTRIB and not self._is_upper(expected):
            if not acted:
                return "permission"  # a stale setuid bit shows at execve only, so nobody is asked
            if self._grants_otherwise(path, descriptor):
                return "permission"
        return None

    def _is_upper(self, entry: Entry) -> bool:
        """Whether the upper provides it: its attributes are changed by way of the overlay only."""
        return self.target.has_upper and entry.layer == 0

    def _is_same(self, path: bytes, descriptor: int, expected: Entry) -> bool:
        """Whether a cached object stands for the one that the layers provide now."""
        real = _identity(descriptor)
        if real is None or expected.handle is None:
            return self._looks_same(path, descriptor)
        revealed = FileHandle(real.type, real.fid)
        if real.in_upper or not self._is_upper(expected):
            return revealed == expected.handle
        if expected.is_dir:
            return revealed == self.union.second(path)
        return self._looks_same(path, descriptor)  # what is revealed is what it was copied up from

    def _looks_same(self, path: bytes, descriptor: int) -> bool:
        """For overlays that tell no handle: attributes come from the real inode, so they tell one object from another."""
        real = self.union.open(path)
        if real is None:
            return False
        try:
            return _fingerprint(descriptor) == _fingerprint(real)
        finally:
            os.close(real)

    def _grants_otherwise(self, path: bytes, descriptor: int) -> bool:
        real = self.union.open(path)
        if real is None:
            return True
        try:
            mode = os.stat(real).st_mode
            # In use since before the action, so perhaps still setuid: that shows at execve only.
            executable = stat.S_ISREG(mode) and bool(mode & _EXECUTABLE)
            return executable or access_differs(descriptor, real)
        finally:
            os.close(real)

    def _lists_otherwise(self, path: bytes, descriptor: int) -> bool:
        listing = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=descriptor)
        try:
            return set(_names(os.listdir(listing))) != set(self.union.listing(path))
        finally:
            os.close(listing)


def _inspect_attributes(descriptor: int, real: int) -> Finding:
    status = os.stat(real)
    if stat.S_ISLNK(status.st_mode):
        return IN_ORDER
    program = status if stat.S_ISREG(status.st_mode) and status.st_mode & _EXECUTABLE else None
    return Finding(True, "permission" if access_differs(descriptor, real) else None, program)


def _names(listing: Iterable[str]) -> Iterator[bytes]:
    return (os.fsencode(name) for name in listing)


def _fingerprint(descriptor: int) -> tuple[int, ...]:
    status = os.stat(descriptor)
    size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return stat.S_IFMT(status.st_mode), status.st_mtime_ns, status.st_ctime_ns, size


def _identity(descriptor: int) -> OverlayHandle | None:
    """The handle of the real object that an object of an overlay stands for; None if this kernel does not tell."""
    try:
        handle = name_to_handle_at(descriptor, flags=AT_EMPTY_PATH | AT_HANDLE_FID)
        return parse_overlay_handle(handle.type, handle.fid)
    except (OSError, WireError):
        return None
