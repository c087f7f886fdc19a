"""Takes a damaged journal to one that can be read and appended to, without dropping a good record. Blocking.

Every segment that is damaged is written anew under the name that it has: all its good frames, and desyncs of every layer in
the place of what was lost. Numbers that no segment holds get a segment of such desyncs. What is broken is kept beside it.

The checkpoints that were written after the loss know nothing of it. So another desync of every layer and a checkpoint that
goes back to before the loss are put at the journal's end: the next start looks at all layers from there on.

Killed at any moment, it leaves a journal from which the next run goes on: what is broken is set aside first, then the last
segment is put in place, with that desync at its end, and then the others, each with one rename.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from watchd.errors import JournalError
from watchd.journal import index
from watchd.journal.disk import REAL, Disk
from watchd.journal.format import HEADER_BYTES, Checkpoint, Frame, decode_header, encode_frames, encode_header, scan
from watchd.journal.recovery import apply_frames, lock, read_state
from watchd.journal.salvage import MIN_RECORD_BYTES, Rebuilt, identify, in_order, rebuild, survey
from watchd.journal.segments import Segment, disk_errors, existing_segments, temporary_path, write_aside, write_file
from watchd.journal.state import JournalState
from watchd.journal.verify import Progress, Report, SegmentReport, header_fault, is_foreign, read_segment, verify
from watchd.records import Desync

RESTART: Final = "restart"


class Repaired(msgspec.Struct, frozen=True):
    """What was done to one segment."""

    path: Path
    aside: tuple[Path, ...]
    """Where what was broken is now."""
    records: int
    """Good records that it holds."""
    lost: tuple[tuple[int, int], ...]
    """First and last number of the records that are desyncs now."""


def repair(directory: Path, *, progress: Progress = lambda _: None, disk: Disk = REAL) -> list[Repaired]:
    """Repairs the journal; empty when nothing is damaged.

    Raises JournalError when a writer is at work, there is no journal, the disk refuses, or a person must look first.
    """
    existing_segments(directory, disk=disk)  # before the lock, which would create it
    with lock(directory, disk=disk), disk_errors(f"cannot repair the journal {directory}"):
        report = verify(directory, progress=progress, disk=disk)
        _refuse(report, disk)
        return [] if report.is_sound else _Repair(report, disk).run()


def _refuse(report: Report, disk: Disk) -> None:
    """Raises JournalError for what is no damage but somebody's mistake, or what cannot be read now."""
    epochs: dict[bytes, Path] = {}
    last_seq, before = 0, report.directory
    for segment in report.segments:
        path, first = segment.path, segment.first_seq
        if segment.header:
            epochs.setdefault(segment.header.epoch, path)
        elif is_foreign(data := read_segment(path, disk=disk)[0], first):
            raise JournalError(f"{path}: {header_fault(data, first)}", remedy="or move it away")
        if first <= last_seq:
            remedy = "move the one away that does not belong here"
            raise JournalError(f"{before} and {path} both hold record {first}", remedy=remedy)
        last_seq, before = max(last_seq, segment.last_seq), path
    if len(epochs) > 1:
        one, other, *_ = epochs.values()
        remedy = "move away those of the journal that is not wanted"
        raise JournalError(f"{other} belongs to another journal than {one}", remedy=remedy)


class _Content(NamedTuple):
    """What there is in a segment."""

    data: bytes
    header: bytes
    """As it will be."""
    frames: list[Frame]
    broken: list[tuple[int, int]]


