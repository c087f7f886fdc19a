"""Takes the directory as the last run left it, maybe in a crash, to one that can be appended to. Blocking.

Only the last segment is read whole: every earlier one was on disk before the next one got its name. Good records
are never dropped. What follows the last good record of the last segment is one of two things. If nothing in it
proves that it had been on disk, it is a torn tail: it is copied to a `.torn` file and cut off. Otherwise something
damaged the journal, and opening is refused until a person has looked at it.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from watchd.errors import JournalError
from watchd.journal.disk import REAL, Disk, File, write_all
from watchd.journal.format import (
    CHANGE_TYPE,
    FIRST_SEQ,
    HEADER_BYTES,
    Checkpoint,
    LayerMark,
    Scan,
    SegmentHeader,
    decode_entry,
    encode_frames,
    encode_header,
)
from watchd.journal.segments import (
    VERIFY,
    Segment,
    create_segment,
    decode_failure,
    disk_errors,
    list_segments,
    write_file,
)
from watchd.journal.state import JournalState

LOCK_NAME: Final = "lock"


class Recovered(msgspec.Struct, frozen=True):
    """What the last run left behind."""

    layers: dict[str, LayerMark]
    """The last checkpoint's layers, brought up to date by the records after it."""
    stopped: bool
    """The last record is a `Stop`: nothing was going on when the last run ended."""
    last_time_ns: int
    """`time_ns` of the last record; 0 when there is none."""
    torn: Path | None
    """Where an unfinished write of the last run was set aside."""


class Opened(msgspec.Struct, frozen=True):
    """A journal that is ready to be appended to."""

    header: SegmentHeader
    """Of the last segment."""
    end: int
    """Size of the last segment."""
    first_seq: int
    last_seq: int
    bytes: int
    """Size of all segments."""
    checkpoint: Checkpoint
    torn: Path | None

    def recovered(self) -> Recovered:
        """The part of it that concerns the journal's owner."""
        note = self.checkpoint
        return Recovered(note.layers, note.stopped, note.last_time_ns, self.torn)


def lock(directory: Path, *, disk: Disk = REAL) -> File:
    """Makes this process the directory's only writer until the returned file is closed.

    Creates the directory. Raises JournalError when it cannot, or when there is a writer.
    """
    with disk_errors(f"cannot use the journal directory {directory}"):
        disk.make_directory(directory)
        file = disk.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT)
    try:
        file.lock()
        file.truncate(0)
        write_all(file, b"%d\n" % os.getpid(), 0)
    except BlockingIOError:
        holder = file.pread(32, 0).decode("ascii", "replace").strip()
        file.close()
        by = f"process {holder}" if holder.isdigit() else "another process"
        raise JournalError(
            f"the journal {directory} is being written by {by}",
            remedy="stop it, or give this one another state_directory",
        ) from None
    except OSError as error:
        file.close()
        raise JournalError(f"cannot lock the journal {directory}: {error.strerror}") from error
    return file


def recover(directory: Path, *, disk: Disk = REAL) -> Opened:
    """Opens the locked directory, which may be empty. Raises JournalError when it is damaged or cannot be written."""
    firsts = list_segments(directory, disk=disk)
    with disk_errors(f"cannot write to the journal {directory}"):
        for name in disk.names(directory):
            if name.endswith(".wal.tmp"):
                disk.unlink(directory / name)
        if not firsts:
            header = encode_header(os.urandom(8), FIRST_SEQ, time.time_ns())
            create_segment(directory, FIRST_SEQ, begin_segment(header, FIRST_SEQ - 1, Checkpoint({})), disk=disk)
            disk.sync_directory(directory.parent)
            firsts = [FIRST_SEQ]
        disk.sync_directory(directory)
    earlier = _check_headers(directory, firsts, disk)
    with Segment(directory, firsts[-1], disk=disk) as segment:
        opened = _recover_segment(segment, firsts[0], disk)
    return msgspec.structs.replace(opened, bytes=earlier + opened.end)


def begin_segment(header: bytes, last_seq: int, checkpoint: Checkpoint) -> bytes:
    """The bytes that every segment begins with: its header and a checkpoint."""
    seed = int.from_bytes(header[-4:], "little")
    return header + encode_frames([checkpoint], last_seq, seed=seed, synced=True)


def _check_headers(directory: Path, firsts: list[int], disk: Disk) -> int:
    """All segments must belong to the same journal; returns the size of all but the last."""
    epoch = None
    earlier = size = 0
    for first in firsts:
        with Segment(directory, first, disk=disk) as segment:
            if epoch not in (None, segment.header.epoch):
                raise JournalError(f"{segment.path} belongs to another journal than its predecessor", remedy=VERIFY)
            epoch = segment.header.epoch
            earlier, size = earlier + size, segment.size()
    return earlier


def _recover_segment(segment: Segment, first_seq: int, disk: Disk) -> Opened:
    """Reads the last segment to its end and cuts a torn tail off."""
    state = JournalState()
    offset, last_seq = HEADER_BYTES, segment.header.first_seq - 1
    while True:
        buffer, found = segment.frames(offset, last_seq)
        if not found.frames:
            break
        _apply(segment, state, buffer, found, offset)
        offset += found.end
        last_seq = found.frames[-1][0]
    torn = None
    if offset == HEADER_BYTES:
        raise segment.damage(offset, last_seq, found.fault)
    if buffer:
        if segment.is_damage(buffer, found, offset, last_seq):
            raise segment.damage(offset, last_seq, found.fault)
        torn = _set_tail_aside(segment, offset, disk)
    segment.sync(offset)
    return Opened(segment.header, offset, first_seq, last_seq, 0, state.checkpoint(), torn)


def _apply(segment: Segment, state: JournalState, buffer: bytes, found: Scan, offset: int) -> None:
    """Brings `state` up to date. Of changes only the last one matters, for its time."""
    last = found.frames[-1]
    for frame in found.frames:
        seq, number, start, _end = frame
        if number == CHANGE_TYPE and frame is not last:
            continue
        try:
            entry = decode_entry(buffer, frame)
        except JournalError as error:
            raise decode_failure(segment, offset + start, error) from error
        if entry is not None:
            state.apply(entry, seq)


def _set_tail_aside(segment: Segment, end: int, disk: Disk) -> Path:
    """Copies what follows `end` to a file of its own, then cuts it off."""
    path = segment.path
    with disk_errors(f"cannot set the torn tail of {path} aside"), disk.open(path, os.O_RDWR) as file:
        aside = _write_aside(path, end, file.pread(file.size() - end, end), disk)
        disk.sync_directory(path.parent)
        file.truncate(end)
        file.sync()
    return aside


def _write_aside(path: Path, end: int, tail: bytes, disk: Disk) -> Path:
    """Writes `<segment>-<offset>[-<n>].torn`; an older one of that name stays."""
    number = 0
    while True:
        aside = path.with_name(f"{path.stem}-{end}{f'-{number}' if number else ''}.torn")
        with suppress(FileExistsError):
            write_file(aside, tail, flags=os.O_EXCL, disk=disk)
            return aside
        number += 1
