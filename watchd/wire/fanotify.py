"""Decode what read(2) of a fanotify group returns.

Format (fanotify(7), include/uapi/linux/fanotify.h), little endian: metadata `<IBBHQii` (event_len, vers, reserved,
metadata_len, mask, fd, pid), then info records, each with header `<BBH` (info_type, pad, len). The DFID_NAME types hold fsid
(8 bytes), struct file_handle (handle_bytes u32, handle_type i32, handle) and a NUL-terminated name padded with NULs; FID holds
fsid and struct file_handle. The name of an event on a directory itself is `.`.

Facts and what they mean for us
* Records are dirty markers, not an operation log: the kernel merges a later event into an earlier record. So all records of
  one name within a batch are merged here, before anything is looked at; the order of what happened is not kept, that of renames
  neither: a -> b, b -> a, a -> b arrives as a -> b, b -> a.
* The bytes from fsid to the end of the name are the identity of a name in a directory. They serve as the key as they are:
  nothing is unpacked for a name that is only seen again or that lies outside every layer.
* A FID that comes first comes alone: the number of names of a file changed, and the event of its directory tells the rest.
* The overflow record carries no info records and fd -1.
* FAN_DELETE_SELF and FAN_MOVE_SELF are not asked for: they add nothing to the parent's event, and DELETE_SELF of lower inodes
  is released by watchd's own invalidations.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from watchd.errors import WireError
from watchd.kernel.fanotify import (
    FAN_EVENT_INFO_TYPE_DFID_NAME,
    FAN_EVENT_INFO_TYPE_FID,
    FAN_EVENT_INFO_TYPE_NEW_DFID_NAME,
    FAN_EVENT_INFO_TYPE_OLD_DFID_NAME,
    FAN_MOVED_FROM,
    FAN_MOVED_TO,
    FAN_ONDIR,
    FAN_Q_OVERFLOW,
    FAN_RENAME,
    FANOTIFY_METADATA_VERSION,
)

METADATA_LEN = 24
INFO_HEADER_LEN = 4
FSID_LEN = 8
FILE_HANDLE_HEADER_LEN = 8

MASK_BITS = 32
MASK = (1 << MASK_BITS) - 1

_metadata = struct.Struct("<IBxHQ4xi")
_info_header = struct.Struct("<BxH")
_u32 = struct.Struct("<I")


class Events:
    """One batch of decoded records, merged by name. Filled by `decode`, emptied by its reader."""

    __slots__ = ("children", "names", "overflow", "records", "renames")

    def __init__(self) -> None:
        self.names: dict[bytes, int] = {}
        """Key of a name (see `split`) -> event mask, with the pid that was seen first above MASK_BITS."""
        self.children: dict[bytes, tuple[bytes, tuple[bytes, ...]]] = {}
        """Key of a directory object (fsid and handle) -> key of the name it was last seen under, and the keys of the
        directories that it was renamed from, each once; empty where that is not told."""
        self.renames: dict[bytes, bytes] = {}
        """Key of the new name -> key of the old name."""
        self.overflow = False
        self.records = 0


def split(key: bytes) -> tuple[bytes, bytes]:
    """The directory's key (fsid and struct file_handle) and the name in it."""
    end = FSID_LEN + FILE_HANDLE_HEADER_LEN + _u32.unpack_from(key, FSID_LEN)[0]
    return key[:end], key[end:]


def length_of(data: bytes | memoryview) -> int:
    """How many bytes of events read(2) has put at the beginning of what were zeros."""
    end, total = 0, len(data)
    while end + METADATA_LEN <= total and (length := _u32.unpack_from(data, end)[0]):
        end += length
    return min(end, total)


def by_directory(names: Mapping[bytes, int]) -> dict[bytes, list[tuple[bytes, int, bytes]]]:
    """`Events.names` by the key of the directory: name, value and key of each. What `split` does, for many."""
    directories: dict[bytes, list[tuple[bytes, int, bytes]]] = {}
    size_of, header = _u32.unpack_from, FSID_LEN + FILE_HANDLE_HEADER_LEN
    for key, value in names.items():
        end = header + size_of(key, FSID_LEN)[0]
        entry = key[end:], value, key
        directory = key[:end]
        if known := directories.get(directory):
            known.append(entry)
        else:
            directories[directory] = [entry]
    return directories


