"""`Known`: what is known of every layer, so that a scan can tell exactly what changed. A file of SQLite's, `known.db`.

It is a fold over the journal's durable records: how far it has been brought is written in the same transaction as what came of
it. So it is never ahead of the journal, a crash only makes it lag, and it is brought on when somebody needs it, not with every
change. What cannot come from the journal is the beginning: a layer that is new is walked once (`begin`, `store`, `complete`),
and what was recorded since that walk began is folded onto it.

Facts about SQLite (sqlite.org/wal.html): with journal_mode WAL a reader sees one moment for as long as its transaction lasts,
whatever is written meanwhile; with synchronous NORMAL a power cut may take back the last transactions, whole, and never damages
the file. Every directory is one row, found by a number of its own: inode numbers repeat in a layer (btrfs subvolumes) and are
used again. Numbers are never used again.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from watchd.errors import JournalError, RecordsGoneError
from watchd.journal.folding import Folding, Unsettled, looked_at_together
from watchd.journal.reader import Follower, NumberedRecord, Position
from watchd.records import Change
from watchd.wire.listing import CHILD_BYTES, STATE_BYTES, Listing

NAME: Final = "known.db"
VERSION: Final = 1
LAYERS_MAX: Final = 1000
"""Of so many layers it is kept what is known; those longest not seen go first."""

COMMIT_RECORDS: Final = 200_000
"""Folded in one transaction: bounds what has to be done again after a crash."""

_SCHEMA: Final = """
CREATE TABLE fold (epoch TEXT NOT NULL, segment INTEGER NOT NULL, offset INTEGER NOT NULL, before INTEGER NOT NULL);
CREATE TABLE layers (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, path BLOB NOT NULL,
    root INTEGER NOT NULL, state BLOB NOT NULL, complete INTEGER NOT NULL, upto INTEGER NOT NULL,
    seen_ns INTEGER NOT NULL, unsettled BLOB NOT NULL
);
CREATE TABLE directories (
    id INTEGER PRIMARY KEY, layer INTEGER NOT NULL, names BLOB NOT NULL, states BLOB NOT NULL, children BLOB NOT NULL
);
INSERT INTO fold VALUES ('', 0, 0, 0);
"""
_LOAD: Final = "SELECT names, states, children FROM directories WHERE id = ?"
_SAVE: Final = "INSERT OR REPLACE INTO directories VALUES (?, ?, ?, ?, ?)"

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Unsettled).decode
_SETTLED: Final = _encode(Unsettled())

Row = tuple[int, Listing]
"""A directory: the number of its listing, and the listing."""


class KnownError(JournalError):
    """What is known cannot be read or written."""

    def __init__(self, path: Path, error: Exception) -> None:
        super().__init__(
            f"cannot use {path}: {error}", remedy="see whether its filesystem is full; it may be removed at any time"
        )
        code = getattr(error, "sqlite_errorcode", None)
        self.is_damage = code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
        """The file is damaged, not just out of reach."""


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, ValueError) as error:
        raise KnownError(path, error) from error


def _listing(row: tuple[bytes, bytes, bytes]) -> Listing:
    """Raises ValueError for what cannot be one."""
    listing = Listing(*row)
    count, rest = divmod(len(listing.states), STATE_BYTES)
    if rest or len(listing.children) % CHILD_BYTES or (listing.names.count(b"\0") + 1 != count and count):
        raise ValueError("a directory in it is damaged")
    return listing


class Known:
    """The writer of the file. Belongs to one thread, but for `next_numbers`, `tree` and the plain values."""

    def __init__(self, path: Path, *, journal: Path, epoch: str, last_seq: int) -> None:
        """Opens or makes the file. Raises KnownError.

        What belongs to another journal than the one in the directory `journal`, with this epoch and so many records, is
        kept, to be compared with, and what is of this one folded onto it.
        """
        self.path, self._journal, self._epoch = path, journal, epoch
        self.layers: dict[str, bytes] = {}
        """Name -> path of the layers that are known completely."""
        self.upto = last_seq
        """No record up to this number is needed any more."""
        self.is_enough = False
        """Set, in any thread, to end a fold early: what was not taken in is taken in by the next one."""
        with _errors(path):
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                self._prepare(last_seq)
            except BaseException:
                self._db.close()
                raise
        self._next = 1 + max(self._largest("directories", "id"), self._largest("layers", "root"))
        self._lock = threading.Lock()

    def _prepare(self, last_seq: int) -> None:
        db = self._db
        db.execute("PRAGMA busy_timeout = 10000")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA journal_size_limit = 16777216")
        db.execute("PRAGMA cache_size = -2000")
        [[version]] = db.execute("PRAGMA user_version")
        with self._transaction():
            if version != VERSION:
                for table in ("fold", "layers", "directories"):
                    db.execute(f"DROP TABLE IF EXISTS {table}")
                for statement in _SCHEMA.strip().rstrip(";").split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")
            self._adapt(last_seq)
        self._look()

    def _adapt(self, last_seq: int) -> None:
        """Forget what a crash left unfinished and what is ahead of the journal; begin anew with a new journal."""
        db = self._db
        [[epoch]] = db.execute("SELECT epoch FROM fold")
        if epoch != self._epoch:
            db.execute("UPDATE fold SET epoch = ?, segment = 0, offset = 0, before = 0", (self._epoch,))
            db.execute("UPDATE layers SET upto = 0, unsettled = ?", (_SETTLED,))
        db.execute("DELETE FROM layers WHERE complete = 0 OR upto > ?", (last_seq,))

    def tidy(self) -> None:
        """Delete the directories of layers that are forgotten."""
        with _errors(self.path), self._transaction():
            self._db.execute("DELETE FROM directories WHERE layer NOT IN (SELECT id FROM layers)")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # ---- a layer that is new ----------------------------------------------------------------------------------------

    def next_number(self) -> int:
        """For a directory; in any thread."""
        return self.next_numbers(1)[0]

    def next_numbers(self, count: int) -> range:
        """For so many directories; in any thread."""
        with self._lock:
            first, self._next = self._next, self._next + count
        return range(first, first + count)

    def begin(self, name: str, path: bytes, upto: int) -> int:
        """A layer is going to be walked; changes after record `upto` are told by the journal. Returns its id."""
        with _errors(self.path), self._transaction():
            for (layer,) in self._db.execute("SELECT id FROM layers WHERE name = ?", (name,)).fetchall():
                self._delete(layer)
            row = (name, path, b"", upto, time.time_ns(), _SETTLED)
            cursor = self._db.execute(
                "INSERT INTO layers (name, path, root, state, complete, upto, seen_ns, unsettled)"
                " VALUES (?, ?, 0, ?, 0, ?, ?, ?)",
                row,
            )
        self._look()
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def store(self, layer: int, rows: Iterable[Row]) -> None:
        """Directories of a layer that is being walked."""
        with _errors(self.path), self._transaction():
            if not self._db.execute("SELECT 1 FROM layers WHERE id = ?", (layer,)).fetchone():
                return  # it was given up
            self._db.executemany(_SAVE, ((number, layer, *listing) for number, listing in rows))

    def complete(self, layer: int, root: int, state: bytes) -> None:
        """The walk is done."""
        with _errors(self.path), self._transaction():
            self._db.execute("UPDATE layers SET root = ?, state = ?, complete = 1 WHERE id = ?", (root, state, layer))
            excess = self._db.execute("SELECT id FROM layers ORDER BY seen_ns DESC LIMIT -1 OFFSET ?", (LAYERS_MAX,))
            for (forgotten,) in excess.fetchall():
                self._delete(forgotten)
        self._look()

    def give_up(self, layer: int) -> None:
        """The walk will not be done."""
        with _errors(self.path), self._transaction():
            self._delete(layer)
        self._look()

    def forget(self, name: str) -> None:
        """Nothing is known of a layer any more."""
        with _errors(self.path), self._transaction():
            for (layer,) in self._db.execute("SELECT id FROM layers WHERE name = ?", (name,)).fetchall():
                self._delete(layer)
        self._look()

    def tree(self, name: str) -> KnownTree:
        """A layer as it is known at this moment; in any thread, which is the tree's from then on. Raises KnownError."""
        return KnownTree(self.path, name)

    # ---- following the journal --------------------------------------------------------------------------------------

    def fold(self, upto: int, *, epoch: str) -> int:
        """Take in the records up to number `upto`, which must be durable; returns how many were read.

        Raises KnownError; JournalError if the journal is damaged.
        """
        with _errors(self.path):
            if epoch != self._epoch:  # the journal was lost while it was written
                self._epoch = epoch
                with self._transaction():
                    self._adapt(upto)
                self._look()
            total = 0
            while True:
                try:
                    count = self._fold_some(upto)
                except RecordsGoneError as gone:
                    self._forget_behind(gone.last_seq)
                    continue
                if not count:
                    return total
                total += count

    def _forget_behind(self, seq: int) -> None:
        """Records up to `seq` are gone, and may have told of any layer that had not taken them in."""
        with self._transaction():
            for (layer,) in self._db.execute("SELECT id FROM layers WHERE complete AND upto < ?", (seq,)).fetchall():
                self._delete(layer)
        self._look()

    def _fold_some(self, upto: int) -> int:
        """One transaction."""
        start: int | None = self._db.execute("SELECT min(upto) FROM layers WHERE complete").fetchone()[0]
        if start is None or start >= upto or self.is_enough:
            return 0
        with self._transaction(), self._follower(start) as follower:
            layers = {row[1]: _Layer(self, row) for row in self._rows()}
            last_ns, last, count = 0, start, 0
            done, records = False, []
            while not done and count < COMMIT_RECORDS and not self.is_enough:
                here = follower.position
                records = follower.poll()
                if not records:
                    break
                self._check_gap(records, last, layers)
                for seq, record in records:
                    if seq > upto:
                        done = True
                        break
                    if type(record) is Change and (layer := layers.get(record.layer)) is not None:
                        layer.apply(seq, record)
                    last_ns, last = record.time_ns, seq
                count += len(records)
            is_end = done or last >= upto or not (records or self.is_enough)
            for layer in layers.values():
                layer.write(last_ns, is_end=is_end)
            self._db.execute("UPDATE layers SET upto = ? WHERE complete AND upto < ?", (last, last))
            position = here if done else follower.position
            self._db.execute(
                "UPDATE fold SET segment = ?, offset = ?, before = ?", (position.segment, position.offset, position.seq)
            )
        self._look()
        return max(last - start, 0)

    def _follower(self, start: int) -> Follower:
        """From a place on that is not behind record `start`."""
        [[segment, offset, before]] = self._db.execute("SELECT segment, offset, before FROM fold")
        if segment > 0 and before <= start:
            with suppress(JournalError):  # the segment may be gone
                return Follower(self._journal, Position(segment, offset, before))
        return Follower(self._journal, start)

    def _check_gap(self, records: list[NumberedRecord], last: int, layers: dict[str, _Layer]) -> None:
        """Records that are gone may have told of any layer that had not taken them in."""
        first = records[0][0]
        if first > last + 1:
            for name, layer in list(layers.items()):
                if layer.upto < first - 1:
                    self._delete(layer.id)
                    del layers[name]

    def _rows(self) -> list[tuple[int, str, int, bytes, int, bytes]]:
        return self._db.execute("SELECT id, name, root, state, upto, unsettled FROM layers WHERE complete").fetchall()

    # ---- rows -------------------------------------------------------------------------------------------------------

    def load(self, number: int) -> Listing:
        """See `watchd.journal.folding.Store`."""
        row = self._db.execute(_LOAD, (number,)).fetchone()
        return _listing(row) if row else Listing()

    def save(self, layer: int, number: int, listing: Listing) -> None:
        """Write a directory of a layer."""
        self._db.execute(_SAVE, (number, layer, *listing))

    def delete(self, number: int) -> None:
        """See `watchd.journal.folding.Store`."""
        self._db.execute("DELETE FROM directories WHERE id = ?", (number,))

    def save_layer(self, layer: int, root: int, state: bytes, unsettled: Unsettled) -> None:
        """Write what is not in a directory."""
        self._db.execute(
            "UPDATE layers SET root = ?, state = ?, unsettled = ?, seen_ns = ? WHERE id = ?",
            (root, state, _encode(unsettled), time.time_ns(), layer),
        )

    def _delete(self, layer: int) -> None:
        self._db.execute("DELETE FROM directories WHERE layer = ?", (layer,))
        self._db.execute("DELETE FROM layers WHERE id = ?", (layer,))

    def _largest(self, table: str, column: str) -> int:
        [[largest]] = self._db.execute(f"SELECT max({column}) FROM {table}")
        return int(largest or 0)

    def _look(self) -> None:
        """Say anew what is complete and which records are needed."""
        rows = self._db.execute("SELECT name, path, complete, upto FROM layers").fetchall()
        self.layers = {name: path for name, path, complete, _ in rows if complete}
        self.upto = min((upto for *_, upto in rows), default=_NOTHING_NEEDED)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


