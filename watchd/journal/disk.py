"""All that the journal does to files, so that the tests can put a disk in memory in its place, which crashes where they like.

Facts about files that the journal relies on. A name is durable only when its directory was fsynced. fdatasync on any
descriptor of a file, a read-only one too, puts all its data and its size on disk. A file that is only ever appended to
has, at any moment, a prefix of what was written to it, unless the machine went down. A rename is seen, and survives,
whole or not at all.

When fdatasync fails the kernel may mark what it could not write as clean: it then reads well until it is evicted, and
the next fdatasync, of whoever opened the file later too, reports success for what never reached the disk (fsync(2),
"Error reporting"; "fsyncgate"). Only writing the data again makes it durable. A directory is another case: where its
fsync fails, a journalling filesystem is aborted and nothing succeeds any more.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final, Protocol, Self


class File(Protocol):
    """An open file; owns its descriptor. Everything but `close` raises OSError."""

    def pread(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes; fewer at the end of the file only."""

    def pwrite(self, data: bytes | memoryview, offset: int) -> int:
        """Writes `data`, or the beginning of it; returns how many bytes that were."""

    def size(self) -> int:
        """Bytes in the file now."""

    def is_at(self, path: Path) -> bool:
        """Whether `path` leads to this file, still."""

    def truncate(self, size: int) -> None:
        """Cuts the file off."""

    def sync(self) -> None:
        """Returns when the file's data is on disk. After it failed nothing is known of what was written before."""

    def lock(self) -> None:
        """Takes the file's lock, which goes with the descriptor. Raises BlockingIOError when somebody else has it."""

    def close(self) -> None:
        """Closes the descriptor."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_exception: object) -> None: ...


class Disk(Protocol):
    """Where a journal lies. Every method raises OSError."""

    def open(self, path: Path, flags: int) -> File:
        """Opens or, with O_CREAT, creates a file of ours; `flags` are those of open(2)."""

    def names(self, directory: Path) -> list[str]:
        """What there is in the directory."""

    def rename(self, old: Path, new: Path) -> None:
        """Gives a file another name of the same directory; replaces what has that name."""

    def unlink(self, path: Path) -> None:
        """Removes a file."""

    def make_directory(self, path: Path) -> None:
        """Makes a directory of ours, and those above it, unless it is there."""

    def sync_directory(self, path: Path) -> None:
        """Returns when the names in the directory are on disk."""


class RealFile:
    """See `File`."""

    def __init__(self, path: Path, flags: int) -> None:
        self._fd = os.open(path, flags | os.O_CLOEXEC, 0o600)

    def pread(self, size: int, offset: int) -> bytes:
        """See `File`."""
        return os.pread(self._fd, size, offset)

    def pwrite(self, data: bytes | memoryview, offset: int) -> int:
        """See `File`."""
        return os.pwrite(self._fd, data, offset)

    def size(self) -> int:
        """See `File`."""
        return os.fstat(self._fd).st_size

    def is_at(self, path: Path) -> bool:
        """See `File`."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._fd))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def truncate(self, size: int) -> None:
        """See `File`."""
        os.ftruncate(self._fd, size)

    def sync(self) -> None:
        """See `File`."""
        os.fdatasync(self._fd)

    def lock(self) -> None:
        """See `File`."""
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """See `File`."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


class RealDisk:
    """See `Disk`."""

    def open(self, path: Path, flags: int) -> File:
        """See `Disk`."""
        return RealFile(path, flags)

    def names(self, directory: Path) -> list[str]:
        """See `Disk`."""
        return os.listdir(directory)

    def rename(self, old: Path, new: Path) -> None:
        """See `Disk`."""
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        """See `Disk`."""
        os.unlink(path)

    def make_directory(self, path: Path) -> None:
        """See `Disk`."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def sync_directory(self, path: Path) -> None:
        """See `Disk`."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


REAL: Final = RealDisk()


def write_all(file: File, data: bytes, offset: int) -> None:
    """Writes all of `data`. Raises OSError: a write that a full disk cut short is followed by one that says why."""
    view = memoryview(data)
    while view:
        count = file.pwrite(view, offset)
        view, offset = view[count:], offset + count
