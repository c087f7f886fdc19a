"""Which of the oldest segments a journal does not keep any longer.

Segments go as a whole, the oldest first, never the last one. They go when the journal is larger or they are older than
wished, unless somebody has not read them yet: a named cursor, or what is folded from the records. Such a reader is waited
for until the journal reaches its hard limit.

Fact: every segment begins with a checkpoint, which says when the last record before it was made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import msgspec

from watchd.journal.disk import REAL, Disk
from watchd.journal.format import HEADER_BYTES, Checkpoint, decode_entry
from watchd.journal.segments import Segment, list_segments, segment_path


class Limits(msgspec.Struct, frozen=True):
    """How much is kept."""

    size_bytes: int
    """The journal may be so large."""
    age_ns: int
    """A record may be so old."""
    hard_bytes: int
    """The journal may be so large for the sake of a reader; not less than `size_bytes`."""


class Stored(NamedTuple):
    """A segment that is not the last one."""

    first_seq: int
    last_seq: int
    bytes: int
    newest_ns: int
    """When its last record was made."""


def expired(
    segments: Iterable[Stored], total_bytes: int, limits: Limits, *, now_ns: int, read_upto: int | None = None
) -> list[Stored]:
    """Those of `segments`, oldest first, that go. Looks at no more of them than it has to.

    `total_bytes` is the size of the journal with its last segment, `read_upto` the last record that every reader has read;
    without it no reader is waited for.
    """
    gone = []
    for segment in segments:
        is_wanted = total_bytes <= limits.size_bytes and now_ns - segment.newest_ns <= limits.age_ns
        is_needed = read_upto is not None and segment.last_seq > read_upto and total_bytes <= limits.hard_bytes
        if is_wanted or is_needed:
            break
        gone.append(segment)
        total_bytes -= segment.bytes
    return gone


def stored(directory: Path, *, disk: Disk = REAL) -> Iterator[Stored]:
    """All segments but the last, oldest first. Raises JournalError."""
    for first_seq, following in pairwise(list_segments(directory, disk=disk)):
        with Segment(directory, first_seq, disk=disk) as segment:
            size = segment.size()
        yield Stored(first_seq, following - 1, size, _made_before(directory, following, disk))


def _made_before(directory: Path, first_seq: int, disk: Disk) -> int:
    """When the last record before a segment was made."""
    with Segment(directory, first_seq, disk=disk) as segment:
        buffer, found = segment.frames(HEADER_BYTES, first_seq - 1)
        if not found.frames:
            raise segment.damage(HEADER_BYTES, first_seq - 1, found.fault)
        note = decode_entry(buffer, found.frames[0])
    return note.last_time_ns if isinstance(note, Checkpoint) else 0


def remove(directory: Path, segments: Sequence[Stored], *, disk: Disk = REAL) -> None:
    """Removes the oldest segments, one by one: whenever it is cut short no segment is missing between others.

    Raises OSError.
    """
    for segment in segments:
        disk.unlink(segment_path(directory, segment.first_seq))
        disk.sync_directory(directory)
