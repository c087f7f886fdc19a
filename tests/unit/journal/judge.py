"""A second reader of the journal, written from docs/journal.md alone. It shares no code with watchd."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def unpack(data: bytes, at: int) -> tuple[Any, int]:
    """One MessagePack value and the offset behind it."""
    byte = data[at]
    at += 1
    if byte <= 0x7F or byte >= 0xE0:
        return (byte if byte <= 0x7F else byte - 256), at
    if 0x80 <= byte <= 0x8F or byte in (0xDE, 0xDF):
        count, at = (byte & 15, at) if byte <= 0x8F else number(data, at, 2 << (byte - 0xDE))
        items, at = array(data, at, 2 * count)
        return dict(zip(items[::2], items[1::2], strict=True)), at
    if 0x90 <= byte <= 0x9F or byte in (0xDC, 0xDD):
        count, at = (byte & 15, at) if byte <= 0x9F else number(data, at, 2 << (byte - 0xDC))
        return array(data, at, count)
    if 0xA0 <= byte <= 0xBF or 0xD9 <= byte <= 0xDB:
        size, at = (byte & 31, at) if byte <= 0xBF else number(data, at, 1 << (byte - 0xD9))
        return data[at : at + size].decode(), at + size
    if 0xC4 <= byte <= 0xC6:
        size, at = number(data, at, 1 << (byte - 0xC4))
        return data[at : at + size], at + size
    if 0xCC <= byte <= 0xCF:
        return number(data, at, 1 << (byte - 0xCC))
    if 0xD0 <= byte <= 0xD3:
        size = 1 << (byte - 0xD0)
        return int.from_bytes(data[at : at + size], "big", signed=True), at + size
    return {0xC0: None, 0xC2: False, 0xC3: True}[byte], at


def number(data: bytes, at: int, size: int) -> tuple[int, int]:
    return int.from_bytes(data[at : at + size], "big"), at + size


def array(data: bytes, at: int, count: int) -> tuple[list[Any], int]:
    items = []
    for _ in range(count):
        item, at = unpack(data, at)
        items.append(item)
    return items, at


def segment(name: str, data: bytes) -> tuple[bytes, list[tuple[int, int, list[Any]]]]:
    """Epoch and frames as (seq, type, array). Asserts that every byte of the file is as documented."""
    magic, version, flags, epoch, first, _created, seed = struct.unpack_from("<8sHH8sQqI", data)
    assert (magic, version, flags, seed) == (b"WATCHDJ\n", 1, 0, zlib.crc32(data[:36]))
    assert name == f"{first:020d}.wal"
    frames, at, last = [], 40, first - 1
    while at < len(data):
        crc, length, seq, mark, sort, flags = struct.unpack_from("<IIQHBB", data, at)
        end = at + 20 + length
        assert 0 < length <= 2**24 - 20
        assert (mark, crc, flags & ~1) == (0xD5F5, zlib.crc32(data[at + 4 : end], seed), 0)
        last += sort < 128
        assert seq == last
        value, stop = unpack(data, at + 20)
        assert (stop, value[0]) == (end, sort & 127)
        if sort == 129 and value[6]:
            assert (value[6], value[7]) == (at, zlib.crc32(data[:at]))
        frames.append((seq, sort, value))
        at = end
    assert frames[0][1] == 129
    return epoch, frames


def records(directory: Path) -> list[tuple[int, list[Any]]]:
    """All records of a journal as (seq, array); asserts that they are 1, 2, 3 …"""
    found = judged({path.name: path.read_bytes() for path in directory.glob("*.wal")})
    assert not found or found[0][0] == 1
    return found


def judged(files: Mapping[str, bytes]) -> list[tuple[int, list[Any]]]:
    """The same of what such a directory holds, of which the oldest segments may be gone."""
    segments = [segment(name, files[name]) for name in sorted(files) if name.endswith(".wal")]
    assert len({epoch for epoch, _ in segments}) == 1
    found = [(seq, value) for _, frames in segments for seq, sort, value in frames if sort < 128]
    assert not found or [seq for seq, _ in found] == list(range(found[0][0], found[-1][0] + 1))
    return found
