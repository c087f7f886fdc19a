"""Segment files: their names, making them, and reading their frames in order.

A segment `00000000000000000001.wal` is named after its first sequence number in 20 digits, so names sort as numbers
do. It is written under a name that ends in `.tmp` and renamed when it is on disk with its header and first frames:
a `.wal` file without a good header is damaged, never unfinished.

Fact: fdatasync fails with EINVAL or EROFS on a filesystem that cannot be written, where everything is on disk.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self

from watchd.errors import JournalAccessError, JournalError
from watchd.journal.disk import REAL, Disk, write_all
from watchd.journal.format import (
    HEADER_BYTES,
    Scan,
    SegmentHeader,
    decode_header,
    find_synced,
    scan,
)

CHUNK_BYTES: Final = 1 << 18
NO_JOURNAL: Final = "start `watchd run` once, or correct state_directory"
VERIFY: Final = "run `watchd journal verify` to see what is readable"

_NAME: Final = re.compile(r"([0-9]{20})\.wal")
_OURS: Final = re.compile(r"lock|[^.]+\.wal(\.tmp)?|[0-9-]+\.(torn|damaged)|lost\+found")
"""What may lie in a journal's directory."""


def segment_path(directory: Path, first_seq: int) -> Path:
    """Where the segment that begins with `first_seq` lies."""
    return directory / f"{first_seq:020}.wal"


def list_segments(directory: Path, *, disk: Disk = REAL) -> list[int]:
    """First sequence numbers of all segments, ascending. Raises JournalError when the directory cannot be listed."""
    with disk_errors(f"cannot list the journal {directory}"):
        names = disk.names(directory)
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def existing_segments(directory: Path, *, disk: Disk = REAL) -> list[int]:
    """The same, and there is at least one. Raises JournalError when there is none, too."""
    firsts = list_segments(directory, disk=disk)
    if not firsts:
        raise JournalError(f"there is no journal in {directory}", remedy=NO_JOURNAL)
    return firsts


def check_ours(directory: Path, *, disk: Disk = REAL) -> None:
    """Raises JournalError when the directory is there, holds no journal and something else."""
    try:
        names = disk.names(directory)
    except OSError:
        return  # whoever uses it finds out
    foreign = sorted(name for name in names if not _OURS.fullmatch(name))
    if foreign and not any(map(_NAME.fullmatch, names)):
        raise JournalError(
            f"{directory} is no journal, it holds {foreign[0]!r}",
            remedy="move away what is in it, or set state_directory to another directory",
        )


def create_segment(directory: Path, first_seq: int, content: bytes, *, disk: Disk = REAL) -> None:
    """Puts a segment that holds `content` on disk, whole or not at all. Raises OSError."""
    path = segment_path(directory, first_seq)
    temporary = temporary_path(path)
    write_file(temporary, content, flags=os.O_TRUNC, disk=disk)
    disk.rename(temporary, path)
    disk.sync_directory(directory)


def temporary_path(path: Path) -> Path:
    """What the segment `path` is called while it is being written."""
    return path.with_suffix(".wal.tmp")


def write_file(path: Path, content: bytes, *, flags: int, disk: Disk = REAL) -> None:
    """Writes a new file and puts its data on disk; `flags` is O_TRUNC or O_EXCL. Raises OSError."""
    with disk.open(path, os.O_WRONLY | os.O_CREAT | flags) as file:
        write_all(file, content, 0)
        file.sync()


def write_aside(path: Path, offset: int, content: bytes, *, suffix: str, disk: Disk = REAL) -> Path:
    """Keeps what was in the segment `path` at `offset` as `<segment>-<offset>[-<n>]<suffix>`. An older one of that name
    stays; if it holds the same, it is the one. Its name is durable with the next fsync of the directory. Raises OSError.
    """
    number = 0
    while True:
        aside = path.with_name(f"{path.stem}-{offset}{f'-{number}' if number else ''}{suffix}")
        try:
            write_file(aside, content, flags=os.O_EXCL, disk=disk)
        except FileExistsError:
            with disk.open(aside, os.O_RDONLY) as file:
                if file.size() == len(content) and file.pread(len(content), 0) == content:
                    file.sync()
                    return aside
            number += 1
        except OSError:
            with suppress(OSError):
                disk.unlink(aside)  # else every attempt on a full disk would leave one
            raise
        else:
            return aside


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns an OSError into a JournalError that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise disk_error(what, error) from error


