"""What can be saved of a damaged segment. Pure: bytes in, bytes out.

A frame says by itself that it is good: its checksum starts with that of the segment's header, so whatever checks was
written into this segment, wherever it lies now. So frames are looked for behind damage by their marks, and put into the
order of their numbers. What is missing between them was lost; each lost number gets a desync of every layer, so that no
number is ever missing or given twice, and whoever reads learns that there was something else.

Fact about CRCs: a register can be run backwards. From one good frame follows the value that its checksum started with,
even if nothing is left of the header; a second frame proves it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec

from watchd.errors import JournalError
from watchd.journal.format import (
    CHECKPOINT_TYPE,
    FRAME_HEADER_BYTES,
    HEADER_BYTES,
    LOST_REASON,
    NOTE,
    Checkpoint,
    Frame,
    decode_entry,
    decode_header,
    encode_frames,
    encode_header,
    frame_at,
    is_synced,
    marks,
    next_frame,
    reseed,
)
from watchd.records import Desync

MIN_RECORD_BYTES: Final = FRAME_HEADER_BYTES + 5
"""No record's frame is shorter: its array has the tag, the time and three fields at least."""

_INVERTED_MAX_BYTES: Final = 1 << 16
"""The seed is looked for in frames up to this size: running a checksum backwards is slow."""
_CREATED: Final = struct.Struct("<q")
_EPOCH: Final = slice(12, 20)
_CREATED_OFFSET: Final = 28
_CRC_OFFSET: Final = HEADER_BYTES - 4


class Survey(NamedTuple):
    """What a segment holds."""

    frames: list[Frame]
    """All good ones, as they lie."""
    broken: list[tuple[int, int]]
    """From where to where nothing good is."""


def survey(data: bytes, *, seed: int, start: int = HEADER_BYTES) -> Survey:
    """Looks at every byte from `start` on."""
    frames: list[Frame] = []
    broken: list[tuple[int, int]] = []
    position = min(start, len(data))
    while position < len(data):
        frame = frame_at(data, position, seed=seed) or next_frame(data, position + 1, seed=seed)
        start = frame[2] if frame else len(data)
        if start > position:
            broken.append((position, start))
        if not frame:
            break
        frames.append(frame)
        position = frame[3]
    return Survey(frames, broken)


def in_order(data: bytes, frames: list[Frame]) -> list[Frame]:
    """The frames by their numbers, each once, notes behind the record whose number they have."""
    kept: dict[tuple[int, bool, bytes], Frame] = {}
    for frame in frames:
        seq, number, start, end = frame
        is_note = number >= NOTE
        kept.setdefault((seq, is_note, data[start + FRAME_HEADER_BYTES : end] if is_note else b""), frame)
    return sorted(kept.values(), key=lambda frame: (frame[0], frame[1] >= NOTE, frame[2]))


def last_synced(data: bytes, frames: list[Frame]) -> int:
    """Offset of the last good frame that proves that all before it had been on disk; 0 when there is none."""
    return max((frame[2] for frame in frames if is_synced(data, frame)), default=0)


# ---- the header ------------------------------------------------------------------------------------------------------


class Identity(NamedTuple):
    """What is known of a segment whose header is damaged."""

    seed: int
    """Of its frames' checksums."""
    header: bytes | None
    """The header as it was, if what is left of it proves that."""


def identify(data: bytes, first_seq: int, epoch: bytes | None) -> Identity | None:
    """Finds the seed of a segment without its header; None when there is no frame to prove one."""
    for seed in _seeds(data, first_seq, epoch):
        if next_frame(data, 0, seed=seed):
            headers = (_header_of(data, first_seq, one) for one in (epoch, data[_EPOCH]) if one)
            return Identity(seed, next((header for header in headers if _crc_of(header) == seed), None))
    return None


def _seeds(data: bytes, first_seq: int, epoch: bytes | None) -> Iterator[int]:
    """What the seed may be, the likely ones first."""
    if len(data) >= HEADER_BYTES:
        yield _crc_of(data[:HEADER_BYTES])
        for one in (epoch, data[_EPOCH]):
            if one:
                yield _crc_of(_header_of(data, first_seq, one))
    yield from _seed_of_frames(data)


