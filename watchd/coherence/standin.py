"""Put a copy in the place of a stale name for the moment in which the merged mount forgets it; see `watchd.coherence.evict`.

Facts (measured)
* rename through the merged mount wants the upper to have under the new name what the overlay thinks that it has (ESTALE
  otherwise). So before another copy takes the place of one that is aside, that one is linked there, and stays aside. Where the
  overlay thinks that the upper has nothing, for it was dropped and what was looked up then is stale again, copying that up
  says EEXIST, and it has to be without.
* A lookup while all copies are aside finds the lower's.
"""

from __future__ import annotations

import contextlib
import os

from watchd.coherence.husk import provide_directory
from watchd.coherence.invalidate import invalidate
from watchd.coherence.occupant import Occupant, clear_temporary, merged_directory, unlink_temporary
from watchd.coherence.view import View
from watchd.errors import RefusedError
from watchd.kernel.files import renameat2
from watchd.overlay.marks import Marks
from watchd.overlay.replica import Replica, disown, is_replica, is_untouched, make_replica
from watchd.overlay.upper import Note, Upper

COPIES = 12
DROPS = 4
"""So often a copy is dropped before another one takes its place: readers of small files leave it soon, readers of large ones
seldom come to a new copy in the moment that it is there."""

READ_ALL_THE_TIME = "somebody reads it all the time; a copy of it stands in the upper until that is over"


