"""Find what changed in a layer without events: walk it and compare times.

Facts and what they mean for us
* ctime cannot be set by users, and every change of an inode sets it: data, attributes, links, and on most filesystems rename.
  So ctime finds what is there and changed. Nothing finds what is gone; but its directory's mtime tells that names came or went.
* Timestamps are taken from the clock of the last tick (CLOCK_REALTIME_COARSE), at most 10 ms (HZ=100) before CLOCK_REALTIME.
  Multigrain timestamps (6.13; ext4, xfs, btrfs, tmpfs) give finer times to inodes that were looked at, never earlier ones.
  So TICK_NS is taken off the time that is asked for.
* Some filesystems keep whole seconds (ext3, ext4 with 128 byte inodes), FAT two of them: a time without a fraction is allowed
  WHOLE_SECONDS_NS instead.
* A clock that was set back hides changes.
* A directory that was renamed keeps the times of all below it: it is told itself (attrib), its contents are not.
* Not every filesystem keeps a time of creation (btime). A copy of an old file has a new one, a file moved here an old one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from watchd.errors import LayerError
from watchd.kernel.statx import birth_time_ns
from watchd.records import Change, Kind, Via, pack_status
from watchd.sources.base import WatchedLayer
from watchd.sources.walk import Directory, Walk

TICK_NS = 10_000_000
WHOLE_SECONDS_NS = 2_000_000_000
SECOND_NS = 1_000_000_000
SLICE_ENTRIES = 2000

Judge = Callable[[int, bytes, os.stat_result], int]
"""Kinds (0: nothing to tell) of a name in a directory that is open at a descriptor."""


@dataclass
class Scanned:
    """What a scan has seen; the generators of this module return it."""

    entries: int = 0
    told: int = 0
    skipped: int = 0
    """Directories that vanished meanwhile or cannot be read."""
    first_error: str = ""


Scan = Generator[list[Change], None, Scanned]


def changed_since(layer: WatchedLayer, since_ns: int, *, slice_entries: int = SLICE_ENTRIES) -> Scan:
    """What changed at or after `since_ns` (CLOCK_REALTIME) and is still there, and directories in which names came or went.

    Gives a list, maybe an empty one, after every `slice_entries` entries looked at, so that other work can be done in between.
    Meanwhile the layer is held by its clone. Raises LayerError if the layer's root is gone or cannot be read.
    """

    def judge(descriptor: int, name: bytes, status: os.stat_result) -> int:
        if not (_is_new(status.st_ctime_ns, since_ns) or _is_new(status.st_mtime_ns, since_ns)):
            return 0
        born_ns = birth_time_ns(name, descriptor)
        if born_ns is not None and _is_new(born_ns, since_ns):
            return Kind.CREATE
        return Kind.MODIFY if _is_new(status.st_mtime_ns, since_ns) else Kind.ATTRIB

    return _scan(layer, b"", judge, slice_entries=slice_entries)


def everything_below(layer: WatchedLayer, path: bytes, *, slice_entries: int = SLICE_ENTRIES) -> Scan:
    """Everything below a directory that appeared, as created; nothing if it is gone. Otherwise like `changed_since`."""
    return _scan(layer, path, lambda descriptor, name, status: Kind.CREATE, slice_entries=slice_entries)


def _is_new(time_ns: int, since_ns: int) -> bool:
    return time_ns >= since_ns - (TICK_NS if time_ns % SECOND_NS else WHOLE_SECONDS_NS)


def _scan(layer: WatchedLayer, start: bytes, judge: Judge, *, slice_entries: int) -> Scan:
    scanned = Scanned()

    def failed(path: bytes, error: OSError) -> None:
        if not path:
            raise LayerError(f"layer {layer.name} cannot be read: {error.strerror}") from None
        scanned.skipped += 1
        scanned.first_error = scanned.first_error or f"{os.fsdecode(path)}: {error.strerror}"

    told: list[Change] = []
    root = layer.open()
    try:
        seen = 0
        for change in _entries(layer, Walk(root, start, failed=failed), judge):
            seen += 1
            if change is not None:
                told.append(change)
            if seen >= slice_entries:
                _count(scanned, seen, told)
                yield told
                seen, told = 0, []
    finally:
        os.close(root)
    _count(scanned, seen, told)
    yield told
    return scanned


def _count(scanned: Scanned, seen: int, told: list[Change]) -> None:
    scanned.entries += seen
    scanned.told += len(told)


def _entries(layer: WatchedLayer, walk: Walk, judge: Judge) -> Iterator[Change | None]:
    """One for every entry looked at, None for those of which there is nothing to tell; the layer's root is one too."""
    for directory in walk:
        if not directory.path:
            status = os.fstat(directory.descriptor)
            yield _change(layer, b"", judge(directory.descriptor, b"", status), status, is_dir=True)
        for name, is_dir, entry in walk.entries(directory):
            if is_dir:
                directory.descend.append(name)
            yield _look(layer, directory, name, entry, judge, is_dir=is_dir)


def _look(
    layer: WatchedLayer, directory: Directory, name: bytes, entry: os.DirEntry[str], judge: Judge, *, is_dir: bool
) -> Change | None:
    try:
        status = entry.stat(follow_symlinks=False)
        kinds = judge(directory.descriptor, name, status)
    except OSError:
        return None  # gone since it was listed: its directory's time is new then
    return _change(layer, directory.child(name), kinds, status, is_dir=is_dir) if kinds else None


def _change(layer: WatchedLayer, path: bytes, kinds: int, status: os.stat_result, *, is_dir: bool) -> Change | None:
    if not kinds:
        return None
    return Change(
        time.time_ns(),
        layer.name,
        path,
        kinds,
        True,
        is_dir,
        inode=status.st_ino,
        via=Via.SCAN,
        status=pack_status(status),
    )
