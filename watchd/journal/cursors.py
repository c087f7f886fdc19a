"""Positions in a journal: as people write them, and named ones that consumers keep.

A cursor stands behind a record: `EPOCH:SEQ`, `now` (behind the last one), `beginning` (before the first one there ever
was) or a name. A name is a file in `state_directory/cursors/` that holds `EPOCH:SEQ` and a newline. It is replaced as a
whole, so whoever reads it sees the old position or the new one, and a crash leaves one of them. Files that watchd
would not have made are passed over.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Final

import msgspec

from watchd.errors import RecordsGoneError, UsageError
from watchd.journal.disk import REAL, Disk, write_all
from watchd.journal.reader import Extent
from watchd.journal.segments import disk_errors

DIRECTORY: Final = "cursors"
"""Where they lie in the state directory."""

NOW: Final = "now"
BEGINNING: Final = "beginning"

_POSITION: Final = re.compile(r"([0-9a-f]{16}):([0-9]{1,19})")
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_FILE_BYTES_MAX: Final = 64


class Cursor(msgspec.Struct, frozen=True):
    """Behind record `seq` of the journal `epoch`."""

    epoch: str
    """16 hexadecimal digits."""
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}:{self.seq}"


def parse(text: str) -> Cursor | None:
    """The cursor that `EPOCH:SEQ` means; None for anything else."""
    match = _POSITION.fullmatch(text)
    return Cursor(match[1], int(match[2])) if match else None


def is_name(text: str) -> bool:
    """Whether a cursor may be called so."""
    return bool(_NAME.fullmatch(text)) and text not in (NOW, BEGINNING)


class Cursors:
    """The named cursors of a state directory. Any number of processes may use them at once."""

    def __init__(self, directory: Path, *, disk: Disk = REAL) -> None:
        """`directory` need not exist; the first `set` makes it."""
        self._directory, self._disk = directory, disk

    def all(self) -> dict[str, Cursor]:
        """Every cursor by name, in order of names. Raises JournalError when the directory cannot be listed."""
        with disk_errors(f"cannot list the cursors in {self._directory}"), contextlib.suppress(FileNotFoundError):
            names = sorted(filter(is_name, self._disk.names(self._directory)))
            return {name: cursor for name in names if (cursor := self._read(name))}
        return {}

    def get(self, name: str) -> Cursor:
        """Raises UsageError when there is none of that name, JournalError when it cannot be read."""
        cursor = None
        if is_name(name):
            with disk_errors(f"cannot read the cursor {name}"):
                cursor = self._read(name)
        if cursor is None:
            raise UsageError(f"there is no cursor {name!r}", remedy="see `watchd cursor list`, or set it")
        return cursor

    def set(self, name: str, cursor: Cursor) -> None:
        """Durable on return. Raises UsageError for a bad name, JournalError when the disk refuses."""
        if not is_name(name):
            raise UsageError(
                f"{name!r} cannot be the name of a cursor",
                remedy=f"take a letter and then at most 63 of A-Z a-z 0-9 . _ -, but neither {NOW} nor {BEGINNING}",
            )
        temporary = self._directory / f".{name}.{os.getpid()}.tmp"
        with disk_errors(f"cannot write the cursor {name} in {self._directory}"):
            self._disk.make_directory(self._directory)
            with self._disk.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
                write_all(file, f"{cursor}\n".encode(), 0)
                file.sync()
            self._disk.rename(temporary, self._directory / name)
            self._disk.sync_directory(self._directory)
            self._disk.sync_directory(self._directory.parent)

    def delete(self, name: str) -> None:
        """Durable on return. Raises UsageError when there is none of that name, JournalError when the disk refuses."""
        self.get(name)
        with disk_errors(f"cannot remove the cursor {name} in {self._directory}"):
            with contextlib.suppress(FileNotFoundError):  # somebody else was faster
                self._disk.unlink(self._directory / name)
            self._disk.sync_directory(self._directory)

    def _read(self, name: str) -> Cursor | None:
        """None when there is none, or something that is none. Raises OSError."""
        try:
            with self._disk.open(self._directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as file:
                text = file.pread(_FILE_BYTES_MAX, 0).decode("ascii", "replace")
        except PermissionError:
            raise
        except OSError:
            return None  # a link, a directory, a pipe
        return parse(text.removesuffix("\n"))


def resolve(text: str, extent: Extent, cursors: Cursors) -> int:
    """The sequence number behind which `text` stands, 0 for `beginning`.

    Raises UsageError when it is no cursor, belongs to another journal or lies beyond the end; JournalError when a named
    one cannot be read.
    """
    if text == BEGINNING:
        return 0
    if text == NOW:
        return extent.last_seq
    cursor = find(text, cursors)
    shown = str(cursor) if text == str(cursor) else f"{text} ({cursor})"
    if cursor.epoch != extent.epoch:
        remedy = f"start over from {BEGINNING}"
        raise UsageError(f"cursor {shown} belongs to another journal, this one is {extent.epoch}", remedy=remedy)
    if cursor.seq > extent.last_seq:
        remedy = f"give {NOW} for its end"
        raise UsageError(f"cursor {shown} lies beyond the journal's end at {extent.last_seq}", remedy=remedy)
    return cursor.seq


def resolve_kept(text: str, extent: Extent, cursors: Cursors) -> int:
    """Like `resolve`, for who reads record by record: raises RecordsGoneError too, when the next one was removed.

    `beginning` is always good, and means the oldest record that there is.
    """
    seq = resolve(text, extent, cursors)
    if text != BEGINNING and seq + 1 < extent.first_seq:
        raise RecordsGoneError(seq + 1, extent.first_seq - 1)
    return seq


def lag(cursor: Cursor, epoch: str, last_seq: int) -> int:
    """How many records lie behind the cursor in a journal: all there ever were if the cursor belongs to another one."""
    return max(0, last_seq - (cursor.seq if cursor.epoch == epoch else 0))


def find(text: str, cursors: Cursors) -> Cursor:
    """The cursor that is written as `EPOCH:SEQ` or has this name. Raises UsageError and JournalError like `resolve`."""
    cursor = parse(text)
    if cursor is None and not is_name(text):
        raise UsageError(f"{text!r} is no cursor", remedy=f"give EPOCH:SEQ, a name, {NOW} or {BEGINNING}")
    return cursor or cursors.get(text)
