"""Reads every byte of a journal and says what is wrong with it. Blocking; changes nothing, with or without a writer.

What a writer is just appending, and what a crash left of that, is `torn` and no damage: the next start cuts it off.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from watchd.errors import JournalError
from watchd.journal.disk import REAL, Disk, File
from watchd.journal.format import (
    CHECKPOINT_TYPE,
    HEADER_BYTES,
    NOTE,
    Frame,
    OtherFormatError,
    SegmentHeader,
    decode_entry,
    decode_header,
)
from watchd.journal.salvage import Survey, identify, last_synced, survey
from watchd.journal.segments import Segment, disk_errors, existing_segments, list_segments, segment_path

Progress = Callable[[int], object]
"""Told how many more bytes were looked at."""

BLOCK_BYTES: Final = 4096
"""What cannot be read is passed over in steps of this."""


class Fault(msgspec.Struct, frozen=True):
    """Something that is wrong with a segment."""

    path: Path
    offset: int
    """Where in the file."""
    record: int
    """Number of the last good record before it; 0 if there is none."""
    reason: str
    torn: bool = False
    """No damage: what a crash left of a commit that nobody was told of, or what is just being written."""


class SegmentReport(msgspec.Struct, frozen=True):
    """What was found in one segment."""

    path: Path
    first_seq: int
    """As its name says."""
    last_seq: int
    """Of the last good record, the one before `first_seq` if there is none."""
    records: int
    bytes: int
    faults: tuple[Fault, ...]
    header: SegmentHeader | None = None
    """None when it is damaged."""

    @property
    def is_sound(self) -> bool:
        """Whether there is no damage in it."""
        return all(fault.torn for fault in self.faults)


class Report(msgspec.Struct, frozen=True):
    """What was found in a journal."""

    directory: Path
    segments: tuple[SegmentReport, ...]

    @property
    def faults(self) -> list[Fault]:
        """All of them, in order."""
        return [fault for segment in self.segments for fault in segment.faults]

    @property
    def is_sound(self) -> bool:
        """Whether there is no damage in it."""
        return all(segment.is_sound for segment in self.segments)


def size_of(directory: Path) -> int:
    """Bytes that `verify` will look at. Raises JournalError when there is no journal."""
    paths = (segment_path(directory, first) for first in existing_segments(directory))
    return sum(path.stat().st_size for path in paths if path.exists())


def verify(directory: Path, *, progress: Progress = lambda _: None, disk: Disk = REAL) -> Report:
    """Looks at all of it. Raises JournalError when there is no journal or its directory cannot be read."""
    return Report(directory, tuple(_verify(directory, existing_segments(directory, disk=disk), progress, disk)))


def _verify(directory: Path, firsts: list[int], progress: Progress, disk: Disk) -> Iterator[SegmentReport]:
    epoch: bytes | None = None
    for first, following in zip(firsts, [*firsts[1:], None], strict=True):
        try:
            report = verify_segment(directory, first, following, epoch=epoch, progress=progress, disk=disk)
        except FileNotFoundError:
            continue  # retention took it meanwhile
        header = report.header
        if header and epoch and header.epoch != epoch:
            fault = Fault(report.path, 0, first - 1, "it belongs to another journal than its predecessor")
            report = msgspec.structs.replace(report, faults=(fault, *report.faults))
        epoch = epoch or (header.epoch if header else None)
        yield report


def verify_segment(
    directory: Path, first: int, following: int | None, *, epoch: bytes | None, progress: Progress, disk: Disk
) -> SegmentReport:
    """Looks at one segment; `following` is the first number of the next one, None for the last.

    Raises FileNotFoundError when it is gone.
    """
    path = segment_path(directory, first)
    try:
        with Segment(directory, first, disk=disk) as segment:
            report = _stream(segment, following, progress)
        return report or _look_closer(path, first, following, header=segment.header, disk=disk)
    except JournalError:
        if first not in list_segments(directory, disk=disk):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
        return _without_header(path, first, following, epoch=epoch, disk=disk)


def _stream(segment: Segment, following: int | None, progress: Progress) -> SegmentReport | None:
    """Looks at a segment frame by frame, in little memory; None as soon as anything is wrong."""
    first = segment.header.first_seq
    offset, last_seq, records = HEADER_BYTES, first - 1, 0
    while True:
        try:
            buffer, found = segment.frames(offset, last_seq)
            if offset == HEADER_BYTES and found.frames and found.frames[0][1] != CHECKPOINT_TYPE:
                return None
            records += sum(_is_record(buffer, frame) for frame in found.frames)
        except JournalError:
            return None  # it cannot be read there, or not be decoded
        if not found.frames:
            break
        progress(found.end)
        offset += found.end
        last_seq = found.frames[-1][0]
    if buffer or offset == HEADER_BYTES or following not in (None, last_seq + 1):
        return None
    return SegmentReport(segment.path, first, last_seq, records, offset, (), segment.header)


def _is_record(buffer: bytes, frame: Frame) -> bool:
    """Raises JournalError when it cannot be decoded."""
    decode_entry(buffer, frame)
    return frame[1] < NOTE


def _look_closer(path: Path, first: int, following: int | None, *, header: SegmentHeader, disk: Disk) -> SegmentReport:
    """Everything that is wrong with a segment whose header is good."""
    data, unreadable = read_segment(path, disk=disk)
    found = survey(data, seed=header.crc)
    faults = (*unreadable, *_faults(path, data, found, first, following))
    records = {frame[0] for frame in found.frames if frame[1] < NOTE}
    return SegmentReport(path, first, max(records, default=first - 1), len(records), len(data), faults, header)


def _without_header(path: Path, first: int, following: int | None, *, epoch: bytes | None, disk: Disk) -> SegmentReport:
    """What is wrong with a segment whose header is not good, and what may be saved of it."""
    try:
        data, unreadable = read_segment(path, disk=disk)
    except JournalError as error:
        return SegmentReport(path, first, first - 1, 0, 0, (Fault(path, 0, first - 1, str(error)),))
    faults = [*unreadable, Fault(path, 0, first - 1, header_fault(data, first))]
    records: set[int] = set()
    if not is_foreign(data, first) and (identity := identify(data, first, epoch)):
        found = survey(data, seed=identity.seed, start=0)
        found = found._replace(broken=[area for area in found.broken if area != (0, HEADER_BYTES)])
        faults += [fault for fault in _faults(path, data, found, first, following) if not fault.torn]
        records = {frame[0] for frame in found.frames if frame[1] < NOTE}
    return SegmentReport(path, first, max(records, default=first - 1), len(records), len(data), tuple(faults))


def header_fault(data: bytes, first: int) -> str:
    """What is wrong with the header of the segment that is named after `first`; empty when it is good."""
    try:
        header = decode_header(data[:HEADER_BYTES])
    except JournalError as error:
        return str(error)
    right = header.first_seq == first
    return (
        "" if right else f"it begins with record {header.first_seq}, not with what its name says; give it its own name"
    )


def is_foreign(data: bytes, first: int) -> bool:
    """Whether the header is good, but not that of the segment that is named after `first`, or of another format."""
    try:
        return decode_header(data[:HEADER_BYTES]).first_seq != first
    except OtherFormatError:
        return True
    except JournalError:
        return False


def _faults(path: Path, data: bytes, found: Survey, first: int, following: int | None) -> Iterator[Fault]:
    """What is wrong behind the header, in the order of the file."""
    synced = last_synced(data, found.frames) if following is None else len(data)
    begins = {end: begin for begin, end in found.broken}
    last_seq = first - 1
    if found.frames and found.frames[0][1] != CHECKPOINT_TYPE:
        yield Fault(path, HEADER_BYTES, last_seq, "it does not begin with a checkpoint")
    for frame in found.frames:
        seq, number, start, _end = frame
        due = last_seq + (number < NOTE)
        at = begins.get(start, start)
        torn = at > HEADER_BYTES and synced < at
        if start in begins:
            lost = f", records {last_seq + 1} to {seq - (number < NOTE)} are lost" if seq > due else ""
            yield Fault(path, at, last_seq, f"{start - at} bytes are broken{lost}", torn)
        elif seq != due:
            yield Fault(path, at, last_seq, f"sequence number {seq} stands where {due} is due", torn)
        if reason := _undecodable(data, frame):
            yield Fault(path, start, last_seq, reason)
        last_seq = max(seq, last_seq)
    yield from _faults_at_end(path, len(data), found, last_seq, following, synced=synced)


def _faults_at_end(
    path: Path, size: int, found: Survey, last_seq: int, following: int | None, *, synced: int
) -> Iterator[Fault]:
    if found.broken and found.broken[-1][1] == size:
        at = found.broken[-1][0]
        torn = following is None and at > HEADER_BYTES and synced < at
        what = "are not whole yet or were left by a crash" if torn else "are broken"
        yield Fault(path, at, last_seq, f"{size - at} bytes {what}", torn)
    if size <= HEADER_BYTES:
        yield Fault(path, size, last_seq, "it ends behind its header")
    if following is not None and following > last_seq + 1:
        yield Fault(path, size, last_seq, f"the next segment begins with record {following}")
    elif following is not None and following <= last_seq:
        yield Fault(path, size, last_seq, f"the next segment begins with record {following}, so both hold it")


def _undecodable(data: bytes, frame: Frame) -> str:
    try:
        decode_entry(data, frame)
    except JournalError as error:
        return str(error)
    return ""


def read_segment(path: Path, *, disk: Disk = REAL) -> tuple[bytes, list[Fault]]:
    """All bytes of a segment, zeros where the disk does not give them, and where that is.

    Raises JournalError when nothing can be read at all.
    """
    with disk_errors(f"cannot read {path}"), disk.open(path, os.O_RDONLY) as file:
        return _read(file, path)


def _read(file: File, path: Path) -> tuple[bytes, list[Fault]]:
    """Raises OSError."""
    size = file.size()
    data, faults, step = bytearray(), list[Fault](), size
    unreadable_until = -1
    while len(data) < size:
        offset = len(data)
        try:
            part = file.pread(min(step, size - offset), offset)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            if step > BLOCK_BYTES:
                step = BLOCK_BYTES
                continue
            part = bytes(min(step, size - offset))
            if offset != unreadable_until:
                faults.append(Fault(path, offset, 0, "the disk does not give what is here: Input/output error"))
            unreadable_until = offset + len(part)
        if not part:
            break
        data += part
    return bytes(data), faults