def file_handle(directory_key: bytes) -> bytes:
    """The struct file_handle in a directory's key, as open_by_handle_at(2) takes it."""
    return directory_key[FSID_LEN:]


def decode(buffer: bytes, events: Events) -> None:
    """Merge the records of one read into `events`. Raises WireError."""
    names = events.names
    offset, end, records = 0, len(buffer), 0
    unpack = _metadata.unpack_from
    try:
        while offset < end:
            length, version, start, mask, pid = unpack(buffer, offset)
            if length < METADATA_LEN or offset + length > end or version != FANOTIFY_METADATA_VERSION:
                raise WireError(f"fanotify: record of length {length}, version {version} at byte {offset} of {end}")
            records += 1
            info = offset + start
            if length == start:
                events.overflow = events.overflow or bool(mask & FAN_Q_OVERFLOW)
            elif buffer[info] == FAN_EVENT_INFO_TYPE_DFID_NAME and not mask & FAN_ONDIR:
                size = buffer[info + 2] | buffer[info + 3] << 8
                key = buffer[info + 4 : info + size].rstrip(b"\0")
                known = names.get(key)
                names[key] = mask | pid << MASK_BITS if known is None else known | mask
            elif buffer[info] == FAN_EVENT_INFO_TYPE_OLD_DFID_NAME and not mask & FAN_ONDIR:
                _decode_rename(buffer, info, offset + length, pid, events)
            elif buffer[info] == FAN_EVENT_INFO_TYPE_FID:
                pass  # a directory would come first
            else:
                _decode_general(buffer[info : offset + length], mask, pid, events)
            offset += length
    except (struct.error, IndexError) as error:
        raise WireError(f"fanotify: record cut short at byte {offset} of {end} ({error})") from None
    events.records += records


def _decode_rename(buffer: bytes, info: int, end: int, pid: int, events: Events) -> None:
    """The rename of something that is no directory, the everyday way of replacing a file."""
    size = buffer[info + 2] | buffer[info + 3] << 8
    new_info = info + size
    if new_info >= end or buffer[new_info] != FAN_EVENT_INFO_TYPE_NEW_DFID_NAME:
        _decode_general(buffer[info:end], FAN_RENAME, pid, events)
        return
    new_size = buffer[new_info + 2] | buffer[new_info + 3] << 8
    old = _add(buffer[info + INFO_HEADER_LEN : new_info], FAN_MOVED_FROM, pid, events)
    new = _add(buffer[new_info + INFO_HEADER_LEN : new_info + new_size], FAN_MOVED_TO, pid, events)
    if old and new:
        events.renames[new] = old


def _decode_general(infos: bytes, mask: int, pid: int, events: Events) -> None:
    """Records about directories and renames, and whatever else the kernel may send."""
    found: dict[int, bytes] = {}
    old: bytes | None = None
    offset = 0
    while offset < len(infos):
        kind, size = _info_header.unpack_from(infos, offset)
        if size < INFO_HEADER_LEN or offset + size > len(infos):
            raise WireError(f"fanotify: info record of length {size} in a record with {len(infos)} bytes of them")
        found[kind] = infos[offset + INFO_HEADER_LEN : offset + size]
        offset += size
    if mask & FAN_RENAME:
        old = _add(found.get(FAN_EVENT_INFO_TYPE_OLD_DFID_NAME), mask & FAN_ONDIR | FAN_MOVED_FROM, pid, events)
        new = _add(found.get(FAN_EVENT_INFO_TYPE_NEW_DFID_NAME), mask & FAN_ONDIR | FAN_MOVED_TO, pid, events)
        if old and new:
            events.renames[new] = old
        name = new
    else:
        name = _add(found.get(FAN_EVENT_INFO_TYPE_DFID_NAME), mask, pid, events)
    child = found.get(FAN_EVENT_INFO_TYPE_FID)
    if mask & FAN_ONDIR and child and name:
        _, origins = events.children.get(child, (b"", ()))
        if old is not None and (origin := split(old)[0] if old else b"") not in origins:
            origins = (*origins, origin)
        events.children[child] = (name, origins)


def _add(body: bytes | None, mask: int, pid: int, events: Events) -> bytes:
    if body is None or len(body) <= FSID_LEN + FILE_HANDLE_HEADER_LEN:
        return b""
    key = body.rstrip(b"\0")
    known = events.names.get(key)
    events.names[key] = mask | pid << MASK_BITS if known is None else known | mask
    return key
