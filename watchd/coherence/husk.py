"""Upper directories that exist because something was evicted in them; see `watchd.coherence.evict`.

Facts (measured)
* chown(-1, -1) of a merged directory changes nothing but ctime and has it copied up, with all directories above.
* While a merged directory is cached it refers to its upper directory. If that is gone it lists nothing, without an error, and
  creating in it says ENOENT; if it was only moved aside, all goes on, and what is made there is made aside.

So a husk is set aside first, then the merged one is dropped; only if it was, what is looked up then is sound, and the husk
is empty still, it is deleted. Otherwise it is put back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from watchd.coherence.invalidate import invalidate
from watchd.coherence.view import Stale, View
from watchd.errors import RefusedError
from watchd.kernel.files import O_PATH_DIRECTORY, openat2
from watchd.overlay.upper import Note, Upper, directories_below, holds_only_directories

IN_USE = "the directory in the upper that it was evicted from is in use"


def provide_directory(view: View, upper: Upper, path: bytes) -> None:
    """Have the upper hold a directory of the merged mount. Raises RefusedError, OSError."""
    names = path.split(b"/") if path else []
    for depth in range(1, len(names) + 1):
        _check(view, b"/".join(names[:depth]))
    missing = upper.first_missing(path)
    if missing is None:
        return
    upper.note("husk", missing)
    merged = openat2(view.merged, path, flags=O_PATH_DIRECTORY)
    try:
        os.chown(b"/proc/self/fd/%d" % merged, -1, -1)
    finally:
        os.close(merged)
        view.union.close()  # it knows the directories as they were


def _check(view: View, directory: bytes) -> None:
    expected = view.union.lookup(directory)
    if expected is None or not expected.is_dir or any(view.stale({directory: 0}, acted=True)):
        raise RefusedError(f"the directory {os.fsdecode(directory)!r} that it is in is stale itself")


def drop_idle(view: View, upper: Upper) -> None:
    """Have the merged mount forget the husks that it has cached only because somebody looked there. Looks through all processes
    if there are any. Raises MountError, OSError."""
    husks = [note.path for note in upper.notes() if note.kind == "husk"]
    cached = [Stale(path, "listing") for path in husks if view.cached_mode(path) is not None]
    if cached and not upper.serves_a_replaced_mount() and not all(entry.pinned_by for entry in view.pinned(cached)):
        invalidate(view.merged, read_only=False)


def settle_husks(view: View, upper: Upper) -> dict[bytes, str]:
    """Take away those that nobody uses any more; returns the others with the reason. Raises MountError, OSError."""
    notes = upper.notes()
    busy = {note.path for note in notes if note.kind != "husk"}
    stays: dict[bytes, str] = {}
    if any(note.kind == "husk" for note in notes) and upper.serves_a_replaced_mount():
        return {note.path: IN_USE for note in notes if note.kind == "husk"}  # what that one has cached cannot be seen
    for note in notes:
        if note.kind == "husk" and (_holds_any(note.path, busy) or not _settle(view, upper, note)):
            stays[note.path] = IN_USE
    return stays


def _holds_any(directory: bytes, paths: Iterable[bytes]) -> bool:
    return any(path.startswith(directory + b"/") for path in paths)


def _settle(view: View, upper: Upper, note: Note) -> bool:
    if upper.is_aside(note):  # left by a crash
        return _decide(view, upper, note)
    status = upper.status(note.path)
    if status is None or not _is_empty(upper.root, note.path):
        upper.strike(note)  # somebody else's by now
        return True
    if view.cached_mode(note.path) is not None or not upper.set_aside(note, inode=status.st_ino):
        return False
    return _decide(view, upper, note)


def _decide(view: View, upper: Upper, note: Note) -> bool:
    """Delete the husk that was set aside, or put it back."""
    invalidate(view.merged, read_only=False)
    view.union.close()
    gone = False
    if view.cached_mode(note.path) is None and _is_sound(view, upper, note) and _is_empty(upper.aside, note.id):
        with contextlib.suppress(OSError):  # something came into it at the last moment
            upper.delete_aside(note)
            gone = True
    if not gone and not upper.put_back(note):
        return False
    if gone or not _is_empty(upper.root, note.path):
        upper.strike(note)
    invalidate(view.merged, read_only=False)
    view.union.close()
    return gone


def _is_empty(directory: int, name: bytes) -> bool:
    try:
        return holds_only_directories(directory, name)
    except OSError:
        return False


def _is_sound(view: View, upper: Upper, note: Note) -> bool:
    """Whether the merged directories can be listed without the husk. A watch may keep an inode that remembers it (ESTALE)."""
    for path in directories_below(upper.aside, note.id):
        below = note.path + path[len(note.id) :]
        if view.union.lookup(below) is None:
            continue
        try:
            merged = openat2(view.merged, below, flags=os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return False
        try:
            if {os.fsencode(name) for name in os.listdir(merged)} != set(view.union.listing(below)):
                return False
        except OSError:
            return False
        finally:
            os.close(merged)
    return True
