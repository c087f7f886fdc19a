"""Takes the directory as the last run left it, maybe in a crash, to one that can be appended to. Blocking.

Only the last segment is read whole: every earlier one was on disk before the next one got its name. Of what a seal
stands behind the checksum is looked at as a whole, and frames one by one only if it does not match. Good records
are never dropped. What follows the last good record of the last segment is one of two things. If nothing in it
proves that it had been on disk, it is a torn tail: it is copied to a `.torn` file and cut off. Otherwise something
damaged the journal, and opening is refused until a person has looked at it.

Records that read well may be in memory only, if an fdatasync of the last run failed (see `disk`). So what no SYNCED
frame behind it proves to have been on disk is written again, the same bytes at the same place: whenever that is cut
short, whoever follows the journal finds what he has seen.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from watchd.errors import JournalError
from watchd.journal.disk import REAL, Disk, File, write_all
from watchd.journal.format import (
    CHANGE_TYPE,
    FIRST_SEQ,
    HEADER_BYTES,
    SEAL_BYTES,
    Checkpoint,
    Frame,
    LayerMark,
    Scan,
    SegmentHeader,
    decode_entry,
    encode_frames,
    encode_header,
    frame_at,
    is_synced,
    seal_marks,
)
from watchd.journal.segments import (
    CHUNK_BYTES,
    VERIFY,
    Segment,
    check_ours,
    create_segment,
    decode_failure,
    disk_errors,
    list_segments,
    write_aside,
    write_file,
)
from watchd.journal.state import JournalState

LOCK_NAME: Final = "lock"

SEARCH_BYTES: Final = 2 * SEAL_BYTES
"""So much of a segment's end is looked through for a seal."""

CRC_CHUNK_BYTES: Final = 1 << 20

TRIAL_BYTES: Final = 1 << 20
"""A journal that has failed is opened again when its disk takes so much."""


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
    every_layer: int = 0
    """See `Checkpoint`."""


class Acknowledged(NamedTuple):
    """What this very process promised before its journal failed."""

    epoch: bytes
    seq: int


class Opened(msgspec.Struct, frozen=True):
    """A journal that is ready to be appended to."""

    header: SegmentHeader
    """Of the last segment."""
    end: int
    """Size of the last segment."""
    crc: int
    """crc32 of the last segment."""
    sealed: int
    """Where its last seal begins, 0 when there is none."""
    first_seq: int
    last_seq: int
    bytes: int
    """Size of all segments."""
    checkpoint: Checkpoint
    torn: Path | None

    def recovered(self) -> Recovered:
        """The part of it that concerns the journal's owner."""
        note = self.checkpoint
        return Recovered(note.layers, note.stopped, note.last_time_ns, self.torn, note.every_layer)


def lock(directory: Path, *, disk: Disk = REAL) -> File:
    """Makes this process the directory's only writer until the returned file is closed.

    Creates the directory. Raises JournalError when it cannot, when it holds something else, or when there is a writer.
    """
    check_ours(directory, disk=disk)
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


def recover(directory: Path, *, disk: Disk = REAL, acknowledged: Acknowledged | None = None) -> Opened:
    """Opens the locked directory, which may be empty. Raises JournalError when it is damaged or cannot be written.

    With `acknowledged` a torn tail is this process's own, of use to nobody, and not set aside; and the journal is
    damaged if it is that one and does not hold the record.
    """
    firsts = list_segments(directory, disk=disk)
    with disk_errors(f"cannot write to the journal {directory}"):
        for name in disk.names(directory):
            if name.endswith(".wal.tmp"):
                disk.unlink(directory / name)
        if acknowledged:
            _try_disk(directory, disk)
        if not firsts:
            header = encode_header(os.urandom(8), FIRST_SEQ, time.time_ns())
            create_segment(directory, FIRST_SEQ, begin_segment(header, FIRST_SEQ - 1, Checkpoint({})), disk=disk)
            firsts = [FIRST_SEQ]
        disk.sync_directory(directory)
        disk.sync_directory(directory.parent)  # whoever made the directory may have died before it did so
    earlier = _check_headers(directory, firsts, disk)
    with Segment(directory, firsts[-1], disk=disk) as segment:
        opened = _recover_segment(segment, firsts[0], disk, acknowledged)
    return msgspec.structs.replace(opened, bytes=earlier + opened.end)


def _try_disk(directory: Path, disk: Disk) -> None:
    """Raises OSError unless the disk takes TRIAL_BYTES: what failed for want of room would fail again at once."""
    path = directory / "trial.wal.tmp"
    try:
        # No zeros: some filesystems need no room for them.
        write_file(path, os.urandom(TRIAL_BYTES), flags=os.O_TRUNC, disk=disk)
    finally:
        with suppress(FileNotFoundError):
            disk.unlink(path)


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