class StandIn:
    """Copies that stand in for one name; a context manager that lets go of them."""

    def __init__(self, view: View, upper: Upper, path: bytes) -> None:
        self._view, self._upper, self._path = view, upper, path
        self._parent, _, self._name = path.rpartition(b"/")
        self._shown: list[tuple[Note, Replica]] = []
        """Those that stood under the name, all of them aside; the merged mount has the last one still."""

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        for _note, replica in self._shown:
            replica.close()

    def replace(self) -> None:
        """Have the merged mount forget what it has under the name and look it up anew. Raises RefusedError, OSError."""
        self._take_turns()

    def resume(self, note: Note) -> None:
        """Go on where an eviction was interrupted. Raises RefusedError (the copy has to stay for now), OSError."""
        upper = self._upper
        with contextlib.suppress(FileNotFoundError):  # without its directory there is no place to go back to
            self._take_aside(note)
        if not upper.is_aside(note):
            upper.strike(note)
            return
        try:
            self._shown.append((note, Replica(upper.aside, note.id)))
        except BlockingIOError:  # somebody writes to it
            self._give_away(note)
            return
        self._take_turns()

    def _take_aside(self, note: Note) -> None:
        """Whatever step it was interrupted at, see to it that only a copy that was shown is aside."""
        upper = self._upper
        if note.kind == "copy" and upper.is_aside(note):
            upper.delete_aside(note)
        clear_temporary(self._view, upper, note)
        with upper.directory(self._parent) as directory:
            status = upper.status(self._path)
            if status is None:
                return
            if upper.is_aside(note):
                if upper.inode_aside(note) != status.st_ino:
                    return
                upper.delete_aside(note)  # it was linked to its place
            if is_untouched(directory, self._name):
                upper.set_aside(note, inode=status.st_ino)
            elif is_replica(directory, self._name):
                disown(directory, self._name)

    def _take_turns(self) -> None:
        try:
            for _ in range(COPIES):
                if (self._shown and self._settle()) or not self._show_another():
                    return
            if self._settle():
                return
        except BaseException:
            self._leave_last()
            raise
        self._leave_last()
        raise RefusedError(READ_ALL_THE_TIME)

    def _settle(self) -> bool:
        """Whether the merged mount has forgotten the copies, which are deleted then, or one of them was given away."""
        for _ in range(DROPS):
            self._drop()
            in_use = self._is_in_use()  # first: what is not in use cannot be changed any more
            for note, replica in self._shown:
                if replica.writer_waits() or not is_untouched(self._upper.aside, note.id):
                    self._forget(keep=note)
                    self._give_away(note)
                    return True
            if not in_use:
                self._forget()
                return True
        return False

    def _show_another(self) -> bool:
        """Put another copy under the name and take it out of the upper; false if somebody was quicker, and it is his."""
        try:
            with Occupant(self._view, self._upper, self._path) as occupant:
                note = self._upper.note("copy", self._path, old=occupant.old)
                replica = self._make(note)
                try:
                    provide_directory(self._view, self._upper, self._parent)
                    shown = self._exchange(note, occupant)
                    if shown is not None and self._upper.set_aside(shown, inode=replica.inode):
                        self._shown.append((shown, replica))
                        unlink_temporary(self._view, self._upper, shown)
                        return True
                    replica.disown()
                except BaseException:
                    replica.close()
                    self._discard(note)
                    raise
                replica.close()
                if shown is not None:
                    unlink_temporary(self._view, self._upper, shown)
                    self._upper.strike(shown)
        except FileNotFoundError:  # unlinked by somebody
            pass
        self._forget()
        self._drop()
        return False

    def _discard(self, note: Note) -> None:
        """Delete a copy that was not shown."""
        with contextlib.suppress(FileNotFoundError):
            self._upper.delete_aside(note)
            self._upper.strike(note)

    def _make(self, note: Note) -> Replica:
        source: int | None = None
        try:
            source = self._view.union.open(self._path)
            if source is None:
                raise RefusedError("it went meanwhile")
            limit_bytes = self._view.target.evict_limit_bytes
            private = Marks(userxattr=self._view.target.userxattr).prefix
            return make_replica(source, self._upper.aside, note.id, limit_bytes=limit_bytes, private=private)
        except BaseException:
            self._upper.strike(note)
            raise
        finally:
            if source is not None:
                os.close(source)

    def _exchange(self, note: Note, occupant: Occupant) -> Note | None:
        """By way of a temporary name, which what was there has then; None if that is somebody else's. Raises OSError."""
        upper = self._upper
        with merged_directory(self._view, self._parent) as merged, upper.directory(self._parent) as directory:
            renameat2(upper.aside, note.id, directory, note.temporary)
            note = upper.advance(note, "shown")
            try:
                if self._exchange_in(merged, directory, note, occupant):
                    return note
            except BaseException:
                self._take_back(directory, note)
                raise
            self._take_back(directory, note)
        return None

    def _exchange_in(self, merged: int, directory: int, note: Note, occupant: Occupant) -> bool:
        if not self._shown:
            return occupant.exchange(merged, note, self._name)
        os.link(self._shown[-1][0].id, self._name, src_dir_fd=self._upper.aside, dst_dir_fd=directory)
        try:
            return occupant.exchange(merged, note, self._name)
        except FileExistsError:  # somebody holds what the lower had meanwhile
            self._unlink(directory)
        return occupant.exchange(merged, note, self._name)

    def _take_back(self, directory: int, note: Note) -> None:
        unlink_temporary(self._view, self._upper, note)
        self._upper.strike(note)
        self._unlink(directory)

    def _unlink(self, directory: int) -> None:
        """Take away the link of the last copy."""
        if self._shown:
            status = self._upper.status(self._path)
            if status is not None and status.st_ino == self._shown[-1][1].inode:
                os.unlink(self._name, dir_fd=directory)

    def _leave_last(self) -> None:
        """The merged mount goes on with the last copy, so the upper does too."""
        if self._shown:
            note, replica = self._shown[-1]
            self._forget(keep=note)
            if not self._upper.put_back(note):
                self._give_away(note)
            replica.close()

    def _give_away(self, note: Note) -> None:
        """Somebody writes to a copy: it is a file of the upper now."""
        disown(self._upper.aside, note.id)
        if not self._upper.put_back(note):  # another one came in its place, and whoever has this one open has it still
            self._upper.delete_aside(note)
        self._upper.strike(note)
        self._drop()

    def _forget(self, *, keep: Note | None = None) -> None:
        for note, _replica in self._shown:
            if note != keep:
                self._upper.delete_aside(note)
                self._upper.strike(note)

    def _is_in_use(self) -> bool:
        """Whether the merged mount still has a copy under the name, or something else that is not the lower's."""
        return any(stale.kind != "missing" for stale in self._view.stale({self._path: 0}, acted=True))

    def _drop(self) -> None:
        invalidate(self._view.merged, read_only=False)
