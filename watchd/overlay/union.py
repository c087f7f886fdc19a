"""What the layers of an overlay add up to at one path: the union rules, applied to the layers as they are now.

Facts (Documentation/filesystems/overlayfs.rst, fs/overlayfs/namei.c and readdir.c of 6.18; held by a test against the kernel)
* Layers are searched from the top. The first entry that is no directory ends the search and provides the object; directories
  merge with those below until one is opaque (xattr overlay.opaque = "y") or something else than a directory is met.
* A whiteout is a character device 0:0 or an empty regular file with the xattr overlay.whiteout. It hides what is below. Lookup
  finds the latter anywhere; listings leave it out only in a directory whose overlay.opaque is "x".
* A directory that only one layer has is listed as it is, whiteouts and all, unless it has the xattr overlay.origin.
* overlay.redirect on a directory says under which name, or absolute path, the layers below have it. An absolute path is walked
  in all layers below from their roots, also in those that the parent does not consist of. The directories on its way are
  redirected and opaque in turn, except that an absolute redirect further on lifts an opaque one before it.
* The root is made of the roots of all layers whatever their xattrs, and the last layer's xattrs are not asked for.
* Data-only layers provide no names. A file with the xattr overlay.metacopy has its content in the first layer below that has
  the name without one; overlay.redirect names another one, and as a path from the root one in the data-only layers, too.
* Directories list their entries with their types (d_type), so only character devices have to be looked at.

Descriptors of directories are kept for the path last asked for and its ancestors only, so asking in sorted order is cheap and
the number of open files is bounded by depth times layers.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from watchd.kernel.files import O_PATH_DIRECTORY, FileHandle, try_openat2
from watchd.overlay.access import handle_of
from watchd.overlay.marks import Marks, is_whiteout

BATCH = 512
"""So many names of a directory are held at a time."""

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


class Name(NamedTuple):
    """A name in a directory of one of the layers."""

    name: bytes
    is_dir: bool
    listed: bool
    """The merged directory lists it; false for what a whiteout hides."""


@dataclass(slots=True)
class _Member:
    """A layer's part of a merged directory."""

    layer: int
    descriptor: int