class _Repair:
    """One repair of a locked directory. Raises OSError and JournalError."""

    def __init__(self, report: Report, disk: Disk) -> None:
        self._directory, self._segments, self._disk = report.directory, report.segments, disk
        self._epoch = next((one.header.epoch for one in report.segments if one.header), None)
        self._state = JournalState()
        """After the segments that were gone through."""
        self._before_loss: Checkpoint | None = None
        """What was known in front of the first lost record; None as long as none is lost."""

    def run(self) -> list[Repaired]:
        """Does it, and returns what was done."""
        if self._epoch is None:
            self._epoch = self._proven_epoch()
        followings = [one.first_seq for one in self._segments[1:]]
        staged = [
            self._stage(one, following)
            for one, following in zip(self._segments, [*followings, None], strict=True)
            if self._is_staged(one, following)
        ]
        self._disk.sync_directory(self._directory)
        self._forget_what_was_folded()
        for one in [*staged[-1:], *staged[:-1]]:
            self._disk.rename(temporary_path(one.path), one.path)
            self._disk.sync_directory(self._directory)
        return staged

    def _forget_what_was_folded(self) -> None:
        """What was made of the records remembers places in segments, and may know of records that consumers never saw:
        what a scan finds then is to be what they missed.
        """
        index.remove(self._directory.parent)

    def _proven_epoch(self) -> bytes:
        """The epoch when no header is good: as one of them proves it, or a new one, so that no old cursor fits."""
        for one in self._segments:
            data, _ = read_segment(one.path, disk=self._disk)
            if (identity := identify(data, one.first_seq, None)) and identity.header:
                return decode_header(identity.header).epoch
        return os.urandom(8)

    def _is_staged(self, report: SegmentReport, following: int | None) -> bool:
        """Whether the segment has to be written anew. One that has not is gone through here."""
        if not report.is_sound or (following is None and self._before_loss):
            return True
        with Segment(self._directory, report.first_seq, disk=self._disk) as segment:
            self._state = read_state(segment).state
        return False

    def _stage(self, report: SegmentReport, following: int | None) -> Repaired:
        """Sets aside what is broken and writes the segment as it will be, under a temporary name."""
        assert self._epoch
        content = self._content(report)
        lead = self._state.checkpoint()
        upto = following - 1 if following else _numbers_used(report, content)
        rebuilt = rebuild(content.data, content.frames, content.header, lead=lead, upto=upto)
        if not rebuilt.content[HEADER_BYTES:].startswith(content.data[HEADER_BYTES:]):
            # Whoever remembers an offset remembers the header's checksum with it.
            header = encode_header(self._epoch, report.first_seq, time.time_ns())
            rebuilt = rebuild(content.data, content.frames, header, lead=lead, upto=upto, sealed=False)
        self._go_through(rebuilt.content, rebuilt.lost)
        end = self._end(rebuilt) if following is None and self._before_loss else b""
        aside = tuple(
            write_aside(report.path, start, content.data[start:stop], suffix=".damaged", disk=self._disk)
            for start, stop in content.broken
        )
        write_file(temporary_path(report.path), rebuilt.content + end, flags=os.O_TRUNC, disk=self._disk)
        return Repaired(report.path, aside, report.records, tuple(rebuilt.lost))

    def _content(self, report: SegmentReport) -> _Content:
        data, _ = read_segment(report.path, disk=self._disk)
        if report.header:
            found = survey(data, seed=report.header.crc)
            return _Content(data, data[:HEADER_BYTES], in_order(data, found.frames), found.broken)
        assert self._epoch
        identity = identify(data, report.first_seq, self._epoch)
        header = (identity and identity.header) or encode_header(self._epoch, report.first_seq, time.time_ns())
        if decode_header(header).epoch != self._epoch:
            raise JournalError(f"{report.path} belongs to another journal than the others", remedy="move it away")
        if identity is None:
            return _Content(data, header, [], [(0, len(data))])
        found = survey(data, seed=identity.seed, start=0)
        return _Content(data, header, in_order(data, found.frames), found.broken)

    def _go_through(self, content: bytes, lost: list[tuple[int, int]]) -> None:
        """Brings the state to the end of a segment, and notes how it was in front of the first lost record."""
        header = decode_header(content)
        found = scan(content[HEADER_BYTES:], header.first_seq - 1, seed=header.crc)
        frames = [(seq, number, start + HEADER_BYTES, end + HEADER_BYTES) for seq, number, start, end in found.frames]
        if lost and self._before_loss is None:
            first_lost = next(index for index, frame in enumerate(frames) if frame[0] == lost[0][0])
            apply_frames(self._state, content, frames[:first_lost])
            self._before_loss = self._state.checkpoint()
            del frames[:first_lost]
        apply_frames(self._state, content, frames)

    def _end(self, rebuilt: Rebuilt) -> bytes:
        """What makes the next start look at every layer; nothing if a repair that was killed has put it there."""
        assert self._before_loss
        now = self._state.checkpoint()
        if now.every_layer == rebuilt.last_seq and not self._is_lost(rebuilt):
            return b""
        desync = Desync(time.time_ns(), "", RESTART)
        self._state.apply(desync, rebuilt.last_seq + 1)
        note = _reaching_back(self._state.checkpoint(), self._before_loss)
        return encode_frames([desync, note], rebuilt.last_seq, seed=decode_header(rebuilt.content).crc, synced=True)

    def _is_lost(self, rebuilt: Rebuilt) -> bool:
        """Whether the last number of the segment was filled just now."""
        return bool(rebuilt.lost) and rebuilt.lost[-1][1] == rebuilt.last_seq


def _numbers_used(report: SegmentReport, content: _Content) -> int:
    """The highest number that a record of the last segment may have had: none is given twice."""
    if report.is_sound or not content.broken or content.broken[-1][1] < len(content.data):
        return report.last_seq
    start, end = content.broken[-1]
    return report.last_seq + (end - start) // MIN_RECORD_BYTES


def _reaching_back(now: Checkpoint, before: Checkpoint) -> Checkpoint:
    """`now` with every layer complete only as far as it was `before`."""
    layers = {
        name: msgspec.structs.replace(mark, complete_until_ns=min(mark.complete_until_ns, _until(name, before)))
        for name, mark in now.layers.items()
    }
    return msgspec.structs.replace(now, layers=layers)


def _until(layer: str, before: Checkpoint) -> int:
    mark = before.layers.get(layer)
    return mark.complete_until_ns if mark else before.last_time_ns
