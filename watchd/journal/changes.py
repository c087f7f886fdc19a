"""What changed since a baseline: the set, where the journal is the sequence. Blocking; reads the files, writes none.

What a consumer has to do with it is said in docs/changes.md. Where the index helps it is asked: which directories hold
changes is read from it and from the journal behind it, and so is that nothing changed below a path. All else is read
from the journal, and so is everything when there is no index or it is of no use: the answer is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from watchd.errors import RecordsGoneError
from watchd.journal import cursors as named
from watchd.journal.cursors import Cursor, Cursors
from watchd.journal.directories import Directories, Directory
from watchd.journal.format import CHANGE_TYPE, Checkpoint
from watchd.journal.index import Index, Rows, consult, is_valid
from watchd.journal.paths import PathEntry, Paths
from watchd.journal.reader import Extent, Follower, Position, extent
from watchd.journal.segments import list_segments
from watchd.journal.state import JournalState
from watchd.records import Change

__all__ = ["Changes", "DirectoryEntry", "PathEntry", "Question", "Stream", "collect", "stream"]

JOURNAL: Final = "journal"
"""Where it lies in the state directory."""


class DirectoryEntry(msgspec.Struct, frozen=True, gc=False):
    """A directory that holds changes since the baseline, or an ancestor of one."""

    layer: str
    path: bytes
    seq: int
    """Of the last change in it; when ancestors were asked for: in it or anywhere below. Of a directory above the prefix:
    of the record that covers the prefix."""
    recursive: bool = False
    """As in `PathEntry`."""


class Changes(msgspec.Struct, frozen=True):
    """The answer."""

    cursor: Cursor
    """The baseline to ask from next time: everything up to here is in the answer."""
    fresh: bool
    """The answer may lack changes, so the consumer has to look at everything: the baseline is older than the journal, a
    desync of a layer that was asked for is not closed, damage has taken records behind the baseline, or a layer that was
    named was not watched yet then, or never."""
    entries: tuple[PathEntry | DirectoryEntry, ...]
    """In order of layers and paths, so what is above a path comes before it. No path of a layer comes twice."""


class Stream(NamedTuple):
    """The answer with entries that are made as they are taken, once. See `Changes`."""

    cursor: Cursor
    fresh: bool
    entries: Iterator[PathEntry | DirectoryEntry]


class Question(msgspec.Struct, frozen=True):
    """What is asked for."""

    layers: frozenset[str] = frozenset()
    """Empty for all that are watched, whenever that began."""
    prefix: bytes | None = None
    """A path in a layer: the answer is about it and what is below it, and holds its renamed or removed ancestors."""
    dirs: bool = False
    """The directories that hold the changes, not the paths."""
    ancestors: bool = False
    """With `dirs`: all directories above them too, up to `prefix`."""

    def concerns(self, path: bytes, recursive: bool) -> bool:
        """Whether an entry for the path belongs into the answer."""
        prefix = self.prefix
        if not prefix or path == prefix or path.startswith(prefix + b"/"):
            return True
        return recursive and (not path or prefix.startswith(path + b"/"))

    def may_concern(self, change: Change) -> bool:
        """Whether the change has any part in the answer."""
        if self.layers and change.layer not in self.layers:
            return False
        return (
            not self.prefix
            or self.concerns(change.path, True)
            or (change.from_path is not None and self.concerns(change.from_path, True))
        )


class _Overview(NamedTuple):
    """What is known without reading all that lies behind the baseline."""

    there: Extent
    since: int
    fresh: bool
    rows: Rows | None = None
    """Directories with changes behind the baseline; None when that is not known."""
    start: Position | None = None
    """Where to begin reading; None when only the segment is known."""
    checkpoint: Checkpoint | None = None
    """What all records up to `there` amount to."""


def collect(
    state_directory: Path,
    since: str,
    *,
    layers: frozenset[str] = frozenset(),
    prefix: bytes | None = None,
    dirs: bool = False,
    ancestors: bool = False,
) -> Changes:
    """What changed behind the cursor `since`; see `Question`.

    Raises JournalError, and UsageError for a cursor that means nothing here.
    """
    cursor, fresh, entries = stream(state_directory, since, Question(layers, prefix, dirs, ancestors))
    return Changes(cursor, fresh, tuple(entries))


def stream(state_directory: Path, since: str, question: Question) -> Stream:
    """Like `collect`, for answers that are too large to be kept twice."""
    journal = state_directory / JOURNAL
    cursors = Cursors(state_directory / named.DIRECTORY)
    overview = consult(
        state_directory, partial(_look_up, journal=journal, since=since, cursors=cursors, asked=question)
    )
    if overview is None:
        there = extent(journal)
        seq = named.resolve(since, there, cursors)
        overview = _Overview(there, seq, seq + 1 < there.first_seq)
    rows = overview.rows
    if rows is not None and (question.dirs or not rows):
        cursor = Cursor(overview.there.epoch, overview.there.last_seq)
        return Stream(cursor, overview.fresh, _directory_entries(rows, overview.since, question))
    return _read(journal, overview, question)


def _look_up(index: Index, *, journal: Path, since: str, cursors: Cursors, asked: Question) -> _Overview | None:
    """What the index knows, and the journal behind it."""
    if not is_valid(index.mark, journal):
        return None
    tail, state = Directories(), JournalState(index.mark.checkpoint)
    try:
        with Follower(journal, index.mark.position) as follower:
            while (chunk := follower.poll_frames()).frames:
                for seq, entry in follower.decode(chunk, chunk.frames):
                    if not isinstance(entry, Change):
                        state.apply(entry, seq)
                    elif asked.may_concern(entry):
                        tail.apply(seq, entry)
            there = Extent(follower.epoch, list_segments(journal)[0], follower.position.seq)
    except RecordsGoneError:
        return None
    seq = named.resolve(since, there, cursors)
    behind = max(seq, there.first_seq - 1)
    fresh = seq + 1 < there.first_seq or state.is_fresh(seq, asked.layers)
    rows = _rows(index, tail.layers(), behind, asked)
    start = index.position(seq)
    if start and start.seq + 1 < there.first_seq:
        start = None
    return _Overview(there, seq, fresh, rows, start, state.checkpoint())


def _rows(index: Index, tail: Rows, since: int, asked: Question) -> Rows | None:
    """The directories that changed; None when the paths are asked for and it is not known that there are none."""
    if not asked.dirs and not asked.prefix:
        return None
    layers = asked.layers or {*index.layers, *tail}
    rows = index.changed(since, layers=layers, prefix=asked.prefix)
    _add(rows, tail, since, asked)
    if asked.dirs or rows:
        return rows
    # The prefix may be no directory: then its own changes are those in the one that holds it.
    assert asked.prefix
    above = asked.prefix.rpartition(b"/")[0]
    seqs = (max(index.row(layer, above).own, _row(tail, layer, above).own) for layer in layers)
    return None if any(seq > since for seq in seqs) else rows


def _row(rows: Rows, layer: str, path: bytes) -> Directory:
    return rows.get(layer, {}).get(path, Directory())


def _add(rows: Rows, more: Rows, since: int, asked: Question) -> None:
    """Adds to `rows` what of `more` was asked for."""
    for layer, directories in more.items():
        known = rows.setdefault(layer, {})
        for path, row in directories.items():
            if row.below > since and asked.concerns(path, row.whole > since):
                known[path] = Directory(*map(max, row, known.get(path, row)))
        if not known:
            del rows[layer]


def _read(journal: Path, overview: _Overview, asked: Question) -> Stream:
    """The answer from the journal itself."""
    fresh = overview.since + 1 < overview.there.first_seq
    start: Position | int = overview.start or overview.since
    while True:
        fold = _Fold(overview, asked)
        try:
            with Follower(journal, start) as follower:
                fold.read(follower)
                cursor = Cursor(follower.epoch, follower.position.seq)
            return Stream(cursor, fresh or fold.is_fresh(), fold.entries())
        except RecordsGoneError:
            if isinstance(start, Position):
                start = overview.since
            else:
                fresh, start = True, 0


class _Fold:
    """The records behind the baseline, put together."""

    def __init__(self, overview: _Overview, asked: Question) -> None:
        self._since, self._asked = overview.since, asked
        self._paths, self._directories = Paths(), Directories()
        self._state = JournalState(overview.checkpoint)
        self._state_seq = overview.there.last_seq if overview.checkpoint else -1

    def read(self, follower: Follower) -> None:
        """Takes in what there is up to the end that there is now."""
        since, may_concern = self._since, self._asked.may_concern
        apply = self._directories.apply if self._asked.dirs else self._paths.apply
        while (chunk := follower.poll_frames()).frames:
            frames = [frame for frame in chunk.frames if frame[0] > since or frame[1] != CHANGE_TYPE]
            for seq, entry in follower.decode(chunk, frames):
                if not isinstance(entry, Change):
                    if seq > self._state_seq:
                        self._state.apply(entry, seq)
                elif may_concern(entry):
                    apply(seq, entry)

    def is_fresh(self) -> bool:
        """Whether changes that were asked for may be missing."""
        return self._state.is_fresh(self._since, self._asked.layers)

    def entries(self) -> Iterator[PathEntry | DirectoryEntry]:
        """The answer."""
        if not self._asked.dirs:
            return self._paths.entries(self._asked.concerns)
        rows: Rows = {}
        _add(rows, self._directories.layers(), self._since, self._asked)
        return _directory_entries(rows, self._since, self._asked)


def _directory_entries(rows: Rows, since: int, asked: Question) -> Iterator[DirectoryEntry]:
    for layer, directories in sorted(rows.items()):
        for path, row in sorted(directories.items()):
            if not asked.concerns(path, False):
                yield DirectoryEntry(layer, path, row.whole, True)
            elif row.own > since or asked.ancestors:
                yield DirectoryEntry(layer, path, row.below if asked.ancestors else row.own, row.whole > since)
