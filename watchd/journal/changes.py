"""What changed since a baseline: the set, where the journal is the sequence. Blocking; reads the files, writes none.

What a consumer has to do with it is said in docs/changes.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from watchd.journal.cursors import DIRECTORY, Cursor, Cursors, resolve
from watchd.journal.directories import WHOLE_KINDS, Directories, up_from
from watchd.journal.format import CHANGE_TYPE
from watchd.journal.reader import Follower, extent
from watchd.journal.state import JournalState
from watchd.records import Change, Kind

JOURNAL: Final = "journal"
"""Where it lies in the state directory."""


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


class DirectoryEntry(msgspec.Struct, frozen=True, gc=False):
    """A directory that holds changes since the baseline, or an ancestor of one."""

    layer: str
    path: bytes
    seq: int
    """Of the last change in it; when ancestors were asked for: in it or anywhere below."""
    recursive: bool = False
    """As in `PathEntry`."""


class Changes(msgspec.Struct, frozen=True):
    """The answer."""

    cursor: Cursor
    """The baseline to ask from next time: everything up to here is in the answer."""
    fresh: bool
    """The answer may lack changes, so the consumer has to look at everything: the baseline is older than the journal, or
    a desync of a layer that was asked for is not closed."""
    entries: tuple[PathEntry, ...] | tuple[DirectoryEntry, ...]
    """In order of layers and paths; those of no layer more than once."""


def collect(
    state_directory: Path,
    since: str,
    *,
    layers: frozenset[str] = frozenset(),
    prefix: bytes | None = None,
    dirs: bool = False,
    ancestors: bool = False,
) -> Changes:
    """What changed behind the cursor `since`: each path once, or with `dirs` the directories that hold the changes.

    Of `layers`, or of all when it is empty. `prefix` is a path in a layer; with it the answer is about the path and what
    is below it, and holds its renamed or removed ancestors too. `ancestors`, with `dirs`, adds those of all directories.
    Raises JournalError, and UsageError for a cursor that means nothing here.
    """
    directory = state_directory / JOURNAL
    there = extent(directory)
    seq = resolve(since, there, Cursors(state_directory / DIRECTORY))
    fold = _Fold(layers)
    with Follower(directory, seq) as follower:
        first_seq = follower.position.segment
        while (chunk := follower.poll_frames()).frames:
            wanted = [one for one in chunk.frames if one[0] > seq or one[1] != CHANGE_TYPE]
            for number, entry in follower.decode(chunk, wanted):
                if isinstance(entry, Change):
                    fold.apply(number, entry)
                else:
                    fold.state.apply(entry, number)
        last_seq = follower.position.seq
    fresh = seq + 1 < max(first_seq, there.first_seq) or fold.is_open()
    entries = fold.directories(prefix, ancestors=ancestors) if dirs else fold.paths(prefix)
    return Changes(Cursor(there.epoch, last_seq), fresh, entries)


class _Fold:
    """All records behind the baseline, put together."""

    def __init__(self, layers: frozenset[str]) -> None:
        self.state = JournalState()
        self._layers = layers
        self._paths: dict[tuple[str, bytes], PathEntry] = {}
        self._directories = Directories()

    def apply(self, seq: int, change: Change) -> None:
        if self._layers and change.layer not in self._layers:
            return
        self._directories.apply(seq, change)
        self._paths[change.layer, change.path] = self._entry(seq, change)
        if change.from_path is not None and (change.layer, change.from_path) not in self._paths:
            self._paths[change.layer, change.from_path] = PathEntry(
                change.layer, change.from_path, Kind.RENAME, False, change.is_dir, seq, recursive=change.is_dir
            )

    def _entry(self, seq: int, change: Change) -> PathEntry:
        before = self._paths.get((change.layer, change.path))
        kinds, from_path = change.kinds, change.from_path
        recursive = change.is_dir and bool(kinds & WHOLE_KINDS)
        if before:
            kinds |= before.kinds
            recursive = recursive or before.recursive
            from_path = before.from_path if from_path is None else from_path
        return PathEntry(
            change.layer, change.path, kinds, change.exists, change.is_dir, seq, from_path, change.inode, recursive
        )

    def is_open(self) -> bool:
        """Whether changes of a layer that was asked for may be missing."""
        marks = self.state.checkpoint().layers
        return any(mark.open_desync for name, mark in marks.items() if not self._layers or name in {"", *self._layers})

    def paths(self, prefix: bytes | None) -> tuple[PathEntry, ...]:
        entries = (one for _, one in sorted(self._paths.items()))
        return tuple(one for one in entries if concerns(one.path, prefix, recursive=one.recursive))

    def directories(self, prefix: bytes | None, *, ancestors: bool) -> tuple[DirectoryEntry, ...]:
        entries = []
        for layer, rows in sorted(self._directories.layers().items()):
            for path, row in sorted(rows.items()):
                seq = row.below if ancestors else row.own
                if seq and concerns(path, prefix, recursive=bool(row.whole)):
                    entries.append(DirectoryEntry(layer, path, seq, bool(row.whole)))
        return tuple(entries)


def concerns(path: bytes, prefix: bytes | None, *, recursive: bool) -> bool:
    """Whether an entry belongs to the answer about `prefix`."""
    if prefix is None or not prefix or path == prefix or path.startswith(prefix + b"/"):
        return True
    return recursive and path in up_from(prefix)
