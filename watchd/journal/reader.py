"""Reading a journal, with or without a writer at work. Blocking, and no sleeping: who follows brings a way to wait.

A reader sees only good records. What is not whole at the end of the last segment is still being written, or was
torn by a crash and will be cut off by the next `Journal.open`: for a reader it is the end. What a reader has seen
is never taken back, not by a power cut either: new records of the last segment are put on disk before they are
handed out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Final, NamedTuple, Self

import msgspec

from watchd.errors import JournalError, RecordsGoneError
from watchd.journal.disk import REAL, Disk
from watchd.journal.format import HEADER_BYTES, NOTE, Checkpoint, Entry, Frame, decode_entry
from watchd.journal.segments import NO_JOURNAL, VERIFY, Segment, decode_failure, list_segments
from watchd.records import Record

NumberedRecord = tuple[int, Record]

_END: Final = (1 << 64) - 1
"""Behind every record."""


class Extent(msgspec.Struct, frozen=True):
    """What a journal holds at this moment."""

    epoch: str
    """16 hexadecimal digits."""
    first_seq: int
    """Sequence number of the oldest record, or of the first one to come."""
    last_seq: int


class Position(msgspec.Struct, frozen=True):
    """Where a reader goes on. Valid as long as the segment exists."""

    segment: int
    """First sequence number of the segment."""
    offset: int
    seq: int
    """Of the last record before the offset."""


class Chunk(NamedTuple):
    """Frames that follow each other in one segment."""

    buffer: bytes
    frames: list[Frame]
    begin: Position
    """Where the buffer begins."""


class Follower:
    """Reads a journal from a point on, and goes on reading as it grows. Owns one descriptor, of the current segment."""

    def __init__(self, directory: Path, start: int | Position = 0, *, disk: Disk = REAL) -> None:
        """Begins behind the record with the number `start`, with 0 at the oldest one that there is.

        Raises JournalError when there is no journal or its segment is damaged, RecordsGoneError when it begins later.
        """
        self._directory, self._disk = directory, disk
        if isinstance(start, Position):
            self._since = start.seq
            self.position = start
        else:
            self._since = start
            first = _find_segment(directory, start + 1, disk)
            if 0 < start < first - 1:
                raise RecordsGoneError(start + 1, first - 1)
            self.position = Position(first, HEADER_BYTES, first - 1)
        self._segment = self._open(self.position.segment)

    @property
    def seq(self) -> int:
        """The number behind which the next poll goes on: what makes a cursor. `position` may lie before it."""
        return max(self._since, self.position.seq)

    @property
    def epoch(self) -> str:
        """The journal's epoch, 16 hexadecimal digits."""
        return self._segment.header.epoch.hex()

    def close(self) -> None:
        """Closes the descriptor."""
        self._segment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def poll(self, *, upto: int | None = None) -> list[NumberedRecord]:
        """The next records, a chunk's worth at most; none when the end is reached for now.

        `upto`: nothing behind this record, which the caller knows to be durable.
        Raises JournalError for damage. What was before it has been returned by then.
        """
        since = self._since
        while (chunk := self.poll_frames(upto=upto)).frames:
            wanted = [frame for frame in chunk.frames if frame[0] > since and frame[1] < NOTE]
            if records := [
                (seq, entry) for seq, entry in self.decode(chunk, wanted) if not isinstance(entry, Checkpoint)
            ]:
                return records
        return []

    def poll_frames(self, *, upto: int | None = None) -> Chunk:
        """The next frames, those of notes and of records before the start too; none when the end is reached for now.

        For who looks at types and numbers before decoding. Raises JournalError like `poll`.
        """
        while True:
            # Looked up before reading: when there is one, this segment is complete.
            following = self._following_segment()
            here = self.position
            buffer, found = self._segment.frames(here.offset, here.seq)
            if found.frames:
                frames = _until(found.frames, upto)
                if frames:
                    end = here.offset + frames[-1][3]
                    if following is None and upto is None:
                        self._segment.sync(end)
                    self.position = Position(here.segment, end, frames[-1][0])
                return Chunk(buffer, frames, here)
            if following is None:
                if buffer and self._segment.is_damage(buffer, found, here.offset, here.seq):
                    raise self._damage(found.fault)
                if not self._segment.is_in_place():
                    raise JournalError(
                        f"the journal {self._directory} was removed or begun anew while it was read",
                        remedy="look at everything once, and go on from now",
                    )
                return Chunk(buffer, [], here)
            if buffer:
                raise self._damage(found.fault)
            self._enter(following)

    def decode(self, chunk: Chunk, frames: Iterable[Frame]) -> Iterator[tuple[int, Entry]]:
        """What these frames of the last `poll_frames` hold; notes of an unknown sort are passed over.

        Raises JournalError for a record that this version does not know; the next poll then comes to it again.
        """
        for frame in frames:
            try:
                entry = decode_entry(chunk.buffer, frame)
            except JournalError as error:
                self.position = chunk.begin
                raise decode_failure(self._segment, chunk.begin.offset + frame[2], error) from error
            if entry is not None:
                yield frame[0], entry

    def _damage(self, fault: str) -> JournalError:
        return self._segment.damage(self.position.offset, self.position.seq, fault)

    def _following_segment(self) -> int | None:
        firsts = list_segments(self._directory, disk=self._disk)
        index = bisect_right(firsts, self.position.segment)
        return firsts[index] if index < len(firsts) else None

    def _enter(self, first_seq: int) -> None:
        """Goes on with the next segment."""
        self._check_kept()
        if first_seq != self.position.seq + 1:
            raise self._damage(f"the next segment begins with record {first_seq}")
        segment = self._open(first_seq)
        if segment.header.epoch != self._segment.header.epoch:
            segment.close()
            raise JournalError(f"{segment.path} belongs to another journal than its predecessor", remedy=VERIFY)
        self._segment.close()
        self._segment = segment
        self.position = Position(first_seq, HEADER_BYTES, first_seq - 1)

    def _open(self, first_seq: int) -> Segment:
        try:
            return Segment(self._directory, first_seq, disk=self._disk)
        except JournalError:
            self._check_kept()
            raise

    def _check_kept(self) -> None:
        """Raises RecordsGoneError when the journal begins behind the next record by now."""
        firsts = list_segments(self._directory, disk=self._disk)
        if firsts and firsts[0] > self.position.seq + 1:
            raise RecordsGoneError(self.position.seq + 1, firsts[0] - 1)


