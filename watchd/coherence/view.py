"""Compare what a merged mount says with what its layers hold, name by name.

Facts
* openat2(RESOLVE_CACHED) answers from the dentry cache alone and leaves it as it was. A name of the merged mount that is not
  cached cannot be stale: its next lookup goes to the layers. So a name that nobody looked up costs one system call, its
  directory's one if that is not cached either, and verification itself caches nothing that could become stale later.
* It never waits, so a mount or rename anywhere on the host at this moment makes it miss what is cached: with somebody mounting
  in a loop 0.9 % of the calls, two in a row 0.01 %. Only several misses in a row mean that a name is not cached.
* A file with metacopy keeps the file that it found its content in at the first open; one that it did not find it looks for
  again. Its handle, times and size are its own and say nothing of that one, so the content has to be compared.
* A pinned dentry pins its ancestors, so below an uncached directory nothing is stale.
* Directories are shared by inode: under a new name that nobody looked up yet, a renamed lower directory shows what its old name
  stands for, as long as that is in use, or says ESTALE where an upper has part in it. So where a directory stays stale, new
  names of directories are looked up in earnest.
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
from watchd.kernel.files import CONFINED, RESOLVE_CACHED, FileHandle, try_openat2
from watchd.overlay.access import revealed_handle
from watchd.overlay.union import Entry, Union
from watchd.records import Kind

STRUCTURE = int(Kind.CREATE | Kind.DELETE | Kind.RENAME)
CACHED_TRIES = 6
"""Nearly independent, so six misses in a row of something cached are less likely than 1e-10."""

COMPARED_BYTES = 1 << 20
"""So much of files is compared whose content cannot be told apart otherwise."""

FEW = 4
"""Up to so many suspects their directories are not asked for first."""

UNCACHED = -1
NEGATIVE = -2

_OF_DIRECTORIES = frozenset({"ghost", "replaced", "listing"})
"""How a directory can be stale that may have a new name."""

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
            self._union = Union(self._roots(self.target.layers), userxattr=self.target.userxattr)
        return self._union

    def _roots(self, layers: Iterable[LayerRoot]) -> list[int]:
        """Their root directories, borrowed. Raises LayerError."""
        roots = []
        for layer in layers:
            roots.append(self._handles.borrow(layer))
            self._borrowed.append(layer)
        return roots

    def stale(self, suspects: Mapping[bytes, int], *, acted: bool) -> Iterator[Stale]:
        """The stale ones among the suspects (path -> `Kind` bits). Raises LayerError, OSError.

        Before an action (`acted` false) also those that may be stale in a way that cannot be seen from outside.
        """
        if self.target.renames_directories:
            suspects = self._under_merged_names(suspects)
        cached: dict[bytes, bool] = {b"": True}
        ask_directories = self._cache_tells and len(suspects) > FEW
        unknown: list[bytes] = []
        is_held = False
        for path in sorted(suspects):
            if ask_directories and not self._is_cached(path.rpartition(b"/")[0], cached):
                unknown.append(path)
                continue
            descriptor = self._cached(path)
            if descriptor == UNCACHED:
                unknown.append(path)
                continue
            kind = self._judge(path, descriptor, suspects[path], acted=acted)
            if kind is not None:
                is_held = is_held or kind in _OF_DIRECTORIES
                yield Stale(path, kind)
        if acted and is_held:
            yield from self._stale_under_new_names(unknown)

    def _under_merged_names(self, suspects: Mapping[bytes, int]) -> Mapping[bytes, int]:
        """The suspects, paths in a layer, with the names that they have in the merged mount where directories were renamed."""
        inside: dict[bytes, dict[bytes, int]] = {}
        for path, kinds in suspects.items():
            parent, _, name = path.rpartition(b"/")
            inside.setdefault(parent, {})[name] = kinds
        renamed: dict[bytes, int] = {}
        for directory in self._cached_directories():
            for place in self.union.places(directory) if directory else ():
                if place != directory and place in suspects:
                    renamed[directory] = renamed.get(directory, 0) | suspects[place]
                for name, kinds in inside.get(place, {}).items() if place != directory else ():
                    path = directory + b"/" + name
                    renamed[path] = renamed.get(path, 0) | kinds
        return {**suspects, **{path: kinds | suspects.get(path, 0) for path, kinds in renamed.items()}}

    def _cached_directories(self) -> Iterator[bytes]:
        """Those that the layers have and the merged mount has cached."""
        pending = [b""]
        while pending:
            directory = pending.pop()
            yield directory
            below = [name for name, is_dir in self.union.listing(directory).items() if is_dir]
            paths = [directory + b"/" + name if directory else name for name in below]
            cached = {directory: True}
            pending += [path for path in paths if self._is_cached(path, cached)]

    def _stale_under_new_names(self, unknown: Iterable[bytes]) -> Iterator[Stale]:
        for path in unknown:
            if not self._is_directory(path) or (descriptor := self._find(path)) == UNCACHED:
                continue
            if (kind := self._judge(path, descriptor, int(Kind.CREATE), acted=True)) is not None:
                yield Stale(path, kind)

    def pinned(self, stale: Sequence[Stale]) -> tuple[Stale, ...]:
        """The same with the processes that hold each. Looks through all processes."""
        device = os.fstat(self.merged).st_dev
        objects = {entry.path: self._object(entry.path) for entry in stale}
        holders = find_holders(Wanted(device, self.target.shown_at, objects, self.target.around))
        unheld = [entry.path for entry in stale if entry.path not in holders and self._is_directory(entry.path)]
        if unheld:
            # Under its new name a directory is what its old one is kept as; which that was, nothing tells.
            former = {one for entry in stale if entry.kind in _OF_DIRECTORIES for one in holders.get(entry.path, ())}
            holders |= dict.fromkeys(unheld, tuple(sorted(former)))
        return tuple(msgspec.structs.replace(entry, pinned_by=holders.get(entry.path, ())) for entry in stale)

    def _is_directory(self, path: bytes) -> bool:
        expected = self.union.lookup(path)
        return expected is not None and expected.is_dir

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

    def look_up(self, path: bytes) -> None:
        """Have the merged mount look for a name and so cache what it finds, or that it finds nothing. Raises OSError."""
        descriptor = self._find(path)
        if descriptor >= 0:
            os.close(descriptor)

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

    def may_list_from_memory(self, directory: bytes) -> bool:
        """Whether a directory is cached and merged, so that its listing may be one that somebody has read. Raises LayerError,
        OSError."""
        descriptor = self._cached(directory)
        if descriptor < 0:
            return False
        os.close(descriptor)
        return self.union.is_merged(directory)

    def lists_otherwise(self, directory: bytes) -> bool:
        """Whether a directory that is cached and merged lists other names than its layers have. Raises LayerError, OSError.

        One that a single layer provides is never listed from memory.
        """
        descriptor = self._cached(directory)
        if descriptor < 0:
            return False
        try:
            return self.union.is_merged(directory) and self.lists_other_names(directory, descriptor)
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
            descriptor = self._find(path, resolve=resolve)
            if descriptor != UNCACHED:
                return descriptor
        return UNCACHED

    def _find(self, path: bytes, *, resolve: int = CONFINED) -> int:
        descriptor = try_openat2(self.merged, path or b".", resolve=resolve)
        if descriptor >= 0:
            return descriptor
        if -descriptor in _NOTHING_THERE:
            return NEGATIVE
        if descriptor != -errno.EAGAIN:
            raise OSError(-descriptor, os.strerror(-descriptor), os.fsdecode(path))
        return UNCACHED

    def _judge(self, path: bytes, descriptor: int, kinds: int, *, acted: bool) -> str | None:
        """What is wrong with a name of which `descriptor` (taken over) is what is cached."""
        if descriptor < 0:
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
            if self.lists_other_names(path, descriptor):
                return "listing"
        if kinds & STRUCTURE and not expected.is_dir and self.target.splits_files and self.union.is_metacopy(path):
            return "replaced" if not acted or self._has_other_content(path, descriptor) else None
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
        real = revealed_handle(descriptor)
        if real is None or expected.handle is None:
            return self._looks_same(path, descriptor)
        revealed = FileHandle(real.type, real.fid)
        if real.in_upper or not self._is_upper(expected):
            return revealed == expected.handle
        if expected.is_dir:
            return revealed == self.union.second(path)
        return self._looks_same(path, descriptor)  # what is revealed is what it was copied up from

    def _has_other_content(self, path: bytes, descriptor: int) -> bool:
        """For files that have their content from another one, of which nothing is told; the first bytes of it have to do."""
        real = self.union.content(path, self._roots(self.target.data_only))
        if real is None:
            return _beginning(descriptor) is not None
        try:
            return _beginning(descriptor) != _beginning(real)  # a read goes on behind the size, which is its own
        finally:
            os.close(real)

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

    def lists_other_names(self, path: bytes, descriptor: int) -> bool:
        """Whether a directory of the merged mount (open by O_PATH) lists other names than its layers have to be listed.

        Raises LayerError, OSError."""
        differing = _listed(descriptor) ^ self.union.listing(path).keys()
        if not differing:
            return False
        # The larger the directory, the likelier it changed between the two: only what differs is looked at again.
        prefix = path + b"/" if path else b""
        there = {name: self.union.exists(prefix + name) for name in differing}
        shown = _listed(descriptor)
        return any(
            is_there != (name in shown)
            and is_there == self.union.exists(prefix + name)
            and not (is_there and self._lacks_content(prefix + name))
            for name, is_there in there.items()
        )

    def _lacks_content(self, path: bytes) -> bool:
        """Whether it is a file whose content is gone: directories that the upper has part in leave it out of their listings."""
        if not self.target.splits_files or not self.union.is_metacopy(path):
            return False
        content = self.union.content(path, self._roots(self.target.data_only))
        if content is not None:
            os.close(content)
        return content is None


def _inspect_attributes(descriptor: int, real: int) -> Finding:
    status = os.stat(real)
    if stat.S_ISLNK(status.st_mode):
        return IN_ORDER
    program = status if stat.S_ISREG(status.st_mode) and status.st_mode & _EXECUTABLE else None
    return Finding(True, "permission" if access_differs(descriptor, real) else None, program)


def _listed(descriptor: int) -> set[bytes]:
    """The names that a directory, open by O_PATH, lists now. Raises OSError."""
    listing = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=descriptor)
    try:
        return set(map(os.fsencode, os.listdir(listing)))
    finally:
        os.close(listing)


def _beginning(descriptor: int) -> bytes | None:
    """The first bytes of a file that is open by O_PATH; None if it cannot be read."""
    try:
        file = os.open(b"/proc/self/fd/%d" % descriptor, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.pread(file, COMPARED_BYTES, 0)
    except OSError:
        return None
    finally:
        os.close(file)


def _fingerprint(descriptor: int) -> tuple[int, ...]:
    status = os.stat(descriptor)
    size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return stat.S_IFMT(status.st_mode), status.st_mtime_ns, status.st_ctime_ns, size
