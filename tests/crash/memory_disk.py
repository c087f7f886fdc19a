"""A disk in memory that fails or loses power at any operation, and what may be left of it then.

It keeps apart, as filesystems do, what programs see and what is on the platter, and of both the data of files and their
names. A write or a name is pending until the file, or its directory, is synced; when the power goes, any part of what is
pending may be there (`Loss`). What was synced stays. A sync that fails loses what it was to write, though it reads well
and the next sync succeeds.
"""

from __future__ import annotations

import enum
import errno
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

SECTOR_BYTES = 512
READING = frozenset({"pread", "size", "is_at", "names"})


class PowerCutError(BaseException):
    """No program can catch this; every later operation raises it too."""


class Loss(enum.Enum):
    """What a power cut leaves of what was not synced."""

    DROP = "nothing"
    APPLY = "everything"
    REORDER = "any part, in sectors and names"
    TEAR = "all before the last write, and that cut at any byte, with nothing, zeros or garbage behind"


@dataclass(frozen=True)
class Write:
    offset: int
    data: bytes

    def apply(self, content: bytearray) -> None:
        content.extend(bytes(max(self.offset - len(content), 0)))
        content[self.offset : self.offset + len(self.data)] = self.data

    def sectors(self) -> list[Write]:
        """It in parts, each within one sector."""
        ends = [*range((self.offset // SECTOR_BYTES + 1) * SECTOR_BYTES, self.end, SECTOR_BYTES), self.end]
        starts = [self.offset, *ends[:-1]]
        pairs = zip(starts, ends, strict=True)
        return [Write(start, self.data[start - self.offset : end - self.offset]) for start, end in pairs]

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


@dataclass(frozen=True)
class Cut:
    """A truncation."""

    size: int

    def apply(self, content: bytearray) -> None:
        del content[self.size :]


@dataclass(eq=False)
class Inode:
    """A file, or a directory, of which only the existence counts."""

    seen: bytearray = field(default_factory=bytearray)
    """What programs read."""
    kept: bytearray = field(default_factory=bytearray)
    """What is on the platter."""
    pending: list[Write | Cut] = field(default_factory=list)
    holder: MemoryFile | None = None
    """Who has the lock."""

    def do(self, operation: Write | Cut) -> None:
        operation.apply(self.seen)
        self.pending.append(operation)

    def sync(self) -> None:
        for operation in self.pending:
            operation.apply(self.kept)
        self.pending.clear()

    def fail_to_sync(self, chance: random.Random) -> None:
        """Some of it may be on the platter; none of it will be tried again. What is lost is read until it is evicted.

        A truncation is the filesystem's own business: it is lost only together with the whole filesystem.
        """
        self.kept = self.left(Loss.REORDER, chance, cuts_survive=True)
        self.pending.clear()
        if chance.random() < 0.3:
            self.seen = self.kept + bytes(max(len(self.seen) - len(self.kept), 0))

    def left(self, loss: Loss, chance: random.Random, *, cuts_survive: bool = False) -> bytearray:
        """The content after a power cut."""
        content, pending = bytearray(self.kept), self.pending
        if loss is Loss.REORDER:
            parts = [part for op in pending for part in (op.sectors() if isinstance(op, Write) else [op])]
            pending = [part for part in parts if chance.random() < 0.5 or (cuts_survive and isinstance(part, Cut))]
        elif loss is Loss.TEAR and pending and isinstance(last := pending[-1], Write):
            pending = [*pending[:-1], *_torn(last, len(self.kept), chance)]
        if loss is not Loss.DROP:
            for operation in pending:
                operation.apply(content)
        return content


def _torn(write: Write, kept: int, chance: random.Random) -> list[Write]:
    """What is left of a write; there may be garbage only where nothing had been kept before."""
    cut = chance.randrange(len(write.data))
    parts = [Write(write.offset, write.data[:cut])]
    behind = max(write.offset + cut, kept)
    if behind < write.end and (fill := chance.choice(["nothing", "zeros", "garbage"])) != "nothing":
        size = chance.randint(1, write.end - behind)
        parts.append(Write(behind, bytes(size) if fill == "zeros" else chance.randbytes(size)))
    return parts


@dataclass(frozen=True)
class Rename:
    """A name that comes, goes (`new` is None) or becomes another one (both)."""

    old: Path | None
    new: Path | None
    inode: Inode

    def apply(self, names: dict[Path, Inode]) -> None:
        if self.old is not None and names.get(self.old) is self.inode:
            del names[self.old]
        if self.new is not None:
            names[self.new] = self.inode

    @property
    def directory(self) -> Path:
        path = self.new or self.old
        assert path
        return path.parent


class MemoryDisk:
    """See `watchd.journal.disk.Disk`. `operations` names all that was done so far."""

    def __init__(self, root: Path) -> None:
        """`root` is a directory that is there."""
        self.operations: list[str] = []
        self.cut_at: int | None = None
        """The power goes in the midst of the operation with this number."""
        self.errors: dict[int, int] = {}
        """The operation with this number fails with this errno; 0: a write that is cut short."""
        self.room: int | None = None
        """Files can grow by so many bytes; None: there is no end."""
        self.on_cut: Callable[[], None] = lambda: None
        self.is_dead = False
        self.chance = random.Random(0)
        self.root = root
        self._seen: dict[Path, Inode] = {}
        self._kept: dict[Path, Inode] = {}
        self._pending: list[Rename] = []

    # ---- what the tests do with it ----------------------------------------------------------------------------------

    def after_power_cut(self, loss: Loss, seed: int) -> MemoryDisk:
        """What another machine finds on the platter."""
        chance = random.Random(seed)
        names = dict(self._kept)
        if loss is not Loss.DROP:
            for rename in self._pending:
                if loss is not Loss.REORDER or chance.random() < 0.5:
                    rename.apply(names)
        disk = MemoryDisk(self.root)
        for path, inode in names.items():
            if path.parent in (self.root, *names):
                content = inode.left(loss, chance)
                disk._kept[path] = disk._seen[path] = Inode(bytearray(content), content)
        return disk

    def after_kill(self) -> MemoryDisk:
        """What the next process on the same machine finds; it goes on with this very disk."""
        disk = MemoryDisk(self.root)
        disk._seen, disk._kept, disk._pending = self._seen, self._kept, self._pending
        for inode in self._seen.values():
            inode.holder = None
        return disk

    def files(self, directory: Path) -> dict[str, bytes]:
        """What a program would read, by name."""
        return {path.name: bytes(inode.seen) for path, inode in self._seen.items() if path.parent == directory}

    def step(self, operation: str) -> tuple[bool, int | None]:
        """Counts an operation; returns whether the power goes in its midst and which error it has."""
        if self.is_dead:
            raise PowerCutError
        number = len(self.operations)
        self.operations.append(operation)
        return number == self.cut_at, self.errors.get(number)

    def take_room(self, count: int) -> None:
        """Raises ENOSPC where a file grows too much."""
        if self.room is not None and count > 0:
            if count > self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= count

    def die(self) -> None:
        """The power goes."""
        self.is_dead = True
        self.on_cut()
        raise PowerCutError

    def simple_step(self, operation: str) -> None:
        """An operation that is done or not."""
        is_cut, error = self.step(operation)
        if is_cut:
            self.die()
        if error is not None:
            raise OSError(error or errno.EIO, os.strerror(error or errno.EIO))

    def _name(self, rename: Rename) -> None:
        """Names come and go at once and are kept later; a power cut in the midst finds them pending."""
        is_cut, error = self.step("name")
        if error is not None:
            raise OSError(error or errno.EIO, os.strerror(error or errno.EIO))
        rename.apply(self._seen)
        self._pending.append(rename)
        if is_cut:
            self.die()

    # ---- what the journal does with it ------------------------------------------------------------------------------

    def open(self, path: Path, flags: int) -> MemoryFile:
        inode = self._seen.get(path)
        if inode is not None and flags & os.O_CREAT and flags & os.O_EXCL:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if inode is None:
            if not flags & os.O_CREAT or not self._is_directory(path.parent):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            inode = Inode()
            self._name(Rename(None, path, inode))
        else:
            self.simple_step("open")
        if flags & os.O_TRUNC:
            inode.do(Cut(0))
        return MemoryFile(self, inode)

    def names(self, directory: Path) -> list[str]:
        self.simple_step("names")
        if not self._is_directory(directory):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return [path.name for path in self._seen if path.parent == directory]

    def rename(self, old: Path, new: Path) -> None:
        self._name(Rename(old, new, self._seen[old]))

    def unlink(self, path: Path) -> None:
        if path not in self._seen:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        self._name(Rename(path, None, self._seen[path]))

    def make_directory(self, path: Path) -> None:
        if path not in self._seen:
            self._name(Rename(None, path, Inode()))

    def sync_directory(self, path: Path) -> None:
        self.simple_step("sync_directory")
        for rename in self._pending:
            if rename.directory == path:
                rename.apply(self._kept)
        self._pending = [rename for rename in self._pending if rename.directory != path]

    def is_at(self, path: Path, inode: Inode) -> bool:
        return self._seen.get(path) is inode

    def _is_directory(self, path: Path) -> bool:
        return path == self.root or path in self._seen


class MemoryFile:
    """See `watchd.journal.disk.File`."""

    def __init__(self, disk: MemoryDisk, inode: Inode) -> None:
        self._disk, self._inode = disk, inode

    def pread(self, size: int, offset: int) -> bytes:
        self._disk.simple_step("pread")
        return bytes(self._inode.seen[offset : offset + size])

    def pwrite(self, data: bytes | memoryview, offset: int) -> int:
        is_cut, error = self._disk.step("pwrite")
        if error:
            raise OSError(error, os.strerror(error))
        if error == 0 and len(data) > 1:
            data = data[: self._disk.chance.randrange(1, len(data))]
        self._disk.take_room(offset + len(data) - len(self._inode.seen))
        self._inode.do(Write(offset, bytes(data)))
        if is_cut:
            self._disk.die()
        return len(data)

    def size(self) -> int:
        self._disk.simple_step("size")
        return len(self._inode.seen)

    def is_at(self, path: Path) -> bool:
        self._disk.simple_step("is_at")
        return self._disk.is_at(path, self._inode)

    def truncate(self, size: int) -> None:
        is_cut, error = self._disk.step("truncate")
        if error is not None:
            raise OSError(error or errno.EIO, os.strerror(error or errno.EIO))
        self._inode.do(Cut(size))
        if is_cut:
            self._disk.die()

    def sync(self) -> None:
        is_cut, error = self._disk.step("sync")
        if is_cut:
            self._disk.die()
        if error is not None:
            self._inode.fail_to_sync(self._disk.chance)
            raise OSError(error or errno.EIO, os.strerror(error or errno.EIO))
        self._inode.sync()

    def lock(self) -> None:
        if self._inode.holder is not None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self._disk.simple_step("lock")
        self._inode.holder = self

    def close(self) -> None:
        if self._inode.holder is self:
            self._inode.holder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
