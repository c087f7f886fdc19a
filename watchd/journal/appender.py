"""The last segment of a journal, open for appending; begins new segments. Blocking: it belongs to the journal's thread.

Every few MiB it seals what is before with the checksum of all of it, so that the next start need not look at each frame.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from watchd.errors import JournalError
from watchd.journal.disk import Disk, File, write_all
from watchd.journal.format import SEAL_BYTES, Checkpoint, Entry, decode_header, encode_frames, encode_header
from watchd.journal.reader import Position
from watchd.journal.recovery import Opened, begin_segment
from watchd.journal.segments import create_segment, segment_path
from watchd.journal.state import JournalState

REMOVED: Final = "leave the state_directory to watchd; it goes on in a new journal"


class Appended(NamedTuple):
    """What a commit came to."""

    begin: Position
    """Where the journal ended before. A segment that the commit began lies between."""
    end: Position
    bytes: int
    """By which the journal grew."""
    append_ns: int
    """Time that encoding and writing took."""
    sync_ns: int
    """Time that fdatasync took."""


class Appender:
    """Owns the segment's file. After any method raised, nothing but `close` may be called."""

    def __init__(self, directory: Path, opened: Opened, *, disk: Disk, segment_size_bytes: int) -> None:
        """Opens the segment's file. Raises OSError."""
        self._directory, self._disk = directory, disk
        self._segment_size_bytes = segment_size_bytes
        self._header = opened.header
        self._size, self._crc = opened.end, opened.crc
        self._sealed = opened.sealed
        self._state = JournalState(opened.checkpoint)
        self._last_seq = opened.last_seq
        self._synced = True
        self._file: File | None = self._open()

    def close(self) -> None:
        """Closes the segment's file, if it is open."""
        if self._file:
            file, self._file = self._file, None
            file.close()

    def commit(self, entries: Sequence[Entry], *, sync: bool) -> Appended:
        """Writes `entries` and, with `sync`, puts them on disk. Raises OSError, or JournalError for an entry that is too
        long and for a segment that was removed.
        """
        begun_ns, begin = time.perf_counter_ns(), self._position()
        grown = self._append(entries)
        appended_ns = time.perf_counter_ns()
        if sync:
            self.sync()
        sync_ns = time.perf_counter_ns() - appended_ns
        return Appended(begin, self._position(), grown, appended_ns - begun_ns, sync_ns)

    def sync(self) -> None:
        """Returns when everything that was appended is on disk. Raises OSError."""
        if self._file and not self._synced:
            self._file.sync()
            self._synced = True

    def check(self) -> None:
        """Raises JournalError when the segment is not where it is looked for any more."""
        path = self._path()
        if self._file and not self._file.is_at(path):
            raise JournalError(f"{path} was removed or replaced while it was written", remedy=REMOVED)

    def _position(self) -> Position:
        """Where the next entry goes."""
        return Position(self._header.first_seq, self._size, self._last_seq)

    def _path(self) -> Path:
        return segment_path(self._directory, self._header.first_seq)

    def _open(self) -> File:
        return self._disk.open(self._path(), os.O_WRONLY)

    def _append(self, entries: Sequence[Entry]) -> int:
        grown = 0
        if self._size >= self._segment_size_bytes:
            if self._last_seq >= self._header.first_seq:
                grown = self._begin_segment()
            else:
                # No segment can follow one without records: it would have the same name. A checkpoint only saves
                # the next start some looking, so it is left out rather than written without bound.
                entries = [entry for entry in entries if not isinstance(entry, Checkpoint)]
        if self._size - self._sealed >= SEAL_BYTES:
            entries = [self._seal(), *entries]
        frames = encode_frames(entries, self._last_seq, seed=self._header.crc, synced=self._synced)
        self._last_seq = self._state.apply_all(entries, self._last_seq)
        self._write(frames)
        return grown + len(frames)

    def _seal(self) -> Checkpoint:
        self._sealed = self._size
        return msgspec.structs.replace(self._state.checkpoint(), offset=self._size, crc=self._crc)

    def _write(self, frames: bytes) -> None:
        assert self._file
        self._synced = False
        self.check()  # nobody would ever read what is written to a file without a name
        write_all(self._file, frames, self._size)
        self._size += len(frames)
        self._crc = zlib.crc32(frames, self._crc)

    def _begin_segment(self) -> int:
        """Begins the next segment. The old one is on disk by then, however the journal is synced."""
        self.sync()
        self.check()
        first_seq = self._last_seq + 1
        header = encode_header(self._header.epoch, first_seq, time.time_ns())
        content = begin_segment(header, self._last_seq, self._state.checkpoint())
        create_segment(self._directory, first_seq, content, disk=self._disk)
        self.close()
        self._header = decode_header(header)
        self._size, self._sealed, self._crc = len(content), 0, zlib.crc32(content)
        self._file = self._open()
        return len(content)
