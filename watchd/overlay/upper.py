"""The upper and the workdir of an overlay, opened to put something in or to take something out behind overlayfs's back.

Facts (fs/overlayfs/super.c; measured)
* Upper and workdir lie on one mount, so one clone of the directory that both are below serves both. rename(2) between two
  clones of one mount is EXDEV.
* overlayfs uses `work` and `index` in the workdir and leaves every other name there alone, also at the next mount. The merged
  view shows nothing of the workdir. So `workdir/watchd` is where things are set aside: on the same filesystem, out of sight,
  and gone with the overlay.
* An overlay keeps the dentries of what it found in the upper: what is renamed there is still what the overlay has, and a rename
  back puts everything where it was.
* A clone inherits the mount's flags; being private, it can be made writable without changing any other mount.

What is set aside is written down first, so that whoever comes after a crash knows what it was: a symlink `<id>.<kind>` whose
target is what was there (`describe`), `/` and the path in the merged mount. Beside it `<id>` is the thing itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import secrets
import stat
from collections.abc import Iterator

import msgspec

from watchd.errors import DeadlineError, LayerError, MountError, RefusedError
from watchd.kernel.files import O_PATH_DIRECTORY, openat2, renameat2, try_openat2
from watchd.kernel.mounts import MOUNT_ATTR_RDONLY, mount_setattr
from watchd.kernel.namespaces import Courier
from watchd.overlay.access import clone_path, in_view, reason_of
from watchd.overlay.build import REPLACED
from watchd.overlay.model import Overlay, ResolvedStack

ASIDE = b"watchd"
TEMPORARY = b".watchd."
"""What our names in a merged mount begin with, for the moment that they are there."""


class Note(msgspec.Struct, frozen=True):
    """What is being done to a path of the merged mount."""

    id: bytes
    kind: str
    path: bytes
    old: bytes = b""
    """What was there before, as `describe` has it."""

    @property
    def temporary(self) -> bytes:
        """The name that it may have beside `path` for a moment."""
        return TEMPORARY + self.id

    @property
    def link(self) -> bytes:
        """The symlink's name."""
        return self.id + b"." + self.kind.encode()