@dataclass(slots=True)
class _Search:
    """The search for one directory, on its way down through the layers."""

    path: list[bytes]
    """What to look for in the next layer: one name in the parent, or components from the layer's root."""
    absolute: bool = False
    stop: bool = False
    """Nothing of the layers below belongs to it."""


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
        self._marks = Marks(userxattr=userxattr)
        self._chain: list[_Directory] = []

    def close(self) -> None:
        """Close what the last path left open."""
        while self._chain:
            self._chain.pop().close()

    def root(self, layer: int) -> int:
        """The root directory of a layer, borrowed."""
        return self._roots[layer]

    def lookup(self, path: bytes) -> Entry | None:
        """What the layers provide at `path`; None if nothing. Raises OSError if a layer cannot be read."""
        taken = self.take(path)
        if taken is None:
            return None
        os.close(taken[1])
        return taken[0]

    def take(self, path: bytes) -> tuple[Entry, int] | None:
        """What `lookup` gives, and an owned O_PATH descriptor of it. Raises OSError."""
        found = self._locate(path)
        if found is None:
            return None
        descriptor = _open(found[1], found[2])
        if descriptor is None:
            return None
        try:
            return Entry(found[0], handle_of(descriptor), stat.S_ISDIR(os.stat(descriptor).st_mode)), descriptor
        except BaseException:
            os.close(descriptor)
            raise

    def exists(self, path: bytes) -> bool:
        """Whether the layers provide anything at `path`. Raises OSError."""
        return self._locate(path) is not None

    def open(self, path: bytes, *, under: int = 0) -> int | None:
        """An owned O_PATH descriptor of the object that `lookup` describes; None if there is none. Raises OSError.

        `under`: as if the entries that so many upper layers have at this very path were not there.
        """
        found = self._locate(path, under=under)
        return None if found is None else _open(found[1], found[2])

    def _locate(self, path: bytes, *, under: int = 0) -> tuple[int, int, bytes] | None:
        """The layer that provides a path, the descriptor (borrowed) of its directory there, and the name in it."""
        if not path:
            return under, self._roots[under], b"."
        parent, _, name = path.rpartition(b"/")
        for member in self._members(parent):
            if member.layer < under:
                continue
            try:
                status = os.stat(name, dir_fd=member.descriptor, follow_symlinks=False)
            except OSError as error:
                if error.errno in _ABSENT:
                    continue
                raise
            if self._is_whiteout(status, member.descriptor, name):
                return None
            return member.layer, member.descriptor, name
        return None

    def listing(self, path: bytes) -> dict[bytes, bool]:
        """The names of a merged directory and whether each is a directory. Raises OSError."""
        listed: dict[bytes, bool] = {}
        unlisted: set[bytes] = set()
        for batch in self._names(path, lambda _, name: name in listed or name in unlisted):
            for name, is_dir, is_listed in batch:
                if is_listed:
                    listed[name] = is_dir
                else:
                    unlisted.add(name)
        return listed

    def names(self, path: bytes) -> Iterator[list[Name]]:
        """Every name that a layer's part of a merged directory has, whiteouts too, each once and in no order.

        Of a directory of any size only a batch is held, and other paths may be asked for between two batches. Raises OSError.
        """
        return self._names(path, _has_any)

    def _names(self, path: bytes, is_hidden: Callable[[Sequence[_Member], bytes], bool]) -> Iterator[list[Name]]:
        """`is_hidden` tells whether any of the parts above has a name."""
        members = self._members(path)
        alone = len(members) == 1 and self._marks.value(members[0].descriptor, "origin") is None
        for position in range(len(members)):
            now = self._members(path)
            if position >= len(now):
                return  # the directory changed meanwhile
            listing = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=now[position].descriptor)
            try:
                with os.scandir(listing) as entries:
                    marked = self._marks.value(listing, "opaque") == b"x"
                    while found := list(itertools.islice(entries, BATCH)):
                        above = self._members(path)[:position]
                        yield [
                            self._named(entry, listing, plain=alone, marked=marked)
                            for entry in found
                            if not is_hidden(above, os.fsencode(entry.name))
                        ]
            finally:
                os.close(listing)

    def is_merged(self, path: bytes) -> bool:
        """Whether more than one layer contributes to the directory at `path`. Raises OSError."""
        return len(self._members(path)) > 1

    def places(self, path: bytes) -> list[bytes]:
        """Where in their layers the parts of the merged directory at `path` lie, which redirects make another place. For roots
        that are mounts of their own, as detached clones are. Raises OSError."""
        links = [os.readlink(b"/proc/self/fd/%d" % member.descriptor) for member in self._members(path)]
        return [link.strip(b"/") for link in links]

    def is_metacopy(self, path: bytes) -> bool:
        """Whether the content of what the layers provide at `path` is another file's. Raises OSError."""
        descriptor = self.open(path)
        if descriptor is None:
            return False
        try:
            return "metacopy" in self._marks.of(descriptor)
        finally:
            os.close(descriptor)

    def content(self, path: bytes, data_only: Sequence[int] = ()) -> int | None:
        """An owned O_PATH descriptor of the file that holds the content of the one at `path`, None if it is gone.

        `data_only`: the roots of those layers, borrowed. Raises OSError.
        """
        parent, _, name = path.rpartition(b"/")
        for member in self._members(parent):
            descriptor = _open(member.descriptor, name)
            if descriptor is None:
                continue
            marks = self._marks.of(descriptor)
            if "metacopy" not in marks:
                return descriptor
            redirect = self._marks.value(descriptor, "redirect") if "redirect" in marks else None
            os.close(descriptor)
            if redirect and redirect.startswith(b"/"):
                return self._content_at(redirect.strip(b"/"), member.layer + 1, data_only)
            name = redirect or name
        return None

    def _content_at(self, path: bytes, layer: int, data_only: Sequence[int]) -> int | None:
        below = Union(self._roots[layer:], userxattr=self._marks.userxattr)
        try:
            found = below.content(path)
        finally:
            below.close()
        if found is None:
            found = next((one for root in data_only if (one := _open(root, path)) is not None), None)
        return found

    def second(self, path: bytes) -> FileHandle | None:
        """What the next layer below the first contributes to the merged directory at `path`. Raises OSError."""
        members = self._members(path)
        return handle_of(members[1].descriptor) if len(members) > 1 else None

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
        directory, search = _Directory(name), _Search([name])
        try:
            among, number = parent.members, 0
            while number < len(among) and not search.stop:
                member = among[number]
                number += 1
                descriptor = self._find(member, search)
                if descriptor is None:
                    continue
                directory.members.append(_Member(member.layer, descriptor))
                if search.absolute:
                    among, number = self._chain[0].members, member.layer + 1
        except BaseException:
            directory.close()
            raise
        return directory

    def _find(self, start: _Member, search: _Search) -> int | None:
        """The directory in one layer, an owned descriptor."""
        descriptor = start.descriptor
        position = 0
        try:
            while position < len(search.path):
                below = try_openat2(descriptor, search.path[position], flags=O_PATH_DIRECTORY)
                if descriptor != start.descriptor:
                    os.close(descriptor)
                descriptor = below
                if descriptor < 0:
                    self._missed(-descriptor, search, position)
                    return None
                position = self._turn(descriptor, start.layer, search, position) + 1
        except BaseException:
            if descriptor >= 0 and descriptor != start.descriptor:
                os.close(descriptor)
            raise
        return descriptor

    def _missed(self, error: int, search: _Search, position: int) -> None:
        if error in _NOTHING:
            return
        if error not in _ABSENT:
            raise OSError(error, os.strerror(error), os.fsdecode(search.path[position]))
        search.stop = True  # not a directory, a whiteout among others: what is below is hidden

    def _turn(self, descriptor: int, layer: int, search: _Search, position: int) -> int:
        """Heed the marks of a directory on the way; returns its position in the path, which a redirect changes."""
        if layer == len(self._roots) - 1:
            return position
        marks = self._marks.of(descriptor)
        if "opaque" in marks and self._marks.value(descriptor, "opaque") == b"y":
            search.stop = True
            return position
        redirect = self._marks.value(descriptor, "redirect") if "redirect" in marks else None
        if not redirect:
            return position
        after = search.path[position + 1 :]
        if not redirect.startswith(b"/"):
            search.path[position] = redirect
            return position
        to = redirect.strip(b"/").split(b"/")
        search.path, search.absolute, search.stop = to + after, True, False
        return len(to) - 1

    def _named(self, entry: os.DirEntry[str], directory: int, *, plain: bool, marked: bool) -> Name:
        """`plain`: whiteouts are listed too. `marked`: whiteouts may be regular files."""
        name, is_dir = os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)
        if plain or is_dir or entry.is_symlink() or (not marked and entry.is_file(follow_symlinks=False)):
            return Name(name, is_dir, listed=True)
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:  # gone since it was listed
            return Name(name, is_dir, listed=False)
        return Name(name, is_dir, listed=not self._is_whiteout(status, directory, name, by_xattr=marked))

    def _is_whiteout(self, status: os.stat_result, directory: int, name: bytes, *, by_xattr: bool = True) -> bool:
        if is_whiteout(status):
            return True
        if by_xattr and stat.S_ISREG(status.st_mode) and status.st_size == 0:
            return self._marks.value(directory, "whiteout", name) is not None
        return False


def _open(directory: int, name: bytes) -> int | None:
    descriptor = try_openat2(directory, name)
    if descriptor >= 0:
        return descriptor
    if -descriptor in _ABSENT:
        return None
    raise OSError(-descriptor, os.strerror(-descriptor), os.fsdecode(name))


def _has_any(members: Sequence[_Member], name: bytes) -> bool:
    for member in members:
        try:
            os.stat(name, dir_fd=member.descriptor, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
        else:
            return True
    return False
