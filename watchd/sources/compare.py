"""Find what changed in a layer without events: walk it and compare it with what is known of it.

Facts and what they mean for us
* Every change of an inode sets its ctime, which users cannot set: so an inode that has its number, ctime, mtime, size, mode and
  owner is unchanged, but for what was done within one tick of the clock (at most 10 ms) after it was looked at, and not even
  then on filesystems with multigrain timestamps (6.13; ext4, xfs, btrfs, tmpfs).
* Names that come and go set mtime and ctime of their directory, and no event tells that of the directory itself. So times of a
  directory are news only where ctime changed and mtime did not. An attribute without a place in stat(2) (an ACL, an xattr) that
  changed of a directory in which names came or went too cannot be told.
* Filesystems use inode numbers again: what was removed and made anew under its name may look like one that was written to.
* A name that is another object begins anew: what is known below it is gone, and everything in it is created.
* A link that is made or removed sets the ctime of the file, under all of its names: they are told as `attrib`.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Generator

from watchd.errors import LayerError
from watchd.records import Change, Kind, Status, Via
from watchd.sources.base import WatchedLayer
from watchd.sources.listing import SLICE_ENTRIES, Budget, KnownTree, Pairs, joined, pack_state, read_directory
from watchd.sources.scan import Scan, Scanned
from watchd.sources.told import Told
from watchd.sources.walk import Directory, Walk, join
from watchd.wire.listing import Listing, is_directory, same_object, unpack_state

_REPLACED = int(Kind.CREATE | Kind.DELETE)
_NOTHING = Listing()
_BEGINS_EMPTY = -1
"""In place of the number of a listing: nothing is known of the directory, all in it is new."""


def differences(
    layer: WatchedLayer,
    open_tree: Callable[[], KnownTree],
    *,
    told: Told | None = None,
    slice_entries: int = SLICE_ENTRIES,
) -> Scan:
    """One change for every name that is another than in the known tree, and has not been told otherwise since.

    Gives a list, maybe an empty one, after every `slice_entries` entries looked at or told, so that other work can be done in
    between. Meanwhile the layer is held by its clone. Raises LayerError if the layer's root is gone or cannot be read, another
    WatchdError if the known tree cannot be.
    """
    root = layer.open()
    try:
        tree = open_tree()
        try:
            comparison = _Comparison(layer, tree, told or Told(), slice_entries)
            yield from comparison.run(root)
            return comparison.scanned
        finally:
            tree.close()
    finally:
        os.close(root)


class _Comparison:
    """One walk along the known tree."""

    def __init__(self, layer: WatchedLayer, tree: KnownTree, told: Told, slice_entries: int) -> None:
        self._layer, self._tree, self._told = layer, tree, told
        self._budget = Budget(slice_entries)
        self._found: list[Change] = []
        self._replaced: set[bytes] = set()
        """Paths yet to be walked where another directory is than the one that is known."""
        self.scanned = Scanned()

    def run(self, root: int) -> Generator[list[Change], None, None]:
        """All slices."""
        state = pack_state(os.fstat(root))
        self.scanned.entries = 1
        top = yield from self._entry(b"", state, _kinds(self._tree.state, state), self._tree.state, self._tree.root)
        for directory in Walk(root, failed=self._failed):
            try:
                pairs = yield from self._slices(read_directory(directory.descriptor, self._budget))
            except OSError as error:
                self._failed(directory.path, error)  # what is in it is not known, so nothing of it is told as gone
                continue
            self.scanned.entries += len(pairs)
            yield from self._compare(directory, pairs, directory.tag if directory.parent else top)
        yield self._take()

    def _failed(self, path: bytes, error: OSError) -> None:
        if not path:
            raise LayerError(f"layer {self._layer.name} cannot be read: {error.strerror}") from None
        self._replaced.discard(path)
        self.scanned.skipped += 1
        self.scanned.first_error = self.scanned.first_error or f"{os.fsdecode(path)}: {error.strerror}"

    def _compare(self, directory: Directory, pairs: Pairs, number: int) -> Generator[list[Change], None, None]:
        known = _NOTHING if number == _BEGINS_EMPTY else self._tree.listing(number)
        names, states = joined(pairs)
        is_replaced = directory.path in self._replaced
        self._replaced.discard(directory.path)
        if names == known.names and states == known.states and not is_replaced:
            if known.children:
                directory.descend = [name for name, state in pairs if is_directory(state)]
                directory.descend_tags = known.child_numbers()
            return
        before, children = known.entries(), known.directories()
        tags = []
        for name, state in pairs:
            old = before.pop(name, None)
            number = children.get(name, _BEGINS_EMPTY)
            if old != state or is_replaced:
                kinds = int(Kind.CREATE) if old is None else _REPLACED if is_replaced else _kinds(old, state)
                number = yield from self._entry(directory.child(name), state, kinds, old, number)
            if is_directory(state):
                directory.descend.append(name)
                tags.append(number)
        directory.descend_tags = tags
        for name, old in before.items():
            yield from self._gone(directory.child(name), old, children.get(name))

    def _entry(
        self, path: bytes, state: bytes, kinds: int, old: bytes | None, number: int
    ) -> Generator[list[Change], None, int]:
        """A name whose state is another than before; takes the number of the old directory's listing, returns that of the one
        to compare the new directory with."""
        is_told = kinds and self._told.states.get(path) == state
        if is_directory(state):
            if kinds & Kind.CREATE and is_told:
                number = self._origin(path, state)
            elif kinds == _REPLACED and number != _BEGINS_EMPTY:
                self._replaced.add(path)
        if kinds and not is_told:
            yield from self._tell(path, kinds, state)
            if old is not None and is_directory(old) and not is_directory(state):
                yield from self._below(path, number)
        return number

    def _gone(self, path: bytes, old: bytes, number: int | None) -> Generator[list[Change], None, None]:
        if self._told.is_gone(path):
            return
        yield from self._tell(path, int(Kind.DELETE), old, exists=False)
        if number is not None:
            yield from self._below(path, number)

    def _below(self, top: bytes, number: int) -> Generator[list[Change], None, None]:
        """All that was known below a directory is gone."""
        pending = [(top, number)]
        while pending:
            path, number = pending.pop()
            known = self._tree.listing(number)
            for name, state in known.entries().items():
                yield from self._tell(join(path, name), int(Kind.DELETE), state, exists=False)
            pending += [(join(path, name), child) for name, child in known.directories().items()]

    def _tell(
        self, path: bytes, kinds: int, state: bytes, *, exists: bool = True
    ) -> Generator[list[Change], None, None]:
        self._found.append(
            Change(
                time.time_ns(),
                self._layer.name,
                path,
                kinds,
                exists,
                is_directory(state),
                inode=int.from_bytes(state[:8], "little") if exists else None,
                via=Via.SCAN,
                status=state[8:] if exists else None,
            )
        )
        self._budget.left -= 1
        if self._budget.left <= 0 and self._budget.is_spent():
            yield self._take()
            self._budget.renew()

    def _slices(self, reading: Generator[None, None, Pairs]) -> Generator[list[Change], None, Pairs]:
        while True:
            try:
                next(reading)
            except StopIteration as end:
                pairs: Pairs = end.value
                return pairs
            yield self._take()

    def _take(self) -> list[Change]:
        found, self._found = self._found, []
        self.scanned.told += len(found)
        return found

    def _origin(self, path: bytes, state: bytes) -> int:
        """The listing of a directory that was renamed to `path` since, as an event told."""
        for origin in self._told.origins_of(path):
            found = self._find(origin)
            if found is not None and same_object(found[0], state):
                return found[1]
        return _BEGINS_EMPTY

    def _find(self, path: bytes) -> tuple[bytes, int] | None:
        """State and number of a directory in the known tree."""
        number, state = self._tree.root, self._tree.state
        for name in path.split(b"/"):
            known = self._tree.listing(number)
            child = known.directories().get(name)
            if child is None:
                return None
            number, state = child, known.entries()[name]
        return state, number


def _kinds(old: bytes, new: bytes) -> int:
    """What happened to a name with these states; 0 if nothing that is news."""
    if old == new:
        return 0
    inode_before, before = unpack_state(old)
    inode, now = unpack_state(new)
    if not any(before[1:]):
        return int(Kind.MODIFY | Kind.ATTRIB)  # it was never looked at
    if inode != inode_before or stat.S_IFMT(before.mode) != stat.S_IFMT(now.mode):
        return _REPLACED
    return _kinds_of_status(before, now)


def _kinds_of_status(before: Status, now: Status) -> int:
    is_directory = stat.S_ISDIR(now.mode)
    wrote = before.mtime_ns != now.mtime_ns or before.size != now.size
    kinds = 0
    if (before.mode, before.uid, before.gid) != (now.mode, now.uid, now.gid):
        kinds |= Kind.ATTRIB
    if wrote and not is_directory:
        kinds |= Kind.MODIFY
    if not kinds and before.ctime_ns != now.ctime_ns and before.mtime_ns == now.mtime_ns:
        kinds |= Kind.ATTRIB
    return int(kinds)


def unless_told(scan: Scan, told: Told) -> Scan:
    """The same scan; `told.recent` are the names that events told of since its last slice began."""
    try:
        while True:
            told.recent.clear()
            try:
                found = next(scan)
            except StopIteration as end:
                scanned: Scanned = end.value
                return scanned
            yield found
    finally:
        scan.close()
