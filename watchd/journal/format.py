"""The journal's bytes. Pure: nothing here touches a file.

A segment is one header and then frames without gaps. All integers are little endian.

Segment header, 40 bytes:

    offset  size  field
         0     8  magic        "WATCHDJ" and a newline
         8     2  version      1
        10     2  flags        0; a reader refuses a flag that it does not know
        12     8  epoch        random, the same in all segments of a journal
        20     8  first_seq    sequence number of the first record, also the file's name
        28     8  created_ns   signed, CLOCK_REALTIME
        36     4  crc32        over bytes 0-35

Frame header, 20 bytes, and its payload:

    offset  size  field
         0     4  crc32        over bytes 4 to the end of the payload, started with the segment header's crc32
         4     4  length       of the payload, 1 to 16 MiB - 20
         8     8  seq          of the record; a note has that of the last record before it
        16     2  mark         0xd5f5: lets a scan find frames behind a damaged one
        18     1  type         1-127 the tag of a record (watchd/records.py), 128-255 a note, 128 + its tag
        19     1  flags        bit 0 SYNCED: everything before this frame was on disk before this frame was written
        20     …  payload      MessagePack array, its first element the tag

crc32 is zlib's. A frame's checksum starts with that of its segment header, which covers the epoch and the time of
creation: so bytes that only look like a frame (in a file name, or left in a reused disk block) do not check. A
segment begins with a `Checkpoint` note, so that opening a journal needs its last segment only.

The SYNCED flag tells a torn tail from damage. After a power cut any part of what was written since the last
fdatasync may be missing, so damage there loses nothing that was promised. A SYNCED frame *behind* a damaged one
proves that the damaged one had been on disk.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from watchd.errors import JournalError
from watchd.records import Change, Record

MAGIC: Final = b"WATCHDJ\n"
VERSION: Final = 1
FIRST_SEQ: Final = 1

MAX_FRAME_BYTES: Final = 16 << 20
MARK: Final = 0xD5F5
"""Its bytes f5 d5 can be part of no UTF-8 name."""
SYNCED: Final = 1
SEAL_BYTES: Final = 4 << 20
"""A writer seals a segment again when it has grown by this."""
NOTE: Final = 128

_HEADER: Final = struct.Struct("<8sHH8sQqI")
_FRAME: Final = struct.Struct("<IIQHBB")
_FRAME_AFTER_CRC: Final = struct.Struct("<IQHBB")
HEADER_BYTES: Final = 40
FRAME_HEADER_BYTES: Final = 20
_MARK_OFFSET: Final = 16
_FLAGS_OFFSET: Final = 19
assert _HEADER.size == HEADER_BYTES
assert _FRAME.size == FRAME_HEADER_BYTES == 4 + _FRAME_AFTER_CRC.size


class OtherFormatError(JournalError):
    """A good segment of another version. Nothing is wrong with it."""


class LayerMark(msgspec.Struct, frozen=True, array_like=True):
    """How far the journal is complete for one layer."""

    path: bytes
    complete_until_ns: int = 0
    """Every change of the layer older than this is in the journal; 0 when nothing is known."""
    open_desync: int = 0
    """Sequence number of the last desync that no resync has closed yet, or 0."""
    since_seq: int = 0
    """The last sequence number when a source began to watch the layer for the first time: what happened to it before the
    next record is not known, and no scan finds out. 0 when it was watched from the beginning."""


class Checkpoint(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Note: what all records before it amount to, for whoever opens the journal."""

    layers: dict[str, LayerMark]
    last_time_ns: int = 0
    """`time_ns` of the last record, 0 when there is none."""
    stopped: bool = False
    """Whether the last record is a `Stop`."""
    every_layer: int = 0
    """Sequence number of the last desync of every layer, or 0: it is open for a layer that is not in `layers` yet."""
    lost: int = 0
    """The last sequence number that damage has taken the record of, or 0."""
    offset: int = 0
    """Where the note begins in its segment, in one that seals what is before it; else 0."""
    crc: int = 0
    """crc32 of the segment's bytes before `offset`: if they have it, all of them are as they were written."""


Entry = Record | Checkpoint
"""What a frame holds."""

CHANGE_TYPE: Final = 1
CHECKPOINT_TYPE: Final = NOTE + 1


