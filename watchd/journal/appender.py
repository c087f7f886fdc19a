"""The last segment of a journal, open for appending; begins new segments.

All of it runs in the journal's own thread, through aiofiles: a slow disk delays nothing but the journal, and other
users of the default executor cannot delay the journal.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import aiofiles.os

from watchd.errors import JournalError
from watchd.journal.disk import Disk, File, write_all
from watchd.journal.format import Checkpoint, Entry, decode_header, encode_frames, encode_header
from watchd.journal.reader import Position
from watchd.journal.recovery import Opened, begin_segment
from watchd.journal.segments import create_segment, segment_path
from watchd.journal.state import JournalState

REMOVED: Final = "leave the state_directory to watchd; it goes on in a new journal"

P = ParamSpec("P")
T = TypeVar("T")


class Appender:
    """Owns the segment's file. After any method raised, nothing but `close` may be called."""

    def __init__(
        self, directory: Path, opened: Opened, *, disk: Disk, executor: ThreadPoolExecutor, segment_size_bytes: int
    ) -> None:
        self._directory, self._disk = directory, disk
        self._executor = executor
        self._segment_size_bytes = segment_size_bytes
        self._header = opened.header
        self._size = opened.end
        self._state = JournalState(opened.checkpoint)
        self._synced = True
        self._file: File | None = None
        self.last_seq = opened.last_seq
        """Of the last record that was written."""

    @property
    def position(self) -> Position:
        """Where the next entry goes."""
        return Position(self._header.first_seq, self._size, self.last_seq)

    async def open(self) -> None:
        """Opens the segment's file. Raises OSError."""
        path = segment_path(self._directory, self._header.first_seq)
        self._file = await self._run(self._disk.open, path, os.O_WRONLY)

    async def close(self) -> None:
        """Closes the segment's file, if it is open."""
        if self._file:
            file, self._file = self._file, None
            await self._run(file.close)

    async def check(self) -> None:
        """Raises JournalError when the segment is not where it is looked for any more."""
        await self._run(self._check)

    async def append(self, entries: Sequence[Entry]) -> int:
        """Writes `entries` and returns by how many bytes the journal grew. Raises OSError, or JournalError for an entry
        that is too long.
        """
        grown = 0
        if self._size >= self._segment_size_bytes:
            if self.last_seq >= self._header.first_seq:
                grown = await self._begin_segment()
            else:
                # No segment can follow one without records: it would have the same name. A checkpoint only saves
                # the next start some looking, so it is left out rather than written without bound.
                entries = [entry for entry in entries if not isinstance(entry, Checkpoint)]
        frames = await self._run(self._encode, entries)
        await self._write(frames)
        return grown + len(frames)

    async def sync(self) -> None:
        """Returns when everything that was appended is on disk. Raises OSError."""
        if self._file and not self._synced:
            await self._run(self._file.sync)
            self._synced = True

    async def _run(self, call: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
        """In the journal's own thread."""
        return await aiofiles.os.wrap(call)(*arguments, executor=self._executor, **keywords)

    def _encode(self, entries: Sequence[Entry]) -> bytes:
        frames = encode_frames(entries, self.last_seq, seed=self._header.crc, synced=self._synced)
        self.last_seq = self._state.apply_all(entries, self.last_seq)
        return frames

    def _check(self) -> None:
        path = segment_path(self._directory, self._header.first_seq)
        if self._file and not self._file.is_at(path):
            raise JournalError(f"{path} was removed or replaced while it was written", remedy=REMOVED)

    async def _write(self, frames: bytes) -> None:
        self._synced = False
        await self._run(self._append, frames)
        self._size += len(frames)

    def _append(self, frames: bytes) -> None:
        assert self._file
        self._check()  # nobody would ever read what is written to a file without a name
        write_all(self._file, frames, self._size)

    async def _begin_segment(self) -> int:
        """Begins the next segment. The old one is on disk by then, however the journal is synced."""
        await self.sync()
        await self.check()
        first_seq = self.last_seq + 1
        header = encode_header(self._header.epoch, first_seq, time.time_ns())
        content = begin_segment(header, self.last_seq, self._state.checkpoint())
        await self._run(create_segment, self._directory, first_seq, content, disk=self._disk)
        await self.close()
        self._header = decode_header(header)
        self._size = len(content)
        await self.open()
        return len(content)
