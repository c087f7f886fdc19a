"""Which directory each watch descriptor of a layer stands for.

Facts
* A watch is on an inode and stays when the directory is renamed, also when it is renamed out of the layer. Watch descriptors
  are given out in a circle, so one is not used again soon.
* Events tell of renames in order, but a walk sees the tree as it is at that moment, which is later than events still queued.
  Both place watches here, and the later word wins. What is overruled becomes a suspect: it is either placed again by an
  event or a look that comes soon, or it is lost: out of the layer, or gone and only held open by somebody.
* A layer may have hundreds of thousands of directories. One bytes object for a parent and a name is half the size of a tuple.
"""

from __future__ import annotations

from collections.abc import Iterable

from watchd.wire.inotify import Key

ROOT = 0
"""Stands for the parent of the layer's root; inotify's watch descriptors begin at 1."""
_WD_LEN = 4


def _pack(parent: int, name: bytes) -> bytes:
    return parent.to_bytes(_WD_LEN, "little") + name


def _unpack(key: bytes) -> Key:
    return int.from_bytes(key[:_WD_LEN], "little"), key[_WD_LEN:]


class WatchTree:
    """Watch descriptor -> (watch descriptor of the parent, name), and back."""

    __slots__ = ("_paths", "_places", "_suspects", "_wds")

    def __init__(self) -> None:
        self._places: dict[int, bytes] = {}
        self._wds: dict[bytes, int] = {}
        self._suspects: set[int] = set()
        self._paths: dict[int, bytes | None] = {ROOT: b""}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, wd: int) -> bool:
        return wd in self._places

    @property
    def suspects(self) -> int:
        """How many watches may be lost."""
        return len(self._suspects)

    def place_of(self, wd: int) -> Key | None:
        """The parent and the name of a directory, as far as known."""
        key = self._places.get(wd)
        return None if key is None else _unpack(key)

    def wd_at(self, parent: int, name: bytes) -> int:
        """The watch that stands for this name. Raises KeyError."""
        return self._wds[_pack(parent, name)]

    def is_taken(self, parent: int, name: bytes, *, by_other_than: int) -> bool:
        """Whether another watch stands for this name."""
        return self._wds.get(_pack(parent, name), by_other_than) != by_other_than

    def place(self, wd: int, parent: int, name: bytes) -> bool:
        """The directory `wd` is this name in that parent now; returns whether that is news."""
        key = _pack(parent, name)
        other = self._wds.get(key)
        old = self._places.get(wd)
        if other == wd and old is not None:
            return False
        if old is not None and self._wds.get(old) == wd:
            del self._wds[old]
        if old is not None or wd in self._paths:
            self.forget_paths()
        if other is not None:
            self._suspects.add(other)
        self._places[wd] = key
        self._wds[key] = wd
        return True

    def leave(self, parent: int, name: bytes) -> int | None:
        """Nothing watched has this name any more; returns what had it. It is lost unless it is placed again."""
        wd = self._wds.pop(_pack(parent, name), None)
        if wd is not None:
            self._suspects.add(wd)
        return wd

    def forget(self, wd: int) -> None:
        """The watch has ended."""
        key = self._places.pop(wd, None)
        if key is not None and self._wds.get(key) == wd:
            del self._wds[key]

    def forget_paths(self) -> None:
        """Free the memory of `path`."""
        self._paths = {ROOT: b""}

    def path(self, wd: int) -> bytes | None:
        """The path from the layer's root; None if that is not known (any more)."""
        paths = self._paths
        climbed = []
        while wd not in paths:
            # Contradicting words may make a circle for a while: climbing ends where it began.
            paths[wd] = None
            place = self.place_of(wd)
            if place is None:
                break
            climbed.append((wd, place[1]))
            wd = place[0]
        path = paths[wd]
        for below, name in reversed(climbed):
            if path is not None:
                path = path + b"/" + name if path else name
            paths[below] = path
        return path

    def is_rooted(self, wd: int, *, but_for: frozenset[int]) -> bool:
        """Whether no word says that the directory, or one above it, is where it was no more; nothing is held against those in
        `but_for`. True in a circle."""
        climbed = set()
        while wd != ROOT and wd not in climbed:
            place = self.place_of(wd)
            if place is None or (self._is_displaced(wd) and wd not in but_for):
                return False
            climbed.add(wd)
            wd = place[0]
        return True

    def lost(self) -> list[int]:
        """Forget the suspects that were not placed again and all below them; returns their watch descriptors."""
        verdicts = {wd: True for wd in self._suspects if self._is_displaced(wd)}
        self._suspects.clear()
        if not verdicts:
            return []
        verdicts[ROOT] = False
        return self._forget_all(wd for wd in list(self._places) if self._is_below(wd, verdicts))

    def keep(self, seen: set[int]) -> list[int]:
        """Forget all watches but these; returns the others."""
        return self._forget_all(wd for wd in list(self._places) if wd not in seen)

    def _is_displaced(self, wd: int) -> bool:
        key = self._places.get(wd)
        return key is not None and self._wds.get(key) != wd

    def _is_below(self, wd: int, verdicts: dict[int, bool]) -> bool:
        climbed = []
        while wd not in verdicts:
            verdicts[wd] = True  # for the end of a circle; a parent that is not known counts as lost too
            climbed.append(wd)
            place = self.place_of(wd)
            if place is None:
                break
            wd = place[0]
        verdict = verdicts[wd]
        for below in climbed:
            verdicts[below] = verdict
        return verdict

    def _forget_all(self, wds: Iterable[int]) -> list[int]:
        gone = list(wds)
        for wd in gone:
            self.forget(wd)
        self._suspects.clear()
        self.forget_paths()
        return gone
