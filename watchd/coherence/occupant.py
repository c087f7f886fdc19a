"""Take what the merged mount has under a name away from there, and nothing else.

Facts (measured)
* Between a look at a name and a rename or unlink of it somebody may put his own file there, which would be lost. Exchanging
  (or moving away) keeps both: what is not the object that was looked at is put back.
* An object of the lower that is moved is copied up within the same system call, so not even being killed leaves it in the upper
  under its name. Once it is copied up, what its holders do to it (fchmod copies up) no longer hits the name that it had.
* Where it was moved to no layer below has a name, so unlinking it there leaves no whiteout. Where it was there is one only if
  a lower has the name.
* Two descriptors of one object of an overlay have the same inode number, whatever has become of it meanwhile.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from watchd.coherence.view import View
from watchd.errors import RefusedError
from watchd.kernel.files import O_PATH_DIRECTORY, RENAME_EXCHANGE, RENAME_NOREPLACE, openat2, renameat2
from watchd.overlay.replica import is_replica
from watchd.overlay.upper import Note, Upper, describe


@contextlib.contextmanager
def merged_directory(view: View, path: bytes) -> Iterator[int]:
    """A directory of the merged mount (O_PATH). Raises OSError."""
    descriptor = openat2(view.merged, path or b".", flags=O_PATH_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class Occupant:
    """What the merged mount has under a name, of which the upper has nothing; a context manager."""

    def __init__(self, view: View, upper: Upper, path: bytes) -> None:
        """Raises RefusedError if it is the upper's or too large to be copied up; FileNotFoundError."""
        self._descriptor = openat2(view.merged, path)
        self.status = os.stat(self._descriptor)
        reason = ""
        if upper.status(path) is not None:
            reason = "the upper provides it, so there is nothing of a lower to return to"
        elif self.status.st_size > view.target.evict_limit_bytes:
            limit = view.target.evict_limit_bytes
            reason = (
                f"the old one's {self.status.st_size} bytes are more than the limit of {limit} (coherence.evict_limit)"
            )
        if reason:
            os.close(self._descriptor)
            raise RefusedError(reason)

    def __enter__(self) -> Occupant:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    @property
    def old(self) -> bytes:
        """What to write down of it."""
        return describe(self.status)

    def is_at(self, directory: int, name: bytes) -> bool:
        """Whether it is what the merged mount has there now."""
        return os.path.samestat(os.stat(name, dir_fd=directory, follow_symlinks=False), os.stat(self._descriptor))

    def exchange(self, directory: int, note: Note, name: bytes) -> bool:
        """Put what is at the note's temporary name of a merged directory in its place; whether it was there still.

        In either case it is not under its name afterwards, and the temporary name is gone if it was. Raises OSError.
        """
        renameat2(directory, note.temporary, directory, name, flags=RENAME_EXCHANGE)
        if self.is_at(directory, note.temporary):
            return True
        renameat2(directory, note.temporary, directory, name, flags=RENAME_EXCHANGE)
        return False

    def move_away(self, directory: int, note: Note, name: bytes) -> bool:
        """Move it to the note's temporary name; whether it was there still. Raises OSError."""
        renameat2(directory, name, directory, note.temporary, flags=RENAME_NOREPLACE)
        if self.is_at(directory, note.temporary):
            return True
        with contextlib.suppress(FileExistsError):
            renameat2(directory, note.temporary, directory, name, flags=RENAME_NOREPLACE)
        return False


def clear_temporary(view: View, upper: Upper, note: Note) -> None:
    """Unlink what is left at the note's temporary name, but put back what was somebody else's. Raises OSError."""
    parent, _, name = note.path.rpartition(b"/")
    with upper.directory(parent) as directory, contextlib.suppress(FileNotFoundError):
        found = os.stat(note.temporary, dir_fd=directory, follow_symlinks=False)
        if describe(found) != note.old and not is_replica(directory, note.temporary):
            with contextlib.suppress(FileNotFoundError):
                flags = RENAME_EXCHANGE if is_replica(directory, name) else RENAME_NOREPLACE
                renameat2(directory, note.temporary, directory, name, flags=flags)
        unlink_temporary(view, upper, note)


def unlink_temporary(view: View, upper: Upper, note: Note) -> None:
    """Unlink the note's temporary name through the merged mount, so that it knows; else in the upper."""
    parent = note.path.rpartition(b"/")[0]
    with contextlib.suppress(OSError), merged_directory(view, parent) as merged:
        os.unlink(note.temporary, dir_fd=merged)
        return
    with contextlib.suppress(FileNotFoundError), upper.directory(parent) as directory:
        os.unlink(note.temporary, dir_fd=directory)