def _frame_types() -> dict[type, int]:
    """The type byte of every entry class."""
    types: dict[type, int] = {}
    for cls in (*Record.__args__, Checkpoint):
        tag = cls.__struct_config__.tag
        assert isinstance(tag, int)
        assert 0 < tag < NOTE
        types[cls] = NOTE + tag if cls is Checkpoint else tag
    return types


FRAME_TYPES: Final = _frame_types()
RECORD_TYPES: Final = {cls.__name__.lower(): number for cls, number in FRAME_TYPES.items() if number < NOTE}
"""`change`, `desync`, … to the type byte."""
LOST_REASON: Final = "source-lost"
"""A desync of every layer with this reason stands in the place of a record that was damaged."""
assert FRAME_TYPES[Change] == CHANGE_TYPE
assert FRAME_TYPES[Checkpoint] == CHECKPOINT_TYPE

_encode = msgspec.msgpack.Encoder().encode
_decode_record = msgspec.msgpack.Decoder(Record).decode
_decode_checkpoint = msgspec.msgpack.Decoder(Checkpoint).decode


class SegmentHeader(msgspec.Struct, frozen=True):
    """The decoded header of a segment."""

    epoch: bytes
    first_seq: int
    created_ns: int
    crc: int
    """Seed of the checksums of all frames of the segment."""


def encode_header(epoch: bytes, first_seq: int, created_ns: int) -> bytes:
    """The bytes of a segment header; `epoch` is 8 bytes."""
    assert len(epoch) == 8
    bare = _HEADER.pack(MAGIC, VERSION, 0, epoch, first_seq, created_ns, 0)[:-4]
    return bare + zlib.crc32(bare).to_bytes(4, "little")


def decode_header(data: bytes) -> SegmentHeader:
    """Raises JournalError, with the reason alone as its text, when `data` is no header that this version can read."""
    if len(data) < HEADER_BYTES:
        raise JournalError("its header is cut short")
    magic, version, flags, epoch, first_seq, created_ns, crc = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise JournalError("it is no journal segment")
    if crc != zlib.crc32(data[: HEADER_BYTES - 4]):
        raise JournalError("its header's checksum does not match")
    if version != VERSION or flags:
        raise OtherFormatError(
            f"it has format {version}, flags {flags:#x}; this watchd reads format {VERSION} only",
            remedy="use the watchd that wrote it",
        )
    return SegmentHeader(epoch, first_seq, created_ns, crc)


def encode_frames(entries: Sequence[Entry], last_seq: int, *, seed: int, synced: bool) -> bytes:
    """Frames for `entries`, whose first record gets the sequence number `last_seq + 1`.

    `synced` sets SYNCED on the first frame. Raises JournalError for an entry that does not fit into a frame.

    This is the journal's hot loop: about 0.5 us per record, half of it the encoder's.
    """
    parts: list[bytes] = []
    add, encode, pack, crc32, types = parts.append, _encode, _FRAME_AFTER_CRC.pack, zlib.crc32, FRAME_TYPES
    limit = MAX_FRAME_BYTES - FRAME_HEADER_BYTES
    flags = SYNCED if synced else 0
    seq = last_seq
    for entry in entries:
        number = types[type(entry)]
        if number < NOTE:
            seq += 1
        payload = encode(entry)
        if len(payload) > limit:
            raise JournalError(f"an entry of {len(payload)} bytes does not fit into a frame of {MAX_FRAME_BYTES}")
        body = pack(len(payload), seq, MARK, number, flags) + payload
        add(crc32(body, seed).to_bytes(4, "little") + body)
        flags = 0
    return b"".join(parts)


def reseed(frame: bytes, seed: int) -> bytes:
    """The bytes of a good frame as they are in the segment whose header's checksum is `seed`."""
    body = frame[4:]
    return zlib.crc32(body, seed).to_bytes(4, "little") + body


Frame = tuple[int, int, int, int]
"""A frame that checks: its sequence number, its type, where it begins in its buffer and where it ends."""


class Scan(NamedTuple):
    """The frames at the beginning of a buffer, and why they end."""

    frames: list[Frame]
    end: int
    """Offset of the first byte that belongs to no good frame."""
    needed: int
    """Bytes that the next frame takes, as far as is known; more than there are."""
    fault: str
    """What is wrong with the bytes at `end`; empty when they are just too few."""


