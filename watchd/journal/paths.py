"""Which paths changed: records folded into one entry for each path. Pure.

The state of a path is that of its last record, unless a directory above it was renamed or removed later: that took the
path along without a record of its own. Then it is gone, or, if the directory's name was taken by another one with its
own contents, nothing is known of it, and the directory's entry stands for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from watchd.journal.directories import WHOLE_KINDS, up_from
from watchd.records import Change, Kind


class PathEntry(msgspec.Struct, frozen=True, gc=False):
    """A path that changed since the baseline, as it was when watchd looked at it last."""

    layer: str
    path: bytes
    kinds: int
    """`Kind` bits of everything that happened since the baseline."""
    exists: bool
    is_dir: bool
    seq: int
    """Of its last record."""
    from_path: bytes | None = None
    """Where the last rename to this path came from."""
    inode: int | None = None
    recursive: bool = False
    """The path was or is a directory that was renamed, removed or replaced since the baseline: everything below it
    changed too, and not all of it has entries of its own."""


_EXISTS: Final = 1
_IS_DIR: Final = 2
_RECURSIVE: Final = 4
_KINDS_SHIFT: Final = 3
_RENAMED: Final = int(Kind.RENAME)


class _Path(msgspec.Struct, gc=False):
    """As small as it may be: there can be millions."""

    bits: int
    seq: int
    from_path: bytes | None
    inode: int | None


_Whole = tuple[int, bool]
"""The number of the record that took everything below a directory along, and whether the directory existed then."""


class Paths:
    """The paths of all layers that the records applied so far have changed."""

    def __init__(self) -> None:
        self._layers: dict[str, dict[bytes, _Path]] = {}
        self._whole: dict[str, dict[bytes, _Whole]] = {}

    def apply(self, seq: int, change: Change) -> None:
        """Takes the change with the number `seq` into account; numbers must ascend."""
        paths = self._layers.get(change.layer)
        if paths is None:
            paths = self._layers[change.layer] = {}
        bits = change.kinds << _KINDS_SHIFT | change.is_dir << 1 | change.exists
        if change.is_dir and change.kinds & WHOLE_KINDS:
            bits |= _RECURSIVE
            self._took_along(change.layer, change.path, (seq, change.exists))
        from_path = change.from_path
        known = paths.get(change.path)
        if known is None:
            paths[change.path] = _Path(bits, seq, from_path, change.inode)
        else:
            known.bits = bits | known.bits & ~(_EXISTS | _IS_DIR)
            known.seq, known.inode = seq, change.inode
            if from_path is not None:
                known.from_path = from_path
        if from_path is not None and from_path not in paths:
            self._came_from(seq, change, from_path)

    def _came_from(self, seq: int, change: Change, old: bytes) -> None:
        """A name that lost its object without a record of its own."""
        bits = _RENAMED << _KINDS_SHIFT
        if change.is_dir:
            bits |= _IS_DIR | _RECURSIVE
            self._took_along(change.layer, old, (seq, False))
        self._layers[change.layer][old] = _Path(bits, seq, None, None)

    def _took_along(self, layer: str, path: bytes, whole: _Whole) -> None:
        self._whole.setdefault(layer, {})[path] = whole

    def entries(self, wanted: Callable[[bytes, bool], bool]) -> Iterator[PathEntry]:
        """Those for which `wanted`, given the path and whether it is recursive, says so; in order of layers and paths."""
        for layer, paths in sorted(self._layers.items()):
            last_whole = _Ancestors(self._whole.get(layer, {})).last_whole
            for path in sorted(paths):
                known = paths[path]
                if not wanted(path, bool(known.bits & _RECURSIVE)):
                    continue
                whole_seq, is_there = last_whole(path)
                if whole_seq <= known.seq:
                    yield _entry(layer, path, known, exists=bool(known.bits & _EXISTS))
                elif not is_there:
                    yield _entry(layer, path, known, exists=False)


class _Ancestors:
    """What took a path along last."""

    def __init__(self, whole: dict[bytes, _Whole]) -> None:
        self._whole = whole
        self._known: dict[bytes, _Whole] = {}

    def last_whole(self, path: bytes) -> _Whole:
        """The last that happened to a directory above `path`; (0, False) if nothing did."""
        if not self._whole or not path:
            return 0, False
        directory = path.rpartition(b"/")[0]
        known = self._known.get(directory)
        if known is None:
            known = max(self._whole.get(one, (0, False)) for one in up_from(directory))
            self._known[directory] = known
        return known


def _entry(layer: str, path: bytes, known: _Path, *, exists: bool) -> PathEntry:
    bits = known.bits
    return PathEntry(
        layer,
        path,
        bits >> _KINDS_SHIFT,
        exists,
        bool(bits & _IS_DIR),
        known.seq,
        known.from_path,
        known.inode if exists else None,
        bool(bits & _RECURSIVE),
    )
