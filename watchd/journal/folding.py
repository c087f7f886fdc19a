"""Apply changes to what is known of a layer.

A change says what is at a path now, so the last word about a path wins, and applying one twice changes nothing. What needs care
is what a change says of other paths:

* What was looked at together is named by where everything is by then, in any order; what is known tells where it was. So every
  directory that is not where it was is set aside first, under its inode number, and then all is placed from the root down.
  The parent of a name is found by the inode numbers that were told of the directories above it.
* A directory that is gone takes with it what is below, but for what was renamed: that is looked for in what was set aside.
* A rename with one half told so far (a fold may cut a batch, inotify may read the other half later): what is set aside
  waits for its new name, a new name for what was in it, and a change below it for the directory. Not for ever, and a
  removal not below a directory that was told as gone with it: what comes to its path later is another one.
* A directory that appears otherwise begins empty: what is in it is told by changes that follow.
* Inode numbers are used again. What was removed under its old name is not taken for what has its number now.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
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

SEARCHED_MAX = 20_000
"""Directories in trees that were set aside looked at for others that were renamed out of them."""

_RENAME = int(Kind.RENAME)
_CREATE = int(Kind.CREATE)
_DELETE = int(Kind.DELETE)
_ANEW = int(Kind.CREATE | Kind.DELETE)
_NAMES = _ANEW | _RENAME


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
    together: list[Change] = []
    """Changes that are not applied yet, since others that were looked at together with them may follow."""


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
        self._told: dict[bytes, Change] = {}
        """What was looked at together, by path."""
        self._alive: set[int | None] = set()
        """Inodes of the directories among that."""
        self._taken: dict[bytes, tuple[int, int]] = {}
        """Where a directory was until then -> its inode and number."""
        self._removed: set[int] = set()
        """Inodes of directories set aside that were removed and not renamed."""
        self._inside: dict[int, tuple[int, bytes]] = {}
        """Inode of a directory in a tree that was set aside -> the number of the one that it is in, and its name."""
        self._searched: set[int] = set()
        """Numbers of the directories that `_inside` has the entries of."""

    def apply(self, changes: Sequence[Change]) -> None:
        """What these changes say is known from now on. Those that were looked at together belong into one call."""
        kinds = 0
        for change in changes:
            if change.is_dir or change.kinds & _DELETE:
                kinds |= change.kinds
        if kinds & _NAMES and len(changes) > 1:
            changes = _top_down(changes)
            self._told = {change.path: change for change in changes}
            if kinds & _RENAME:
                self._alive = {change.inode for change in changes if change.exists and change.is_dir}
                self._displace(changes)
        for change in changes:
            self._apply(change)
            if self._ready:
                self._apply_ready()
        if kinds & _NAMES or self._taken or self._searched:
            self._forget_removed(changes[-1].time_ns)

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
            node = self._lost(parent)
        if node is None:
            self._wait(change)
        elif change.exists:
            self._put(node, name, change)
        else:
            self._remove(node, name, change)

    # ---- what was looked at together --------------------------------------------------------------------------------

    def _displace(self, changes: Sequence[Change]) -> None:
        """Set aside every directory that is not where it was, before any of them gets its new place.

        Paths tell where things are now, what is known tells where they were: `_origin` leads from one to the other. What is set
        aside may tell where more was."""
        pending = [change for change in changes if change.path and change.kinds & _NAMES]
        before = -1
        while before != len(pending):
            before = len(pending)
            pending = [change for change in pending if not self._displace_one(change)]

    def _displace_one(self, change: Change) -> bool:
        """False if it is not known yet what the directory was that the name is in."""
        parent, _, name = change.path.rpartition(b"/")
        node = self._origin(parent)
        if node is None:
            return False
        old = node.entries.get(name)
        if old is None or not is_directory(old):
            return True
        if change.exists and same_object(old, state_of(change)) and change.kinds & (_ANEW | _RENAME) != _ANEW:
            return True
        node.dirty = True
        self._detach(node, name, old, change)
        return True

    def _origin(self, path: bytes) -> Node | None:
        """What is known of the directory that has this path now, or had it until it was removed."""
        if not path:
            return self._node(self.root)
        change = self._told.get(path)
        if change is not None and not (change.exists and change.is_dir):
            return self._removed_at(path)
        inode = 0 if change is None else change.inode or 0
        if inode in self.unsettled.aside and inode not in self._removed:
            return self._node(self.unsettled.aside[inode][0])
        parent, _, name = path.rpartition(b"/")
        node = self._origin(parent)
        if node is not None and name in node.children and (change is None or _has(node, name, inode)):
            return self._node(node.children[name])
        place = self._place_inside(inode) if change is not None and change.kinds & _RENAME else None
        return self._node(self._node(place[0]).children[place[1]]) if place is not None else None

    def _removed_at(self, path: bytes) -> Node | None:
        """The directory that was at a path and is nowhere now."""
        inode, number = self._taken.get(path, (0, 0))
        if (inode in self._alive and inode not in self._removed) or inode not in self.unsettled.aside:
            return None
        return self._node(number)

    def _forget_removed(self, now_ns: int) -> None:
        """What was in these directories has its new place by now."""
        for inode in self._removed & self.unsettled.aside.keys():
            self._drop(self.unsettled.aside.pop(inode)[0])
        self._told = {}
        self._alive.clear()
        self._removed.clear()
        self._taken.clear()
        self._inside.clear()
        self._searched.clear()
        if len(self.unsettled.aside) > 2 * ASIDE_MAX:
            self.settle(now_ns)

    # ---- between one folding and the next ---------------------------------------------------------------------------

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
        if unsettled.aside:
            self._fill_expected()
            self._inside.clear()
            self._searched.clear()
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
            if change.kinds & _RENAME and (number := self._claim(node, name, change)) is not None:
                self._fill(change.path, change.inode or 0, number)
            return
        if old is not None and is_directory(old):
            self._remove(node, name, change)
        is_new = change.kinds & (_CREATE | _RENAME) == _CREATE
        number = self._claim(node, name, change) if change.kinds & _RENAME else None  # inode numbers are used again
        if number is None and not is_new and self._is_from_elsewhere(change):
            self.unsettled.expected[change.inode or 0] = (change.path, change.time_ns)
        node.entries[name] = state
        node.children[name] = self._new().number if number is None else number
        self._appeared(change.path, with_contents=number is not None or is_new)

    def _is_from_elsewhere(self, change: Change) -> bool:
        """Whether there may be more to know of a directory when another change is told: what became of its old name."""
        if change.kinds & _RENAME:  # without an old name it came from outside, or was made here
            return change.from_path is not None and change.from_path not in self._told
        return True

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
                self._detach(node, name, old, change)
                return
            self._drop(node.children.pop(name))
        del node.entries[name]

    def _detach(self, node: Node, name: bytes, state: bytes, change: Change) -> None:
        """Take a directory away and set its tree aside."""
        number, inode = self._take(node, name), int.from_bytes(state[:8], "little")
        self._taken[change.path] = inode, number
        if inode in self.unsettled.expected and self._fill(self.unsettled.expected[inode][0], inode, number):
            return
        known = self.unsettled.aside.pop(inode, None)
        if known is not None:
            self._drop(known[0])
        self.unsettled.aside[inode] = (number, change.time_ns)
        if change.kinds & (_ANEW | _RENAME) == _DELETE:
            self._removed.add(inode)
        self._fill_expected()

    def _claim(self, node: Node, name: bytes, change: Change) -> int | None:
        """The number of the tree that a directory had under its old name, where that is known."""
        inode = change.inode or 0
        aside = None if inode in self._removed else self.unsettled.aside.pop(inode, None)
        if aside is not None:
            if change.from_path or aside[1] == change.time_ns:
                return aside[0]
            self._drop(aside[0])  # it was outside of the layer meanwhile: what is in it is told
        if not change.from_path:
            return None
        parent, _, old_name = change.from_path.rpartition(b"/")
        old = self._resolve(parent)
        if old is not None and change.from_path != change.path and _has(old, old_name, inode):
            return self._take(old, old_name)
        return self._extract(inode, node, name)

    def _take(self, node: Node, name: bytes) -> int:
        """Take a directory out of the one that it is in."""
        node.dirty = True
        del node.entries[name]
        self._paths.clear()
        return node.children.pop(name)

    def _extract(self, inode: int, node: Node, name: bytes) -> int | None:
        """Take a directory, which is in `node` by now, out of a tree that was set aside: it was renamed out of that."""
        place = self._place_inside(inode)
        if place is None or place == (node.number, name):
            return None
        return self._take(self._node(place[0]), place[1])

    def _place_inside(self, inode: int) -> tuple[int, bytes] | None:
        """Where a directory is in the trees that were set aside."""
        pending = [number for number, _ in self.unsettled.aside.values() if number not in self._searched]
        while pending and len(self._searched) < SEARCHED_MAX:
            number = pending.pop()
            self._searched.add(number)
            node = self._node(number)
            for name in node.children:
                self._inside[int.from_bytes(node.entries[name][:8], "little")] = (number, name)
            pending += [child for child in node.children.values() if child not in self._searched]
        place = self._inside.get(inode)
        return place if place is not None and _has(self._node(place[0]), place[1], inode) else None

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

    def _fill_expected(self) -> None:
        """Look for trees that are expected in those that were set aside."""
        for inode, (path, _) in list(self.unsettled.expected.items()):
            parent, _, name = path.rpartition(b"/")
            node = self._resolve(parent)
            if (
                node is not None
                and _has(node, name, inode)
                and (number := self._extract(inode, node, name)) is not None
            ):
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
        if change.via == Via.SCAN or self._is_below_removed(change.path):
            return
        self.unsettled.waiting.append(change)
        if len(self.unsettled.waiting) > 2 * WAITING_MAX:
            self.unsettled.waiting = self.unsettled.waiting[-WAITING_MAX:]

    def _is_below_removed(self, path: bytes) -> bool:
        """Whether a directory above was looked at too, and is not there."""
        while path:
            path = path.rpartition(b"/")[0]
            if path in self._told:
                return not self._told[path].is_dir or not self._told[path].exists
        return False

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

    def _lost(self, path: bytes) -> Node | None:
        """The directory that was at a path until a change that was looked at together with this one."""
        names: list[bytes] = []
        while path and path not in self._taken:
            path, _, name = path.rpartition(b"/")
            names.append(name)
        node = self._removed_at(path) if path else None
        while node is not None and names:
            number = node.children.get(names.pop())
            node = None if number is None else self._node(number)
        return node

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


def _top_down(changes: Iterable[Change]) -> list[Change]:
    """One for each path, those of directories before those of what is in them."""
    told: dict[bytes, Change] = {}
    for change in changes:
        known = told.get(change.path)
        if known is not None:
            seen, other = (known, change) if known.exists and not change.exists else (change, known)
            change = msgspec.structs.replace(
                seen, kinds=known.kinds | change.kinds, from_path=seen.from_path or other.from_path
            )
        told[change.path] = change
    return sorted(told.values(), key=lambda change: change.path.count(b"/") if change.path else -1)


def looked_at_together(change: Change, other: Change) -> bool:
    """Whether two changes that follow one another are of one batch of events; a source gives all of these one time."""
    return change.time_ns == other.time_ns and change.via == other.via == Via.EVENT
