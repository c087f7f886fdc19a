"""Which directories hold changes: records folded into one line for each directory. Pure.

A change of a name is a change in the directory that holds it. A change of a directory is one in the directory itself
as well. A directory that was renamed or removed took everything below it along, in one record: under its name (under
both names, of a renamed one) nothing is as it was, however deep. That is kept apart, as `whole`.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Final, NamedTuple

from watchd.records import Change, Kind

WHOLE_KINDS: Final = int(Kind.RENAME | Kind.DELETE)
"""What takes everything below a directory along."""

_RENAME: Final = int(Kind.RENAME)


class Directory(NamedTuple):
    """Sequence numbers of the last changes of a directory; 0 where none is known."""

    own: int = 0
    """Of the directory itself or of a name in it."""
    below: int = 0
    """Of anything at or below it, so never less than `own`."""
    whole: int = 0
    """Of the directory together with everything below it."""


class Directories:
    """The directories of all layers that the records applied so far have changed."""

    def __init__(self) -> None:
        self._own: dict[str, dict[bytes, int]] = {}
        self._whole: dict[str, dict[bytes, int]] = {}

    def __len__(self) -> int:
        """How many hold a change themselves."""
        return sum(map(len, self._own.values()))

    def apply(self, seq: int, change: Change) -> None:
        """Takes the change with the number `seq` into account; numbers must ascend. Costs little: ancestors come later."""
        own = self._own.get(change.layer)
        if own is None:
            own = self._own[change.layer] = {}
        path = change.path
        own[path.rpartition(b"/")[0]] = seq
        if change.is_dir:
            own[path] = seq
            if change.kinds & WHOLE_KINDS:
                self._whole.setdefault(change.layer, {})[path] = seq
        if change.from_path is not None:
            self._renamed_from(seq, change, own)

    def _renamed_from(self, seq: int, change: Change, own: dict[bytes, int]) -> None:
        old = change.from_path
        assert old is not None
        own[old.rpartition(b"/")[0]] = seq
        if change.is_dir:
            own[old] = seq
            self._whole.setdefault(change.layer, {})[old] = seq

    def layers(self) -> dict[str, dict[bytes, Directory]]:
        """By layer and path, every directory that holds a change and all ancestors of such."""
        return {layer: self._rows(layer) for layer in self._own}

    def _rows(self, layer: str) -> dict[bytes, Directory]:
        own, whole = self._own[layer], self._whole.get(layer, {})
        below: dict[bytes, int] = {}
        # The latest first: an ancestor that has a number already has one that is at least as high, and so have its own.
        for path, seq in sorted(own.items(), key=itemgetter(1), reverse=True):
            while path not in below:
                below[path] = seq
                path = path.rpartition(b"/")[0]
        return {path: Directory(own.get(path, 0), seq, whole.get(path, 0)) for path, seq in below.items()}


def up_from(path: bytes) -> Iterator[bytes]:
    """The path and all its ancestors, the layer's root last."""
    while path:
        yield path
        path = path.rpartition(b"/")[0]
    yield b""