class Upper:
    """The upper and the workdir through one private clone; a context manager."""

    def __init__(self, clone: int, root: int, workdir: int) -> None:
        """Takes over the descriptors of a writable detached mount and of the upper and the workdir on it."""
        self._clone, self.root, self._workdir = clone, root, workdir
        self._aside = -1

    def __enter__(self) -> Upper:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (self._aside, self._workdir, self.root, self._clone):
            if descriptor >= 0:
                os.close(descriptor)

    @property
    def aside(self) -> int:
        """The directory for what is set aside, made when first asked for, and locked: two that evict at once would take each
        other's work for leftovers. Raises OSError, RefusedError."""
        if self._aside < 0:
            with contextlib.suppress(FileExistsError):
                os.mkdir(ASIDE, 0o700, dir_fd=self._workdir)
            self._aside = openat2(self._workdir, ASIDE, flags=os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(self._aside, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._aside)
                self._aside = -1
                raise RefusedError("another watchd is evicting from this mount") from None
        return self._aside

    def forget_aside(self) -> None:
        """Remove the directory again if nothing is in it."""
        if self._aside >= 0:
            with contextlib.suppress(OSError):
                os.rmdir(ASIDE, dir_fd=self._workdir)
            os.close(self._aside)
            self._aside = -1

    def note(self, kind: str, path: bytes, *, old: bytes = b"") -> Note:
        """Write down what is about to be done. Raises OSError."""
        note = Note(secrets.token_hex(8).encode(), kind, path, old)
        os.symlink(old + b"/" + path, note.link, dir_fd=self.aside)
        return note

    def advance(self, note: Note, kind: str) -> Note:
        """The next step begins. Raises OSError."""
        further = msgspec.structs.replace(note, kind=kind)
        os.rename(note.link, further.link, src_dir_fd=self.aside, dst_dir_fd=self.aside)
        return further

    def strike(self, note: Note) -> None:
        """It is done."""
        os.unlink(note.link, dir_fd=self.aside)

    def notes(self) -> list[Note]:
        """What was written down and not struck out, by a predecessor too. Raises OSError."""
        if self._aside < 0 and not _exists(self._workdir, ASIDE):
            return []
        found = []
        for name in self._names_aside():
            ident, _, kind = name.partition(b".")
            if kind:
                with contextlib.suppress(OSError):  # not one of ours, or struck out just now
                    old, _, path = os.readlink(name, dir_fd=self.aside).partition(b"/")
                    found.append(Note(ident, kind.decode("ascii", "replace"), path, old))
        return found

    def serves_a_replaced_mount(self) -> bool:
        """Whether a mount that another one took the place of may still be in use, with this upper. Raises OSError."""
        workdir = openat2(self._workdir, b".", flags=os.O_RDONLY | os.O_DIRECTORY)
        try:
            return any(os.fsencode(name).startswith(REPLACED) for name in os.listdir(workdir))
        finally:
            os.close(workdir)

    def _names_aside(self) -> list[bytes]:
        return sorted(os.fsencode(name) for name in os.listdir(self.aside))

    @contextlib.contextmanager
    def directory(self, path: bytes) -> Iterator[int]:
        """A directory of the upper (O_PATH). Raises OSError."""
        descriptor = openat2(self.root, path or b".", flags=O_PATH_DIRECTORY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def first_missing(self, path: bytes) -> bytes | None:
        """The topmost of the directories on the way to and at `path` that the upper lacks; None if it has them all."""
        names = path.split(b"/") if path else []
        for depth in range(1, len(names) + 1):
            part = b"/".join(names[:depth])
            descriptor = try_openat2(self.root, part, flags=O_PATH_DIRECTORY)
            if descriptor < 0:
                return part
            os.close(descriptor)
        return None

    def status(self, path: bytes) -> os.stat_result | None:
        """What the upper has at `path`; None if nothing."""
        descriptor = try_openat2(self.root, path)
        if descriptor < 0:
            return None
        try:
            return os.stat(descriptor)
        finally:
            os.close(descriptor)

    def is_aside(self, note: Note) -> bool:
        """Whether something is set aside under this note."""
        return _exists(self.aside, note.id)

    def inode_aside(self, note: Note) -> int:
        """The inode number of what is set aside. Raises OSError."""
        return os.stat(note.id, dir_fd=self.aside, follow_symlinks=False).st_ino

    def set_aside(self, note: Note, *, inode: int) -> bool:
        """Take what the upper has at the note's path away if it is `inode`; whether it was. Raises OSError."""
        parent, _, name = note.path.rpartition(b"/")
        found = self.status(note.path)
        if found is None or found.st_ino != inode:
            return False
        with self.directory(parent) as directory:
            renameat2(directory, name, self.aside, note.id)
            if self.inode_aside(note) == inode:
                return True
            renameat2(self.aside, note.id, directory, name)  # somebody put his own there between the two looks
        return False

    def put_back(self, note: Note) -> bool:
        """Where it was; false if something else is there by now, or its directory is not. Raises OSError."""
        parent, _, name = note.path.rpartition(b"/")
        try:
            with self.directory(parent) as directory:
                renameat2(self.aside, note.id, directory, name)
        except (FileExistsError, FileNotFoundError):
            return False
        return True

    def delete_aside(self, note: Note) -> None:
        """Delete what was set aside, a tree of directories too. Raises OSError."""
        status = os.stat(note.id, dir_fd=self.aside, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            remove_directories(self.aside, note.id)
        else:
            os.unlink(note.id, dir_fd=self.aside)


def describe(status: os.stat_result) -> bytes:
    """What a copy-up preserves of an object: enough to tell it from what somebody else put in its place."""
    facts = (status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns)
    return b".".join(b"%d" % fact for fact in facts)


def holds_only_directories(parent: int, name: bytes) -> bool:
    """Whether there is nothing but directories below a directory. Raises OSError."""
    with _listed(parent, name) as (directory, names):
        return all(
            stat.S_ISDIR(os.stat(below, dir_fd=directory, follow_symlinks=False).st_mode)
            and holds_only_directories(directory, below)
            for below in names
        )


def directories_below(parent: int, name: bytes) -> list[bytes]:
    """A directory and those below it, relative to `parent`, the topmost first. Raises OSError."""
    with _listed(parent, name) as (directory, names):
        return [name, *(name + b"/" + path for below in names for path in directories_below(directory, below))]


def remove_directories(parent: int, name: bytes) -> None:
    """rmdir from the leaves up. Raises OSError (ENOTEMPTY: there is something else in them)."""
    with _listed(parent, name) as (directory, names):
        for below in names:
            remove_directories(directory, below)
    os.rmdir(name, dir_fd=parent)


@contextlib.contextmanager
def _listed(parent: int, name: bytes) -> Iterator[tuple[int, list[bytes]]]:
    directory = openat2(parent, name, flags=os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield directory, [os.fsencode(below) for below in os.listdir(directory)]
    finally:
        os.close(directory)


def _exists(directory: int, name: bytes) -> bool:
    descriptor = try_openat2(directory, name)
    if descriptor >= 0:
        os.close(descriptor)
    return descriptor >= 0


def open_upper(overlay: Overlay, stack: ResolvedStack, courier: Courier) -> Upper:
    """The upper and the workdir of an overlay. Raises LayerError if they cannot be had or are no longer those."""
    upper = stack.upper
    if upper is None or overlay.upperdir is None or overlay.workdir is None:
        raise LayerError("the overlay has no upper")
    shown = os.fsdecode(upper.path)
    if upper.error:
        raise LayerError(f"{shown}: {upper.error}")
    base = upper.path.removesuffix(overlay.upperdir)  # where relative layer paths begin; empty for absolute ones
    workdir = os.path.join(base, overlay.workdir)
    common = os.path.commonpath([upper.path, workdir])
    try:
        clone = in_view(upper.view, functools.partial(clone_path, common), courier=courier, discard=os.close)
        return _open_below(clone, os.path.relpath(upper.path, common), os.path.relpath(workdir, common), upper.inode)
    except OSError as error:
        raise LayerError(f"{shown}: cannot get hold of upper and workdir: {reason_of(error)}") from error
    except (MountError, DeadlineError) as error:
        raise LayerError(f"{shown}: {error}") from error


def _open_below(clone: int, upperdir: bytes, workdir: bytes, inode: int) -> Upper:
    with contextlib.ExitStack() as opened:
        opened.callback(os.close, clone)
        mount_setattr(clone, attr_clr=MOUNT_ATTR_RDONLY)
        upper = openat2(clone, upperdir, flags=O_PATH_DIRECTORY)
        opened.callback(os.close, upper)
        if os.stat(upper).st_ino != inode:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        work = openat2(clone, workdir, flags=O_PATH_DIRECTORY)
        opened.pop_all()
        return Upper(clone, upper, work)
