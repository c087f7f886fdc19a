"""Apply changes to what is known of a layer.

A change says what is at a path now, so the last word about a path wins, and applying one twice changes nothing. What needs care
is what a change says of other paths:

* A directory that is gone takes with it what is below, but for what was renamed. So its tree is set aside for a while under its
  inode number. The change of a new name may stand before or after: the tree is taken from `from`, if that still is the same
  object, or from what was set aside, or as soon as that happens.
* A directory that appears otherwise begins empty: what is in it is told by changes that follow.
* A change may stand before the rename of a directory above it, for sources name what they read by where it is at the end of a
  batch. It waits until that directory is there.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import msgspec

from watchd.records import Change, Kind, Via
from watchd.wire.listing import Listing, is_directory, listing_of, same_object, state_of

CACHED_MAX = 20_000
"""Entries of directories kept in memory while changes are applied, about 5 MB."""

WAITING_MAX = 1024
ASIDE_MAX = 1024
WAITING_NS = 10_000_000_000
"""Changes that wait, and trees that are set aside, are forgotten beyond these numbers, the oldest first, and after so long."""

SEARCHED_MAX = 1000
"""Directories of one tree that was set aside looked at for another one."""

_RENAME = int(Kind.RENAME)
_CREATE = int(Kind.CREATE)
_ANEW = int(Kind.CREATE | Kind.DELETE)


class Store(Protocol):
    """Where listings are kept."""

    def load(self, number: int) -> Listing:
        """The listing of this number; an empty one if there is none."""

    def save(self, number: int, listing: Listing) -> None:
        """Write or replace a listing."""

    def delete(self, number: int) -> None:
        """There is no such listing any more."""

    def next_number(self) -> int:
        """For a new listing."""


class Unsettled(msgspec.Struct, array_like=True):
    """What is to be remembered between one folding and the next."""

    aside: dict[int, tuple[int, int]] = {}
    """Inode of a directory that was renamed away -> the number of its listing, and when; nanoseconds since the epoch."""
    expected: dict[int, tuple[bytes, int]] = {}
    """Inode of a directory that was renamed from a place that is not known -> where it is now, and when."""
    waiting: list[Change] = []
    """Changes below directories that are not there yet."""


class Node:
    """A directory in memory."""

    __slots__ = ("children", "dirty", "entries", "number")

    def __init__(self, number: int, listing: Listing, *, dirty: bool = False) -> None:
        self.number = number
        self.entries = listing.entries()
        self.children = listing.directories()
        self.dirty = dirty


class Folding:
    """One layer while changes are applied to it."""

    def __init__(self, store: Store, root: int, state: bytes, unsettled: Unsettled) -> None:
        self._store = store
        self.root, self.state = root, state
        """Number of the root directory's listing, and its own state."""
        self.unsettled = unsettled
        self._nodes: dict[int, Node] = {}
        self._paths: dict[bytes, Node] = {}
        self._ready: deque[Change] = deque()
        """What has waited and need not any more."""
        self._cached = self._largest = 0

    def apply(self, change: Change) -> None:
        """What a change says is known from now on."""
        self._apply(change)
        if self._ready:
            self._apply_ready()

    def _apply_ready(self) -> None:
        while self._ready:
            self._apply(self._ready.popleft())

    def _apply(self, change: Change) -> None:
        path = change.path
        if not path:
            if change.exists and change.status is not None:
                self.state = state_of(change)
            return
        parent, _, name = path.rpartition(b"/")
        node = self._paths.get(parent) or self._resolve(parent)
        if self.unsettled.expected and self._is_expected(parent):
            self._supersede(path)
        if node is None:
            self._wait(change)
        elif change.exists:
            self._put(node, name, change)
        else:
            self._remove(node, name, change)

    def write(self) -> None:
        """Hand all that was changed to the store, and forget what is in memory."""
        for node in self._nodes.values():
            if node.dirty:
                self._store.save(node.number, listing_of(node.entries, node.children))
        self._nodes.clear()
        self._paths.clear()
        self._cached = self._largest = 0

    def settle(self, now_ns: int) -> None:
        """Forget what has waited for too long."""
        since_ns = now_ns - WAITING_NS
        unsettled = self.unsettled
        for number, _ in list(unsettled.aside.values()) if unsettled.expected else ():
            self._fill_from(number)
        self._apply_ready()
        aside = sorted(unsettled.aside.items(), key=lambda item: item[1][1])
        kept = [item for item in aside if item[1][1] >= since_ns][-ASIDE_MAX:]
        unsettled.aside = dict(kept)
        for _, (number, _) in aside[: len(aside) - len(kept)]:
            self._drop(number)
        unsettled.expected = dict(
            [(inode, place) for inode, place in unsettled.expected.items() if place[1] >= since_ns][-ASIDE_MAX:]
        )
        unsettled.waiting = [change for change in unsettled.waiting if change.time_ns >= since_ns][-WAITING_MAX:]

    # ---- what is at a name ------------------------------------------------------------------------------------------

    def _put(self, node: Node, name: bytes, change: Change) -> None:
        state = state_of(change)
        old = node.entries.get(name)
        node.dirty = True
        if not is_directory(state):
            if old is None:
                self._cached += 1
            elif is_directory(old):
                self._remove(node, name, change)
            node.entries[name] = state
            return
        if old is not None and same_object(old, state) and change.kinds & (_ANEW | _RENAME) != _ANEW:
            node.entries[name] = state
            if change.kinds & _RENAME and (number := self._claim(change, state)) is not None:
                self._fill(change.path, change.inode or 0, number)
            return
        if old is not None and is_directory(old):
            self._remove(node, name, change)
        is_new = change.kinds & (_CREATE | _RENAME) == _CREATE
        number = None if is_new else self._claim(change, state)  # inode numbers are used again
        if number is None and not is_new:  # what is in it was told under its old name
            self.unsettled.expected[change.inode or 0] = (change.path, change.time_ns)
        node.entries[name] = state
        node.children[name] = self._new().number if number is None else number
        self._appeared(change.path, with_contents=number is not None or is_new)

    def _remove(self, node: Node, name: bytes, change: Change) -> None:
        """What was there is not there any more."""
        old = node.entries.get(name)
        if old is None:
            if self.unsettled.expected and self._is_expected(change.path.rpartition(b"/")[0]):
                self._wait(change)
            return
        node.dirty = True
        if is_directory(old):
            # What was in it may have been renamed out of it, and be told so later; but a scan tells all of what is where now.
            if change.via != Via.SCAN and (change.kinds & _RENAME or self._node(node.children[name]).entries):
                self._detach(node, name, old, change.time_ns)
                return
            self._drop(node.children.pop(name))
        del node.entries[name]

    def _detach(self, node: Node, name: bytes, state: bytes, time_ns: int) -> None:
        """Take a directory away and set its tree aside."""
        number = node.children.pop(name)
        del node.entries[name]
        self._paths.clear()
        inode = int.from_bytes(state[:8], "little")
        if inode in self.unsettled.expected and self._fill(self.unsettled.expected[inode][0], inode, number):
            return
        known = self.unsettled.aside.pop(inode, None)
        if known is not None:
            self._drop(known[0])
        self.unsettled.aside[inode] = (number, time_ns)
        self._fill_from(number)
        if len(self.unsettled.aside) > 2 * ASIDE_MAX:
            self.settle(time_ns)

    def _claim(self, change: Change, state: bytes) -> int | None:
        """The number of the tree that a directory had under its old name, where that is known."""
        if change.from_path:
            parent, _, name = change.from_path.rpartition(b"/")
            node = self._resolve(parent)
            old = node.entries.get(name) if node is not None else None
            if node is not None and old is not None and change.from_path != change.path and same_object(old, state):
                node.dirty = True
                del node.entries[name]
                self._paths.clear()
                return node.children.pop(name)
        inode = change.inode or 0
        aside = self.unsettled.aside.pop(inode, None)
        if aside is not None or not change.from_path:
            return None if aside is None else aside[0]
        found = (self._extract(number, inode) for number, _ in list(self.unsettled.aside.values()))
        return next((number for number in found if number is not None), None)

    def _extract(self, top: int, inode: int) -> int | None:
        """Take a directory out of a tree that was set aside: it was renamed out of that before or after."""
        pending = [top]
        for _ in range(SEARCHED_MAX):
            if not pending:
                break
            node = self._node(pending.pop())
            for name, number in node.children.items():
                if int.from_bytes(node.entries[name][:8], "little") == inode:
                    del node.children[name], node.entries[name]
                    node.dirty = True
                    return number
            pending += node.children.values()
        return None

    def _fill(self, path: bytes, inode: int, number: int) -> bool:
        """The tree of a directory has come after its new name: put it below what has been told of it there since."""
        parent, _, name = path.rpartition(b"/")
        node = self._resolve(parent)
        if node is None or not _has(node, name, inode):
            return False
        self.unsettled.expected.pop(inode, None)
        here, node.children[name] = node.children[name], number
        node.dirty = True
        self._merge(here, number)
        self._appeared(path)
        return True

    def _fill_from(self, top: int) -> None:
        """Look for trees that are expected in one that was set aside."""
        for inode, (path, _) in list(self.unsettled.expected.items()):
            parent, _, name = path.rpartition(b"/")
            node = self._resolve(parent)
            if node is not None and _has(node, name, inode) and (number := self._extract(top, inode)) is not None:
                self._fill(path, inode, number)

    def _merge(self, number: int, into: int) -> None:
        """What was told of a directory before its tree was there is news beside that tree."""
        pending = [(number, into)] if number != into else []
        while pending:
            number, into = pending.pop()
            here, there = self._node(number), self._node(into)
            for name, child in here.children.items():
                if name in there.children and same_object(there.entries[name], here.entries[name]):
                    pending.append((child, there.children[name]))
                else:
                    there.children[name] = child
            there.entries.update(here.entries)
            there.dirty = True
            self._forget(number)

    # ---- what waits -------------------------------------------------------------------------------------------------

    def _wait(self, change: Change) -> None:
        """A scan tells of directories before what is in them, so nothing of it needs to wait."""
        if change.via == Via.SCAN:
            return
        self.unsettled.waiting.append(change)
        if len(self.unsettled.waiting) > 2 * WAITING_MAX:
            self.unsettled.waiting = self.unsettled.waiting[-WAITING_MAX:]

    def _is_expected(self, path: bytes) -> bool:
        """Whether the tree of this directory is yet to come."""
        return any(place[0] == path for place in self.unsettled.expected.values())

    def _supersede(self, path: bytes) -> None:
        """There is later word of a name."""
        self.unsettled.waiting = [change for change in self.unsettled.waiting if change.path != path]

    def _appeared(self, path: bytes, *, with_contents: bool = True) -> None:
        """A directory is there now: apply what has waited for it; what is gone only if what was in it is there too."""
        if not self.unsettled.waiting:
            return
        below = path + b"/"
        waiting: list[Change] = []
        for change in self.unsettled.waiting:
            is_ready = change.path.startswith(below) and (with_contents or change.exists)
            (self._ready if is_ready else waiting).append(change)
        self.unsettled.waiting = waiting

    # ---- directories in memory --------------------------------------------------------------------------------------

    def _resolve(self, path: bytes) -> Node | None:
        """The directory at a path."""
        node = self._node(self.root)
        if path:
            for name in path.split(b"/"):
                number = node.children.get(name)
                if number is None:
                    return None
                node = self._node(number)
        self._paths[path] = node
        return node

    def _node(self, number: int) -> Node:
        node = self._nodes.get(number)
        if node is None:
            listing = self._store.load(number)
            node = self._nodes[number] = Node(number, listing)
            self._cached += 1 + len(listing)
            self._largest = max(self._largest, len(listing))
        return node

    def is_full(self) -> bool:
        """Whether it is time to `write`."""
        return self._cached > max(CACHED_MAX, 2 * self._largest)

    def _new(self) -> Node:
        number = self._store.next_number()
        node = self._nodes[number] = Node(number, Listing(), dirty=True)
        self._cached += 1
        return node

    def _forget(self, number: int) -> None:
        self._nodes.pop(number, None)
        self._paths.clear()
        self._store.delete(number)

    def _drop(self, number: int) -> None:
        """Forget a directory and all below it."""
        pending = [number]
        while pending:
            number = pending.pop()
            node = self._nodes.get(number)
            pending += node.children.values() if node is not None else self._store.load(number).directories().values()
            self._forget(number)


def _has(node: Node, name: bytes, inode: int) -> bool:
    """Whether a directory with this inode number has this name."""
    state = node.entries.get(name)
    return state is not None and is_directory(state) and int.from_bytes(state[:8], "little") == inode
