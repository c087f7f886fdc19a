"""Takes the directory as the last run left it, maybe in a crash, to one that can be appended to. Blocking.

Only the last segment is read whole: every earlier one was on disk before the next one got its name. Good records
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
    SYNCED,
    Checkpoint,
    LayerMark,
    Scan,
    SegmentHeader,
    decode_entry,
    encode_frames,
    encode_header,
    frame_flags,
)
from watchd.journal.segments import (
    CHUNK_BYTES,
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
    state = JournalState()
    offset, last_seq = proven, _ = HEADER_BYTES, segment.header.first_seq - 1
    while True:
        buffer, found = segment.frames(offset, last_seq)
        if not found.frames:
            break
        _apply(segment, state, buffer, found, offset)
        proven = max(proven, offset + _last_synced(buffer, found))
        offset += found.end
        last_seq = found.frames[-1][0]
    torn = None
    if offset == HEADER_BYTES:
        raise segment.damage(offset, last_seq, found.fault)
    if acknowledged and acknowledged.epoch == segment.header.epoch and acknowledged.seq > last_seq:
        raise segment.damage(offset, last_seq, f"record {acknowledged.seq} has been there")
    if buffer:
        if segment.is_damage(buffer, found, offset, last_seq):
            raise segment.damage(offset, last_seq, found.fault)
        if not acknowledged:
            torn = _set_tail_aside(segment, offset, disk)
    _put_on_disk(segment, proven, offset, disk)
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


def _last_synced(buffer: bytes, found: Scan) -> int:
    """Where the last SYNCED frame begins: what is before it was on disk. 0 when there is none."""
    return next((frame[2] for frame in reversed(found.frames) if frame_flags(buffer, frame) & SYNCED), 0)


def _set_tail_aside(segment: Segment, end: int, disk: Disk) -> Path:
    """Copies what follows `end` to a file of its own."""
    path = segment.path
    with disk_errors(f"cannot set the torn tail of {path} aside"), disk.open(path, os.O_RDONLY) as file:
        torn = _write_aside(path, end, file.pread(file.size() - end, end), disk)
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


def _write_aside(path: Path, end: int, tail: bytes, disk: Disk) -> Path:
    """Writes `<segment>-<offset>[-<n>].torn`; an older one of that name stays."""
    number = 0
    while True:
        aside = path.with_name(f"{path.stem}-{end}{f'-{number}' if number else ''}.torn")
        try:
            write_file(aside, tail, flags=os.O_EXCL, disk=disk)
            return aside
        except FileExistsError:
            number += 1
        except OSError:
            with suppress(OSError):
                disk.unlink(aside)  # else every attempt on a full disk would leave one
            raise