def _recover_segment(segment: Segment, first_seq: int, disk: Disk, acknowledged: Acknowledged | None) -> Opened:
    """Reads the last segment to its end and cuts a torn tail off."""
    seal = find_seal(segment)
    read = read_state(segment, seal)
    end, last_seq, fault = read.end, read.last_seq, read.found.fault
    torn = None
    if end == HEADER_BYTES:
        raise segment.damage(end, last_seq, fault)
    if acknowledged and acknowledged.epoch == segment.header.epoch and acknowledged.seq > last_seq:
        raise segment.damage(end, last_seq, f"record {acknowledged.seq} has been there")
    if read.buffer:
        if segment.is_damage(read.buffer, read.found, end, last_seq):
            raise segment.damage(end, last_seq, fault)
        if not acknowledged:
            torn = _set_tail_aside(segment, end, disk)
    _put_on_disk(segment, read.proven, end, disk)
    sealed = seal.note.offset if seal else 0
    note = read.state.checkpoint()
    return Opened(segment.header, end, read.crc, sealed, first_seq, last_seq, 0, note, torn)


class Seal(NamedTuple):
    """A checkpoint that seals what is before it."""

    note: Checkpoint
    seq: int
    """Of the last record before it."""


def find_seal(segment: Segment) -> Seal | None:
    """The last seal of the segment, if all bytes before it are as they were when it was written. Raises JournalError."""
    size = segment.size()
    start = max(HEADER_BYTES, size - SEARCH_BYTES)
    tail = segment.pread(size - start, start)
    for at in seal_marks(tail):
        frame = frame_at(tail, at, seed=segment.header.crc)
        note = decode_entry(tail, frame) if frame else None
        if frame and isinstance(note, Checkpoint) and note.offset == start + at:
            return Seal(note, frame[0]) if _crc(segment, note.offset) == note.crc else None
    return None


def _crc(segment: Segment, end: int) -> int:
    """crc32 of the segment's bytes before `end`."""
    crc = 0
    for offset in range(0, end, CRC_CHUNK_BYTES):
        crc = zlib.crc32(segment.pread(min(CRC_CHUNK_BYTES, end - offset), offset), crc)
    return crc


class Read(NamedTuple):
    """A segment up to the end of its good frames."""

    state: JournalState
    proven: int
    """What is before was on disk when what follows was written."""
    end: int
    crc: int
    """crc32 of all before the end."""
    last_seq: int
    buffer: bytes
    """What follows, or the beginning of it."""
    found: Scan
    """What is wrong with that."""


def read_state(segment: Segment, seal: Seal | None = None) -> Read:
    """What all good frames amount to, from the beginning of a segment or from a good seal on. Raises JournalError."""
    state = JournalState()
    proven = HEADER_BYTES
    if seal:
        offset, last_seq, crc = seal.note.offset, seal.seq, seal.note.crc
    else:
        offset, last_seq, crc = HEADER_BYTES, segment.header.first_seq - 1, _crc(segment, HEADER_BYTES)
    while True:
        buffer, found = segment.frames(offset, last_seq)
        if not found.frames:
            return Read(state, proven, offset, crc, last_seq, buffer, found)
        try:
            apply_frames(state, buffer, found.frames)
        except JournalError as error:
            raise decode_failure(segment, offset, error) from error
        if (synced := _last_synced(buffer, found)) is not None:
            proven = offset + synced
        offset += found.end
        crc = zlib.crc32(memoryview(buffer)[: found.end], crc)
        last_seq = found.frames[-1][0]


def apply_frames(state: JournalState, buffer: bytes, frames: Sequence[Frame]) -> None:
    """Brings `state` up to date. Of changes only the last one matters, for its time. Raises JournalError."""
    for frame in frames:
        if frame[1] == CHANGE_TYPE and frame is not frames[-1]:
            continue
        if (entry := decode_entry(buffer, frame)) is not None:
            state.apply(entry, frame[0])


def _last_synced(buffer: bytes, found: Scan) -> int | None:
    """Where the last SYNCED frame begins: what is before it was on disk."""
    return next((frame[2] for frame in reversed(found.frames) if is_synced(buffer, frame)), None)


def _set_tail_aside(segment: Segment, end: int, disk: Disk) -> Path:
    """Copies what follows `end` to a file of its own."""
    path = segment.path
    with disk_errors(f"cannot set the torn tail of {path} aside"), disk.open(path, os.O_RDONLY) as file:
        torn = write_aside(path, end, file.pread(file.size() - end, end), suffix=".torn", disk=disk)
        disk.sync_directory(path.parent)
    return torn


def _put_on_disk(segment: Segment, start: int, end: int, disk: Disk) -> None:
    """Cuts off what follows `end`, and writes again what has been on disk for certain only up to `start`."""
    with disk_errors(f"cannot write {segment.path}"), disk.open(segment.path, os.O_RDWR) as file:
        if file.size() > end:
            file.truncate(end)
        for offset in range(start, end, CHUNK_BYTES):
            write_all(file, file.pread(min(CHUNK_BYTES, end - offset), offset), offset)
        file.sync()