def disk_error(what: str, error: OSError) -> JournalError:
    """The error for people: `what`, the reason, and what to do about it."""
    kind = JournalAccessError if isinstance(error, PermissionError) else JournalError
    return kind(f"{what}: {error.strerror}", remedy=_remedy(error.errno))


def _remedy(number: int | None) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room on its filesystem"
    if number in (errno.EACCES, errno.EPERM):
        return "run as root, or set state_directory to a place that this user may use"
    if number in (errno.ENOENT, errno.ENOTDIR):
        return NO_JOURNAL
    return "see the kernel's log for the state of its disk"


class Segment:
    """An open segment, read-only. Owns its descriptor."""

    def __init__(self, directory: Path, first_seq: int, *, disk: Disk = REAL) -> None:
        """Raises JournalError when the file cannot be opened or its header is not good."""
        self.path = segment_path(directory, first_seq)
        self._synced_bytes = 0
        with disk_errors(f"cannot open {self.path}"):
            self._file = disk.open(self.path, os.O_RDONLY)
        try:
            self.header = self._read_header(first_seq)
        except BaseException:
            self.close()
            raise

    def _read_header(self, first_seq: int) -> SegmentHeader:
        try:
            header = decode_header(self.pread(HEADER_BYTES, 0))
        except JournalError as error:
            raise JournalError(f"cannot read {self.path}: {error}", remedy=error.remedy or VERIFY) from error
        if header.first_seq != first_seq:
            raise JournalError(
                f"{self.path} begins with record {header.first_seq}, not with what its name says", remedy=VERIFY
            )
        return header

    def close(self) -> None:
        """Closes the descriptor."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def pread(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes; fewer at the end of the file only. Raises JournalError."""
        with disk_errors(f"cannot read {self.path} at byte {offset}"):
            return self._file.pread(size, offset)

    def size(self) -> int:
        """Bytes in the file now. Raises JournalError."""
        with disk_errors(f"cannot look at {self.path}"):
            return self._file.size()

    def is_in_place(self) -> bool:
        """Whether its name still leads to it. Raises JournalError."""
        with disk_errors(f"cannot look at {self.path}"):
            return self._file.is_at(self.path)

    def sync(self, upto: int) -> None:
        """Puts the bytes before offset `upto` on disk, whoever wrote them. Raises JournalError."""
        if upto <= self._synced_bytes:
            return
        size = self.size()
        try:
            self._file.sync()
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EROFS):
                raise disk_error(f"cannot put {self.path} on disk", error) from error
        self._synced_bytes = size

    def frames(self, offset: int, last_seq: int) -> tuple[bytes, Scan]:
        """About CHUNK_BYTES of frames from `offset` on, with the buffer that they lie in; none at the end.

        When there is no frame although the buffer is not empty, the bytes at `offset` are broken or not yet whole:
        `is_damage` tells.
        """
        size = CHUNK_BYTES
        while True:
            buffer = self.pread(size, offset)
            found = scan(buffer, last_seq, seed=self.header.crc)
            if found.frames or found.fault or len(buffer) < size:
                return buffer, found
            size = max(2 * size, found.needed)

    def is_damage(self, buffer: bytes, found: Scan, offset: int, last_seq: int) -> bool:
        """Whether what `frames` found no frame in had been on disk and is broken now; otherwise it is a torn tail.

        Bytes that were too few are judged by the same read: a writer may have appended to them by now.
        """
        if found.fault:
            buffer = self.pread(self.size() - offset, offset)
        return find_synced(buffer, last_seq, seed=self.header.crc) is not None

    def damage(self, offset: int, last_seq: int, fault: str) -> JournalError:
        """The error for a broken frame at `offset`."""
        why = fault or "the segment ends in the middle of a record"
        return JournalError(f"{self.path} is damaged at byte {offset}, behind record {last_seq}: {why}", remedy=VERIFY)


def decode_failure(segment: Segment, frame_offset: int, error: JournalError) -> JournalError:
    """`error` of `decode_entry` with the place added to it."""
    return JournalError(f"{segment.path}, byte {frame_offset}: {error}", remedy="read it with the watchd that wrote it")