def scan(buffer: bytes, last_seq: int, *, seed: int) -> Scan:
    """Checks the frames in `buffer`; the first record must have the sequence number `last_seq + 1`."""
    frames: list[Frame] = []
    add, unpack, crc32, size = frames.append, _FRAME.unpack_from, zlib.crc32, len(buffer)
    position = 0
    while size - position > FRAME_HEADER_BYTES:
        crc, length, seq, mark, number, _flags = unpack(buffer, position)
        if mark != MARK or not 0 < length <= MAX_FRAME_BYTES - FRAME_HEADER_BYTES:
            return Scan(frames, position, 0, "no frame begins here")
        end = position + FRAME_HEADER_BYTES + length
        if end > size:
            return Scan(frames, position, end - position, "")
        if crc != crc32(buffer[position + 4 : end], seed):
            return Scan(frames, position, 0, "the checksum does not match")
        if number < NOTE:
            last_seq += 1
        if seq != last_seq:
            return Scan(frames, position, 0, f"sequence number {seq} stands where {last_seq} is due")
        add((seq, number, position, end))
        position = end
    return Scan(frames, position, FRAME_HEADER_BYTES + 1, "")


def frame_at(buffer: bytes, start: int, *, seed: int) -> Frame | None:
    """The frame that begins at `start`, if it is whole and its checksum matches; its number may be any."""
    if start < 0 or len(buffer) - start <= FRAME_HEADER_BYTES:
        return None
    crc, length, seq, mark, number, _flags = _FRAME.unpack_from(buffer, start)
    end = start + FRAME_HEADER_BYTES + length
    if mark != MARK or not 0 < length <= MAX_FRAME_BYTES - FRAME_HEADER_BYTES or end > len(buffer):
        return None
    return (seq, number, start, end) if crc == zlib.crc32(buffer[start + 4 : end], seed) else None


def next_frame(buffer: bytes, start: int, *, seed: int) -> Frame | None:
    """The first good frame that begins at `start` or behind it, found by its mark."""
    for at in marks(buffer, start):
        if frame := frame_at(buffer, at, seed=seed):
            return frame
    return None


def marks(buffer: bytes, start: int) -> Iterator[int]:
    """Where frames may begin, from `start` on."""
    mark = MARK.to_bytes(2, "little")
    at = buffer.find(mark, start + _MARK_OFFSET)
    while at >= 0:
        yield at - _MARK_OFFSET
        at = buffer.find(mark, at + 1)


def seal_marks(buffer: bytes) -> Iterator[int]:
    """Where checkpoints may begin, the last one first."""
    mark = MARK.to_bytes(2, "little") + bytes([CHECKPOINT_TYPE])
    at = buffer.rfind(mark)
    while at >= 0:
        yield at - _MARK_OFFSET
        at = buffer.rfind(mark, 0, at + len(mark) - 1)


def is_synced(buffer: bytes, frame: Frame) -> bool:
    """Whether the frame says that all bytes before it were on disk before it was written."""
    return bool(buffer[frame[2] + _FLAGS_OFFSET] & SYNCED)


def find_synced(buffer: bytes, last_seq: int, *, seed: int) -> int | None:
    """Offset of the first good SYNCED frame behind the beginning of `buffer`, where something is broken.

    `last_seq` is the last sequence number before the buffer. None when there is no such frame: then nothing in the
    buffer is known to have been on disk.
    """
    frame = next_frame(buffer, 1, seed=seed)
    while frame and not (frame[0] >= last_seq and is_synced(buffer, frame)):
        frame = next_frame(buffer, frame[3], seed=seed)
    return frame and frame[2]


def decode_entry(buffer: bytes, frame: Frame) -> Entry | None:
    """What `frame` of `buffer` holds; None for a note of a sort that this version does not know.

    Raises JournalError, with the reason alone as its text, for a record that this version cannot decode.
    """
    seq, number, start, end = frame
    if number > NOTE and number != CHECKPOINT_TYPE:
        return None
    try:
        entry: Entry = (_decode_record if number < NOTE else _decode_checkpoint)(
            buffer[start + FRAME_HEADER_BYTES : end]
        )
    except msgspec.MsgspecError as error:
        raise JournalError(f"this watchd cannot decode record {seq}: {error}") from error
    return entry
