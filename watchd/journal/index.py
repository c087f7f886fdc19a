"""The index: for every directory the last change in it and below it, in SQLite, so that "what changed below this tree?"
need not read the journal. One writer, the daemon; any number of readers, with or without one.

It is a fold over durable records and remembers, in the same transaction, how far it has read. So it is never ahead of
the journal, a crash makes it lag, and whoever opens it reads the journal from there. Losing it costs time only.

Facts about SQLite (3.40), WAL mode, and what they mean for us
* The first connection makes `-wal` and `-shm` files, the last one that closes removes them. After a crash they stay.
* A connection with `mode=ro` makes them too. With `readonly_shm=1` as well it changes no file where they exist, and
  fails where they do not. Without them nobody writes, and `immutable=1` reads the database itself, without any lock:
  whoever does so has to look afterwards whether a writer came meanwhile.
* An index of a table WITHOUT ROWID holds the primary key too. One with all columns spares a second look for every row.
* `synchronous=NORMAL` may lose the last transactions in a power cut, never a part of one.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, Self, TypeVar

import msgspec

from watchd.errors import JournalError
from watchd.journal.directories import Directory, up_from
from watchd.journal.disk import REAL, Disk
from watchd.journal.format import Checkpoint
from watchd.journal.reader import Position
from watchd.journal.segments import Segment

FILE: Final = "index.db"
"""Its name in the state directory."""

VERSION: Final = 1
BUSY_TIMEOUT_S: Final = 5.0
CACHE_KIB: Final = 512
"""Of the writer. With four or sixteen times as much it takes as long."""

ATTEMPTS: Final = 3
"""A reader that the coming or going of a writer disturbs tries so often."""

FEW: Final = 50_000
"""So many directories that changed are rather looked at one by one than all that lie below a path."""

Rows = dict[str, dict[bytes, Directory]]
"""Directories by layer and path."""

T = TypeVar("T")

_SCHEMA: Final = f"""
CREATE TABLE directories (
    layer INTEGER NOT NULL,
    path BLOB NOT NULL,
    own_seq INTEGER NOT NULL,
    below_seq INTEGER NOT NULL,
    whole_seq INTEGER NOT NULL,
    PRIMARY KEY (layer, path)
) WITHOUT ROWID;
CREATE INDEX directories_by_seq ON directories (layer, below_seq, own_seq, whole_seq);
CREATE TABLE positions (seq INTEGER PRIMARY KEY, segment INTEGER NOT NULL, offset INTEGER NOT NULL);
CREATE TABLE layers (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE mark (id INTEGER PRIMARY KEY CHECK (id = 0), content BLOB NOT NULL);
PRAGMA user_version = {VERSION};
"""

_PUT: Final = """
INSERT INTO directories VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
    own_seq = max(own_seq, excluded.own_seq),
    below_seq = max(below_seq, excluded.below_seq),
    whole_seq = max(whole_seq, excluded.whole_seq)
"""

_COLUMNS: Final = "path, own_seq, below_seq, whole_seq"


_NOT_ITS_FAULT: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
    }
)


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """How far the index has read the journal."""

    epoch: str
    position: Position
    segment_crc: int
    """Of the header of the position's segment: a segment that was made anew has another one."""
    checkpoint: Checkpoint
    """What all records up to there amount to."""


_encode_mark = msgspec.msgpack.Encoder().encode
_decode_mark = msgspec.msgpack.Decoder(Mark).decode


class IndexWriter:
    """The index, open for writing; used in one thread. Everything raises sqlite3.Error."""

    def __init__(self, state_directory: Path) -> None:
        """Creates it where there is none; one of another version is made anew."""
        path = state_directory / FILE
        with suppress(OSError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite would let others read it
        self._connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            if self._connection.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                self._make_anew()
            self._layers = _layers(self._connection)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Closes it."""
        self._connection.close()

    def mark(self) -> Mark | None:
        """How far it has read; None while it is empty."""
        return _mark(self._connection)

    def write(self, rows: Rows, mark: Mark, positions: Iterable[Position] = ()) -> None:
        """Takes in what was read since the last time, all or nothing; `positions` are places to begin reading at."""
        with self._transaction() as connection:
            for layer, directories in rows.items():
                number = self._layers.get(layer) or self._add_layer(layer)
                # In the order of the table, so that few of its pages are wanted at a time.
                rows_of_layer = ((number, path, *directories[path]) for path in sorted(directories))
                connection.executemany(_PUT, rows_of_layer)
            places = ((position.seq, position.segment, position.offset) for position in positions)
            connection.executemany("INSERT OR REPLACE INTO positions VALUES (?, ?, ?)", places)
            connection.execute("INSERT OR REPLACE INTO mark VALUES (0, ?)", [_encode_mark(mark)])

    def prune(self, first_seq: int) -> None:
        """Drops the directories whose last change is older than the journal, which begins with `first_seq`."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM positions WHERE seq < ?", [first_seq])
            for name, number in list(self._layers.items()):
                connection.execute("DELETE FROM directories WHERE layer = ? AND below_seq < ?", [number, first_seq])
                if not connection.execute("SELECT 1 FROM directories WHERE layer = ?", [number]).fetchone():
                    connection.execute("DELETE FROM layers WHERE id = ?", [number])
                    del self._layers[name]

    def clear(self) -> None:
        """Makes it empty."""
        with self._transaction() as connection:
            for table in ("directories", "layers", "positions", "mark"):
                connection.execute(f"DELETE FROM {table}")
        self._layers = {}

    def _transaction(self) -> _Transaction:
        return _Transaction(self._connection, self._forget_layers)

    def _forget_layers(self) -> None:
        """What was rolled back may have been a layer's number."""
        self._layers = _layers(self._connection)

    def _add_layer(self, name: str) -> int:
        number = self._connection.execute("INSERT INTO layers (name) VALUES (?)", [name]).lastrowid
        assert number is not None
        self._layers[name] = number
        return number

    def _make_anew(self) -> None:
        for (table,) in self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            self._connection.execute(f'DROP TABLE "{table}"')
        self._connection.executescript(_SCHEMA)


class _Transaction:
    """All or nothing; what is not committed is rolled back."""

    def __init__(self, connection: sqlite3.Connection, rolled_back: Callable[[], None]) -> None:
        self._connection, self._rolled_back = connection, rolled_back

    def __enter__(self) -> sqlite3.Connection:
        self._connection.execute("BEGIN IMMEDIATE")
        return self._connection

    def __exit__(self, kind: object, *_exception: object) -> None:
        if kind is None:
            self._connection.execute("COMMIT")
            return
        with suppress(sqlite3.Error):
            self._connection.execute("ROLLBACK")
        self._rolled_back()


class Index:
    """The index, open for reading. Everything raises sqlite3.Error."""

    def __init__(self, state_directory: Path) -> None:
        path = state_directory / FILE
        self._companions = [Path(f"{path}-{one}") for one in ("shm", "wal")]
        self._is_locked = self._companions[0].exists()
        mode = "readonly_shm=1" if self._is_locked else "immutable=1"
        self._connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&{mode}", uri=True, isolation_level=None)
        try:
            if not self._is_locked and not self.is_undisturbed():
                raise sqlite3.OperationalError("the index is not whole without its log")
            self._connection.execute("BEGIN")
            mark = _mark(self._connection)
            if self._connection.execute("PRAGMA user_version").fetchone()[0] != VERSION or mark is None:
                raise sqlite3.OperationalError("the index is empty, or of another version")
            self.mark: Mark = mark
            """How far it has read."""
            self.layers = _layers(self._connection)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Closes it."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def is_undisturbed(self) -> bool:
        """Whether no writer came whom nothing kept from changing what is read here."""
        return self._is_locked or not any(one.exists() and one.stat().st_size for one in self._companions)

    def changed(self, since: int, *, layers: Iterable[str], prefix: bytes | None) -> Rows:
        """The directories at or below `prefix` with a change behind `since` at or below them, and the ancestors of
        `prefix` that changed as a whole since then.
        """
        rows: Rows = {}
        for name in layers:
            if number := self.layers.get(name):
                found = self._behind(number, since) if not prefix else self._below(number, since, prefix)
                if found:
                    rows[name] = found
        return rows

    def position(self, seq: int) -> Position | None:
        """Where to begin reading for the records behind number `seq`; None where only the segment is known."""
        query = "SELECT segment, offset, seq FROM positions WHERE seq <= ? ORDER BY seq DESC LIMIT 1"
        row = self._connection.execute(query, [seq]).fetchone()
        return row and Position(*row)

    def row(self, layer: str, path: bytes) -> Directory:
        """One directory."""
        return self._select("layer = ? AND path = ?", self.layers.get(layer, 0), path).get(path, Directory())

    def _behind(self, layer: int, since: int) -> dict[bytes, Directory]:
        return self._select("layer = ? AND below_seq > ?", layer, since)

    def _below(self, layer: int, since: int, prefix: bytes) -> dict[bytes, Directory]:
        found: dict[bytes, Directory] = {}
        for path in up_from(prefix):
            row = self._select("layer = ? AND path = ?", layer, path).get(path, Directory())
            if path == prefix and row.below > since:
                found = self._inside(layer, since, prefix) | {path: row}
            elif row.whole > since:
                found[path] = row
        return found

    def _inside(self, layer: int, since: int, prefix: bytes) -> dict[bytes, Directory]:
        """What is below `prefix`, on the shorter one of two ways: all that changed, or all that is below."""
        query = "SELECT count(*) FROM (SELECT 1 FROM directories WHERE layer = ? AND below_seq > ? LIMIT ?)"
        is_few = self._connection.execute(query, [layer, since, FEW]).fetchone()[0] < FEW
        # In terms with a `+` no index is looked for. "0" is the character behind "/".
        where = "+path > ? AND +path < ? AND below_seq > ?" if is_few else "path > ? AND path < ? AND +below_seq > ?"
        return self._select(f"layer = ? AND {where}", layer, prefix + b"/", prefix + b"0", since)

    def _select(self, where: str, *values: int | bytes) -> dict[bytes, Directory]:
        query = f"SELECT {_COLUMNS} FROM directories WHERE {where}"
        return {row[0]: Directory(row[1], row[2], row[3]) for row in self._connection.execute(query, values)}


def consult(state_directory: Path, question: Callable[[Index], T | None]) -> T | None:
    """The answer of `question`, which gets the index; None if it says so, or if the index is of no use."""
    for _ in range(ATTEMPTS):
        try:
            with Index(state_directory) as index:
                answer = question(index)
                if index.is_undisturbed():
                    return answer
        except (sqlite3.Error, OSError):
            continue
    return None


def is_valid(mark: Mark, journal: Path, *, disk: Disk = REAL) -> bool:
    """Whether the journal still holds what the index has read, so that one can go on from there."""
    try:
        with Segment(journal, mark.position.segment, disk=disk) as segment:
            header = segment.header
            return (header.epoch.hex(), header.crc) == (mark.epoch, mark.segment_crc) and (
                segment.size() >= mark.position.offset
            )
    except (JournalError, OSError):
        return False


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the index itself is to blame, so that it has to be made anew; otherwise it is its disk."""
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)  # what is raised here has none
    return code & 0xFF not in _NOT_ITS_FAULT


def remove(state_directory: Path) -> None:
    """Removes the index, which nobody may be writing; it is made anew from the journal. Raises OSError."""
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.unlink(state_directory / f"{FILE}{suffix}")


def _layers(connection: sqlite3.Connection) -> dict[str, int]:
    return dict(connection.execute("SELECT name, id FROM layers"))


def _mark(connection: sqlite3.Connection) -> Mark | None:
    row = connection.execute("SELECT content FROM mark").fetchone()
    try:
        return row and _decode_mark(row[0])
    except msgspec.MsgspecError as error:
        raise sqlite3.DatabaseError(f"the index holds no mark: {error}") from error