def _until(frames: list[Frame], upto: int | None) -> list[Frame]:
    """Those that are not behind record `upto`; notes at the end of them may not be durable yet."""
    if upto is None or frames[-1][0] < upto:
        return frames
    end = bisect_right(frames, upto, key=itemgetter(0))
    while end and frames[end - 1][1] >= NOTE:
        end -= 1
    return frames[:end]


def read(directory: Path, since: int = 0, *, disk: Disk = REAL) -> Iterator[NumberedRecord]:
    """All records behind number `since`, up to what is there now. Raises JournalError like `Follower`."""
    with Follower(directory, since, disk=disk) as follower:
        while records := follower.poll():
            yield from records


def extent(directory: Path, *, disk: Disk = REAL) -> Extent:
    """What the journal holds. Checks its last segment. Raises JournalError when there is none or it is damaged."""
    first_seq = _segments(directory, disk)[0]
    with Follower(directory, _END, disk=disk) as follower:
        nothing = follower.poll()
        assert not nothing
        return Extent(follower.epoch, first_seq, follower.position.seq)


def _segments(directory: Path, disk: Disk) -> list[int]:
    """The segments there are, at least one."""
    firsts = list_segments(directory, disk=disk)
    if not firsts:
        raise JournalError(f"there is no journal in {directory}", remedy=NO_JOURNAL)
    return firsts


def _find_segment(directory: Path, seq: int, disk: Disk) -> int:
    """The segment that holds record `seq`; the oldest one when it is gone, the last one when it is still to come."""
    firsts = _segments(directory, disk)
    return firsts[max(bisect_right(firsts, seq) - 1, 0)]