def _seed_of_frames(data: bytes) -> Iterator[int]:
    """The seed that two frames have in common, if any two have."""
    seen: dict[int, int] = {}
    for start in marks(data, 0):
        if start < 0 or len(data) - start <= FRAME_HEADER_BYTES:
            continue
        crc, length = struct.unpack_from("<II", data, start)
        end = start + FRAME_HEADER_BYTES + length
        if 0 < length <= _INVERTED_MAX_BYTES and end <= len(data):
            seed = crc_seed(data[start + 4 : end], crc)
            if seen.setdefault(seed, crc) != crc:  # not the same one once more
                yield seed
                return


def _header_of(data: bytes, first_seq: int, epoch: bytes) -> bytes:
    """The header that this would be if nothing but its other fields were damaged."""
    padded = data[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0")
    return encode_header(epoch.ljust(8, b"\0"), first_seq, _CREATED.unpack_from(padded, _CREATED_OFFSET)[0])


def _crc_of(header: bytes) -> int:
    return int.from_bytes(header[_CRC_OFFSET:HEADER_BYTES], "little")


def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ (0xEDB88320 if value & 1 else 0) for value in table]
    return table


_TABLE: Final = _crc_table()
_BY_TOP_BYTE: Final = {value >> 24: (index, value) for index, value in enumerate(_TABLE)}


def crc_seed(data: bytes, crc: int) -> int:
    """What crc32 was started with when it gave `crc` for `data`: the inverse of `zlib.crc32(data, seed)`."""
    register = crc ^ 0xFFFFFFFF
    for byte in reversed(data):
        index, value = _BY_TOP_BYTE[register >> 24]
        register = ((register ^ value) << 8 | index ^ byte) & 0xFFFFFFFF
    return register ^ 0xFFFFFFFF


# ---- the segment as it is put back -----------------------------------------------------------------------------------


class Rebuilt(NamedTuple):
    """A segment without damage."""

    content: bytes
    lost: list[tuple[int, int]]
    """First and last number of what is desyncs now."""
    last_seq: int


def rebuild(
    data: bytes, frames: list[Frame], header: bytes, *, lead: Checkpoint, upto: int, sealed: bool = True
) -> Rebuilt:
    """A segment of all good `frames`, in order, with the lost numbers filled, up to number `upto` at least.

    `lead` is the checkpoint that it begins with when its own is lost. The checksums are made for `header`. Seals are
    right only where they were; `sealed` keeps them.
    """
    decoded = decode_header(header)
    seed, parts, lost = decoded.crc, [header], []
    last_seq = decoded.first_seq - 1
    previous: Frame | None = None
    if not frames or frames[0][:2] != (last_seq, CHECKPOINT_TYPE):
        parts.append(encode_frames([lead], last_seq, seed=seed, synced=True))
    for frame in frames:
        seq, number, start, end = frame
        before = seq - (number < NOTE)
        if before > last_seq:
            parts.append(fill(last_seq, before, seed=seed, time_ns=time_of(data, previous) or lead.last_time_ns))
            lost.append((last_seq + 1, before))
        parts.append(reseed(data[start:end], seed) if sealed else _unsealed(data, frame, seed))
        last_seq, previous = seq, frame
    if upto > last_seq:
        parts.append(fill(last_seq, upto, seed=seed, time_ns=time_of(data, previous) or lead.last_time_ns))
        lost.append((last_seq + 1, upto))
    return Rebuilt(b"".join(parts), lost, max(last_seq, upto))


def _unsealed(data: bytes, frame: Frame, seed: int) -> bytes:
    """The frame for another place; if it is a seal, as the checkpoint that it is too."""
    seq, number, start, end = frame
    note = decode_entry(data, frame) if number == CHECKPOINT_TYPE else None
    if not isinstance(note, Checkpoint) or not note.offset:
        return reseed(data[start:end], seed)
    plain = msgspec.structs.replace(note, offset=0, crc=0)
    return encode_frames([plain], seq, seed=seed, synced=is_synced(data, frame))


def time_of(data: bytes, frame: Frame | None) -> int:
    """When the record was made that `frame` holds, for a note that of the last one before it; 0 if nobody knows."""
    if frame is None:
        return 0
    try:
        entry = decode_entry(data, frame)
    except JournalError:
        return 0
    return entry.last_time_ns if isinstance(entry, Checkpoint) else entry.time_ns if entry else 0


def fill(last_seq: int, upto: int, *, seed: int, time_ns: int) -> bytes:
    """A desync of every layer for each number behind `last_seq` up to `upto`."""
    lost = Desync(time_ns, "", LOST_REASON)
    return encode_frames([lost] * (upto - last_seq), last_seq, seed=seed, synced=False)
