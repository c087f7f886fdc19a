"""Where the directories of one filesystem lie, learned as they are met: file handle -> parent and name.

Facts
* open_by_handle_at(2) finds a directory of the filesystem by its handle wherever it was moved; `..` of that descriptor is its
  parent now, and the last component of its /proc/self/fd link is its name.
* `..` from a directory that does not lie below the root of the mount that it was opened through fails with ENOENT. So a
  directory is inside exactly if climbing from it arrives at the root of a layer. A rename of any directory above it may
  connect it.
* The link of a directory that was removed ends in " (deleted)", as may a real name: st_nlink is 0 only for the former.

What this means for us: nothing is walked in advance, a rename of a directory is one changed entry whatever lies below it, and
no path is ever followed. Entries are checked with the kernel when they are learned or renamed, never guessed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable

from watchd.kernel.files import name_to_handle_at, open_by_handle_at
from watchd.sources.look import Place

NODES_MAX = 131_072
"""Directories remembered; about 200 bytes each. At the bound all are forgotten and learned again as they are met."""

PLACES_MAX = 4096
"""Paths remembered; a batch may add to them until it ends."""

_DELETED = b" (deleted)"
_PARENT_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class DirectoryTree:
    """Handles (packed struct file_handle) of directories of one filesystem, and which layers they lie in."""

    def __init__(self, anchors: Callable[[], list[int]]) -> None:
        """`anchors` gives descriptors (not O_PATH) of mounts through which the filesystem's directories can be opened."""
        self._anchors = anchors
        self._nodes: dict[bytes, tuple[bytes, bytes] | None] = {}
        self._parents: dict[bytes, bytes] = {}
        """One object for each handle that is a parent, instead of one for each of its children."""
        self._roots: dict[bytes, list[str]] = {}
        self._places: dict[bytes, tuple[Place, ...]] = {}
        self._unconnected: set[bytes] = set()
        self.forgotten = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def add_root(self, handle: bytes, layer: str) -> None:
        """`handle` is the root directory of `layer`."""
        layers = self._roots.setdefault(handle, [])
        if layer not in layers:
            layers.append(layer)
        self.clear()

    def remove_root(self, layer: str) -> None:
        """The layer is watched no more."""
        for handle, layers in list(self._roots.items()):
            if layer in layers:
                layers.remove(layer)
                if not layers:
                    del self._roots[handle]
        self.clear()

    def clear(self) -> None:
        """Forget every directory, for instance because events were lost."""
        self._nodes.clear()
        self._parents.clear()
        self._places.clear()
        self._unconnected.clear()

    def begin(self) -> None:
        """A new batch begins: keep the bounds."""
        if len(self._places) >= PLACES_MAX:
            self._places.clear()
        if len(self._nodes) >= NODES_MAX:
            self.clear()
            self.forgotten += 1

    def places(self, handle: bytes) -> tuple[Place, ...]:
        """The places of a directory, one for each layer that contains it; empty outside of all layers or if unknown."""
        places = self._places.get(handle)
        if places is None:
            places = self._places[handle] = self._find(handle)
        return places

    def created(self, handle: bytes, parent: bytes, name: bytes) -> None:
        """An event told that this directory appeared under `name`; believed if nothing better is known."""
        if self._nodes.get(handle) is None and handle not in self._roots:
            self._nodes[handle] = (self._parent(parent), name)
            self._places.pop(handle, None)

    def moved(self, handle: bytes, parent: bytes, name: bytes) -> None:
        """An event told that this directory was renamed: ask the kernel where it is, believe the event if it is gone."""
        for moved in (handle, *self._unconnected):
            self._nodes.pop(moved, None)
        self._unconnected.clear()
        self._places.clear()
        if not self._learn(handle):
            self._nodes[handle] = (self._parent(parent), name)

    def is_gone(self, handle: bytes) -> bool:
        """Whether nothing is known of a directory whose places were asked for: it was removed, and its removal not told yet."""
        return handle not in self._nodes and handle not in self._roots

    def is_root(self, handle: bytes) -> bool:
        """Whether a directory is the root of a layer."""
        return handle in self._roots

    def is_outside(self, handle: bytes) -> bool:
        """Whether, as the kernel has it now, a directory lies outside of all layers and no layer's root lies directly in it.

        False also where that cannot be known: it is gone, or not connected to any mount of ours."""
        if handle in self._above_roots():
            return False
        for anchor in self._anchors():
            with contextlib.suppress(OSError):
                descriptor = open_by_handle_at(anchor, handle, flags=os.O_PATH | os.O_DIRECTORY)
                return self._climbs_outside(descriptor, handle)
        return False

    def near_layers(self, handles: Iterable[bytes]) -> list[bytes]:
        """Those directories that lie in a layer or have a layer's root directly in them."""
        above = self._above_roots()
        return [handle for handle in handles if handle in above or self.places(handle)]

    def open(self, handle: bytes) -> int | None:
        """An owned O_PATH descriptor of a directory, None if it is gone."""
        for anchor in self._anchors():
            with contextlib.suppress(OSError):
                return open_by_handle_at(anchor, handle, flags=os.O_PATH | os.O_DIRECTORY)
        return None

    def open_instead(self, handle: bytes, nothing: set[bytes]) -> int | None:
        """An owned O_PATH descriptor of the directory that is now where one was that is gone, None if there is none.

        `nothing` remembers, from one call to the next, where there is none."""
        gone: list[tuple[bytes, bytes]] = []
        while (descriptor := self.open(handle)) is None:
            node = self._nodes.get(handle)
            if node is None or handle in nothing or handle in self._roots:
                nothing.update(child for child, _ in gone)
                return None
            gone.append((handle, node[1]))
            handle = node[0]
        while gone:
            above, (_, name) = descriptor, gone[-1]
            try:
                descriptor = os.open(name, _PARENT_FLAGS | os.O_NOFOLLOW, dir_fd=above)
            except OSError:
                nothing.update(child for child, _ in gone)
                return None
            finally:
                os.close(above)
            gone.pop()
        return descriptor

    def _parent(self, handle: bytes) -> bytes:
        return self._parents.setdefault(handle, handle)

    def _above_roots(self) -> set[bytes]:
        for root in self._roots:
            if root not in self._nodes:
                self._learn(root)
        return {node[0] for root in self._roots if (node := self._nodes.get(root))}

    def _climbs_outside(self, descriptor: int, handle: bytes) -> bool:
        """Whether the way from an owned descriptor up to the root of its mount meets no layer. Raises OSError."""
        try:
            while handle not in self._roots:
                above = os.open("..", _PARENT_FLAGS, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = above
                parent = name_to_handle_at(descriptor).pack()
                if parent == handle:
                    return True
                handle = parent
            return False
        finally:
            os.close(descriptor)

    def _find(self, handle: bytes) -> tuple[Place, ...]:
        found = tuple(Place(layer, b"") for layer in self._roots.get(handle, ()))
        if handle not in self._nodes and not self._learn(handle):
            return found
        node = self._nodes.get(handle)
        if node is None:
            return found
        parent, name = node
        return found + tuple(Place(place.layer, place.child(name)) for place in self.places(parent))

    def _learn(self, handle: bytes) -> bool:
        """Climb from a directory to one that is known; false if it is gone."""
        for anchor in self._anchors():
            try:
                descriptor = open_by_handle_at(anchor, handle, flags=os.O_PATH | os.O_DIRECTORY)
            except OSError:
                continue
            if self._climb(descriptor, handle):
                return True
        return handle in self._nodes

    def _climb(self, descriptor: int, handle: bytes) -> bool:
        """Enter the ancestors of an owned descriptor; false, with the start noted as outside, if it is not connected."""
        nodes = self._nodes
        try:
            while True:
                try:
                    above = os.open("..", _PARENT_FLAGS, dir_fd=descriptor)
                except OSError:
                    nodes[handle] = None
                    self._unconnected.add(handle)
                    return False
                try:
                    parent = self._parent(name_to_handle_at(above).pack())
                    known = parent in nodes
                    nodes[handle] = None if parent == handle else (parent, _name_of(descriptor, above))
                except OSError:
                    os.close(above)
                    raise
                os.close(descriptor)
                descriptor = above
                if known or parent == handle:
                    return True
                handle = parent
        finally:
            os.close(descriptor)


def _name_of(directory: int, parent: int) -> bytes:
    try:
        link = os.readlink(b"/proc/self/fd/%d" % directory)
    except OSError:  # a path longer than a page
        return _search_name(directory, parent)
    if link.endswith(_DELETED) and os.stat(directory).st_nlink == 0:
        link = link[: -len(_DELETED)]
    return link.rpartition(b"/")[2]


def _search_name(directory: int, parent: int) -> bytes:
    wanted = os.stat(directory).st_ino
    listing = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)
    try:
        with os.scandir(listing) as entries:
            return next((os.fsencode(entry.name) for entry in entries if entry.inode() == wanted), b"?")
    finally:
        os.close(listing)
