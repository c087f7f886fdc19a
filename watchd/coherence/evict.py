"""Heal names that somebody holds, in place: make the merged mount forget what it has under them.

Facts (measured; held by tests)
* Two names that are exchanged exchange their dentries; there is no moment in which a lookup fails. So a copy of what the lower
  has now changes places with what is stale, which is unlinked (it stays with those who use it). The copy is taken out of the
  upper, and its dentry, which hardly anybody uses, is dropped by an invalidation. What is looked up then is the lower's.
* Whoever opens the name in the moment between uses the copy. Readers see the same content; while they do, the dentry cannot be
  dropped, so this is tried again, at last with another copy. Writers are held back by a lease (`watchd.overlay.replica`); when
  one waits, or something else was done to the copy, it is put back where it was and is a file of the upper from then on, which
  is what became of it without us.
* A file can be put in the upper behind overlayfs's back, under a name that was never looked up. It has all of its attributes
  before anybody can see it, and the copy carries no xattr of overlay's.
* Exchanging copies the directory up if only a lower has it. That directory must stay in the upper for as long as the merged one
  is in use: without it the merged directory lists nothing and refuses new names. As what is held lies in it, it always is; such
  a husk is taken away later, by `tidy`. Meanwhile it hides later changes of mode, owner and times of the lower one.
* What stays is the xattr trusted.overlay.impure on the directory, which says that numbers of inodes in it need a second look,
  and the directory's new mtime.
* What is left of a name that went is moved away and unlinked. So is a file that became a directory; there the whiteout is
  removed, and the name is absent until then.
* An overlay keeps one inode for each inode of the lower (of one link), which holds the stale attributes; who looks the name up
  again gets the same one. So stale permissions of a file that is held cannot be evicted. Those of a directory, and a listing
  that somebody holds, are renewed by a name that comes and goes in it.
* A directory that is held cannot be replaced: rmdir says ENOENT or ENOTEMPTY, rename EISDIR.

What is under way is written down in `workdir/watchd` (`watchd.overlay.upper`), so `tidy` ends or takes back what a crash left.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence

from watchd.coherence.husk import drop_idle, provide_directory, settle_husks
from watchd.coherence.invalidate import invalidate
from watchd.coherence.occupant import Occupant, clear_temporary, merged_directory, unlink_temporary
from watchd.coherence.standin import StandIn
from watchd.coherence.target import Target
from watchd.coherence.targets import is_on
from watchd.coherence.view import Stale, View
from watchd.errors import LayerError, MountError, RefusedError
from watchd.kernel.mounts import MOUNT_ATTR_RDONLY, mount_setattr
from watchd.overlay.marks import is_whiteout
from watchd.overlay.upper import Note, Upper

_UNSUPPORTED = ("index", "nfs_export")


def evict(view: View, stale: Sequence[Stale]) -> dict[bytes, str]:
    """Heal these names in place; returns those that could not be healed, each with the reason in a sentence.

    Ends with the invalidation that it needs. Raises MountError, LayerError, OSError if nothing could be tried.
    """
    refusal = _refusal(view.target)
    if refusal:
        return {entry.path: refusal for entry in stale}
    with _open(view) as upper:
        eviction = _Eviction(view, upper)
        try:
            _tidy(view, upper)
            return eviction.heal(stale)
        finally:
            upper.forget_aside()


def tidy(view: View, *, drop: bool = False) -> dict[bytes, str]:
    """End or take back what an earlier eviction left, and take away what is no longer in use.

    `drop`: what is cached only because somebody looked there is not in use; telling that takes an invalidation.
    Returns what has to stay for now, with the reason. Costs a few system calls when there is nothing. Raises MountError,
    LayerError, OSError.
    """
    if view.target.open_upper is None or view.target.read_only:
        return {}
    with _open(view) as upper:
        try:
            if drop:
                drop_idle(view, upper)
            return _tidy(view, upper)
        finally:
            upper.forget_aside()


def _refusal(target: Target) -> str:
    """Why nothing of a mount can be evicted; empty if it can."""
    if target.open_upper is None:
        return "the overlay has no upper"
    if target.read_only:
        return "the overlay is read-only"
    for option in _UNSUPPORTED:
        if target.overlay is not None and is_on(option, target.overlay):
            return f"with {option}=on a copy leaves traces in the index"
    return ""


def _open(view: View) -> Upper:
    if view.target.open_upper is None:
        raise LayerError("the overlay has no upper")
    try:
        mount_setattr(view.merged, attr_clr=MOUNT_ATTR_RDONLY)
    except OSError as error:
        raise MountError(f"cannot write to the mount: {error.strerror}") from None
    return view.target.open_upper()


def _tidy(view: View, upper: Upper) -> dict[bytes, str]:
    stays: dict[bytes, str] = {}
    for note in upper.notes():
        try:
            _finish(view, upper, note)
        except RefusedError as error:
            stays[note.path] = str(error)
        except OSError as error:
            stays[note.path] = f"what an eviction left cannot be taken back: {os.strerror(error.errno or 0)}"
    return stays | settle_husks(view, upper)


def _finish(view: View, upper: Upper, note: Note) -> None:
    if note.kind in ("copy", "shown"):
        with StandIn(view, upper, note.path) as stand_in:
            stand_in.resume(note)
    elif note.kind == "gone":
        _finish_removal(view, upper, note)
    elif note.kind == "touch":
        _untouch(view, upper, note)


class _Eviction:
    """One pass over what is stale."""

    def __init__(self, view: View, upper: Upper) -> None:
        self._view, self._upper = view, upper

    def heal(self, stale: Sequence[Stale]) -> dict[bytes, str]:
        """Try each; returns the reasons why not. Raises MountError."""
        reasons = {}
        invalidate(self._view.merged, read_only=False)  # little is cached then, so that those to come are quick
        for entry in stale:
            try:
                self._heal(entry)
            except RefusedError as error:
                reasons[entry.path] = str(error)
            except OSError as error:
                reasons[entry.path] = f"it could not be evicted: {os.strerror(error.errno or 0)}"
        invalidate(self._view.merged, read_only=False)
        settle_husks(self._view, self._upper)
        return reasons

    def _heal(self, entry: Stale) -> None:
        path, view = entry.path, self._view
        mode = view.cached_mode(path)
        if mode is None:
            return  # nobody holds it any more, or it is missing, which nobody can hold
        if entry.kind not in ("replaced", "ghost", "permission", "listing"):
            raise RefusedError("evicting is no remedy for it")
        if entry.kind == "listing" or (entry.kind == "permission" and stat.S_ISDIR(mode)):
            _renew_directory(view, self._upper, path)
            return
        if stat.S_ISDIR(mode):
            raise RefusedError("a directory that is in use cannot be replaced in place")
        expected = view.union.lookup(path)
        if expected is None or expected.is_dir:
            _remove(view, self._upper, path)
            return
        if entry.kind == "permission" and self._is_single(path):
            raise RefusedError("whoever holds the file holds its old permissions for all")
        with StandIn(view, self._upper, path) as stand_in:
            stand_in.replace()

    def _is_single(self, path: bytes) -> bool:
        """Whether a file has one link, so that the overlay has one inode for it however it is looked up."""
        real = self._view.union.open(path)
        if real is None:
            return False
        try:
            return os.stat(real).st_nlink == 1
        finally:
            os.close(real)


def _remove(view: View, upper: Upper, path: bytes) -> None:
    """Take what somebody holds away from a name that no file of a lower has. Raises RefusedError, OSError."""
    parent, _, name = path.rpartition(b"/")
    provide_directory(view, upper, parent)
    with Occupant(view, upper, path) as occupant, merged_directory(view, parent) as merged:
        note = upper.note("gone", path, old=occupant.old)
        if occupant.move_away(merged, note, name):
            unlink_temporary(view, upper, note)
    _finish_removal(view, upper, note)


def _finish_removal(view: View, upper: Upper, note: Note) -> None:
    """Take away what was moved away, and the whiteout that it left; whatever else is there stays."""
    with contextlib.suppress(FileNotFoundError):
        clear_temporary(view, upper, note)
    status = upper.status(note.path)
    if upper.is_aside(note) or (
        status is not None and is_whiteout(status) and upper.set_aside(note, inode=status.st_ino)
    ):
        upper.delete_aside(note)
    upper.strike(note)
    invalidate(view.merged, read_only=False)


def _renew_directory(view: View, upper: Upper, path: bytes) -> None:
    """Have a name come and go in a merged directory, so that its listing and attributes are read anew. Raises OSError."""
    provide_directory(view, upper, path)
    note = upper.note("touch", path + b"/." if path else b".")
    try:
        with merged_directory(view, path) as merged:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            os.close(os.open(note.temporary, flags, 0o600, dir_fd=merged))
    finally:
        _untouch(view, upper, note)


def _untouch(view: View, upper: Upper, note: Note) -> None:
    unlink_temporary(view, upper, note)
    upper.strike(note)
