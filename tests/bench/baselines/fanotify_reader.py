"""The bare reader: reads fanotify, decodes each record, resolves its paths, and does nothing with them.

This is the least work that any program can do that wants paths; watchd's CPU per event is measured against it,
so it is written for speed: a rename's record has two names, any other at most one, and they come first, so nothing
behind them is decoded.
Record layout (linux/fanotify.h): metadata `<IBBHQii`, then info records: `<BBH`, fsid `<ii`, file_handle `<Ii`
and handle, NUL-terminated name.
"""

from __future__ import annotations

import os
import struct
import sys

from tests.bench.baselines import fanotify
from tests.bench.baselines.protocol import END, Tally, report, say_ready

METADATA = struct.Struct("<I4xQii")
INFO = struct.Struct("<BxH8xI")
FAN_EVENT_INFO_TYPE_FID = 1
HANDLE_OFFSET = 12
HANDLE_HEADER_SIZE = 8
READ_SIZE = 1 << 20


class Reader:
    """Decodes batches of records into paths and ticks them off."""

    def __init__(self, mount_fd: int, tally: Tally) -> None:
        self.mount_fd = mount_fd
        self.tally = tally
        self.directories: dict[bytes, bytes] = {}
        self.ended = False

    def decode(self, batch: bytes) -> None:
        """Decode one read's worth of records."""
        position, size, tally = 0, len(batch), self.tally
        unpack, name_of = METADATA.unpack_from, self._decode_name
        while position < size:
            length, mask, _, _ = unpack(batch, position)
            tally.records += 1
            if mask & fanotify.FAN_Q_OVERFLOW:
                tally.overflows += 1
            else:
                second = name_of(batch, position + METADATA.size)
                if mask & fanotify.FAN_RENAME:
                    name_of(batch, second)
            position += length

    def _decode_name(self, batch: bytes, position: int) -> int:
        """Decode an info record that holds a directory's handle and a name; returns where the next one starts."""
        kind, length, handle_size = INFO.unpack_from(batch, position)
        end: int = position + length
        if kind == FAN_EVENT_INFO_TYPE_FID:  # an unlink's change of the link count has no name
            return end
        handle_start = position + HANDLE_OFFSET
        name_start = handle_start + HANDLE_HEADER_SIZE + handle_size
        handle = batch[handle_start:name_start]
        name = batch[name_start : batch.index(0, name_start)]
        directory = self.directories.get(handle)
        if directory is None:
            directory = self.directories[handle] = fanotify.directory_path(self.mount_fd, handle)
        self._saw(directory + b"/" + name, name)
        return end

    def _saw(self, _path: bytes, name: bytes) -> None:
        try:
            self.tally.seen[int(name)] = 1
        except ValueError:
            self.ended = self.ended or name.startswith(END)


def main() -> None:
    """Usage: fanotify_reader LOWER FILES."""
    root = os.fsencode(sys.argv[1])
    tally = Tally(files=int(sys.argv[2]))
    group = fanotify.watch_filesystem(root)
    reader = Reader(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), tally)
    say_ready()
    while not reader.ended:
        reader.decode(os.read(group, READ_SIZE))
    report(tally)


if __name__ == "__main__":
    main()