_NOTHING_NEEDED: Final = (1 << 63) - 1


class _Layer:
    """A layer while records are folded."""

    def __init__(self, known: Known, row: tuple[int, str, int, bytes, int, bytes]) -> None:
        self.id, _, root, state, self.upto, unsettled = row
        self._known = known
        self._folding = Folding(self, root, state, _decode(unsettled))
        self._is_touched = False
        self._together: list[Change] = self._folding.unsettled.together
        self.load, self.delete, self.next_number = known.load, known.delete, known.next_number

    def apply(self, seq: int, change: Change) -> None:
        """Take in a change, unless it was."""
        if seq <= self.upto:
            return
        self._is_touched = True
        if self._together and not looked_at_together(self._together[-1], change):
            self._apply()
        self._together.append(change)

    def _apply(self) -> None:
        self._folding.apply(self._together)
        self._together.clear()
        if self._folding.is_full():
            self._folding.write()

    def save(self, number: int, listing: Listing) -> None:
        """See `watchd.journal.folding.Store`."""
        self._known.save(self.id, number, listing)

    def write(self, now_ns: int, *, is_end: bool) -> None:
        """Write what came of it; unless this `is_end`, there may be more that belongs to the last changes."""
        if self._is_touched or self._together:
            if is_end and self._together:
                self._apply()
            self._folding.settle(now_ns)
            self._folding.write()
            self._known.save_layer(self.id, self._folding.root, self._folding.state, self._folding.unsettled)


class KnownTree:
    """A layer as it was known when this was opened."""

    def __init__(self, path: Path, name: str) -> None:
        """Raises KnownError."""
        self._path = path
        with _errors(path):
            self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
            try:
                self._db.execute("PRAGMA busy_timeout = 10000")
                self._db.execute("BEGIN")
                row = self._db.execute("SELECT root, state FROM layers WHERE complete AND name = ?", (name,)).fetchone()
                if row is None:
                    raise ValueError(f"it knows no layer {name}")
            except BaseException:
                self._db.close()
                raise
        self.root: int
        self.state: bytes
        self.root, self.state = row

    def listing(self, number: int) -> Listing:
        """The directory of this number. Raises KnownError."""
        with _errors(self._path):
            row = self._db.execute(_LOAD, (number,)).fetchone()
            if row is None:
                raise ValueError(f"directory {number} is missing")
            return _listing(row)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()


def set_aside(path: Path) -> Path:
    """Give a damaged file another name, so that a new one can be made; returns that. Raises OSError."""
    aside = path.with_name(f"{path.name}.damaged")
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{aside}{suffix}")
    return aside
