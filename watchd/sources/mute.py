"""Busy directories outside of all layers, silenced in the kernel.

Facts (each held by `tests/kernel/test_mute.py`)
* A filesystem mark hears everything. An ignore mark (FAN_MARK_IGNORE_SURV, 6.0) of the same group on a directory, with
  FAN_EVENT_ON_CHILD and FAN_ONDIR in its mask, keeps from the queue what happens to the names in it, to the files and
  directories under these names and to the directory itself; not what happens further down, and not what a file is told of
  under a name elsewhere. So a writer of one file is silenced by its directory. A mark on the file itself would silence its
  names in a layer too, and a hard link there can be made at any time: never do that.
* FAN_RENAME in an ignore mask of either directory silences a rename from or into the other one, a layer's included. It is left
  out, so every rename is heard.
* What stays: renames, and for each name that is added to or taken from a file one FAN_ATTRIB of the file without any directory.
* A move of the directory takes the mark along, with all that it silences.
* A FAN_MARK_EVICTABLE mark does not keep its inode in memory and goes with it; then the directory is heard again.
* A mark takes 107 bytes of kernel memory and 6 us to set.

What this means for us: a directory is muted only where the kernel says at that moment that it lies outside, and so that no
layer's root is directly in it. As every rename is heard, none gets into a layer unnoticed; what happened in one between its
move and the lifting of its mark is unknown, so it is scanned and everything that it may have made stale is doubted. Who
writes there meanwhile is never kept waiting.
"""

from __future__ import annotations

import errno
import os

from watchd.kernel import fanotify as fan
from watchd.sources.tree import DirectoryTree

HOT_EVENTS = 64
"""Names heard of in one directory, halved every HALF_LIFE_NS, from which on it is muted. Hearing of so many costs more than
setting a mark."""

HALF_LIFE_NS = 1_000_000_000

COUNTED_MAX = 4096
"""Directories counted. At the bound all counts begin anew."""

MUTED_MAX = 1024
"""Directories muted. At the bound the one that was muted first is heard again."""

IGNORED_MASK = (
    fan.FAN_CREATE
    | fan.FAN_DELETE
    | fan.FAN_ATTRIB
    | fan.FAN_MODIFY
    | fan.FAN_CLOSE_WRITE
    | fan.FAN_EVENT_ON_CHILD
    | fan.FAN_ONDIR
)
_MUTE = fan.FAN_MARK_ADD | fan.FAN_MARK_ONLYDIR | fan.FAN_MARK_IGNORE_SURV | fan.FAN_MARK_EVICTABLE
_UNMUTE = fan.FAN_MARK_REMOVE | fan.FAN_MARK_IGNORE


class Mutes:
    """The directories of one filesystem that one group does not hear. Handles are packed struct file_handle."""

    def __init__(self, group: int, tree: DirectoryTree) -> None:
        self._group, self._tree = group, tree
        self._counts: dict[bytes, int] = {}
        self._muted: dict[bytes, None] = {}
        """In the order in which they were muted. The kernel may have dropped the mark of any."""
        self._aged_ns = 0
        self.is_supported = True
        self.set = 0
        """Marks set so far."""
        self.lifted = 0
        """Marks lifted so far, whatever for."""

    def __len__(self) -> int:
        return len(self._muted)

    def heard(self, handle: bytes, events: int) -> None:
        """So many names were heard of in a directory outside of all layers."""
        self._counts[handle] = self._counts.get(handle, 0) + events

    def update(self, now_ns: int) -> None:
        """Mute what has become hot. `now_ns`: CLOCK_MONOTONIC. Raises LayerError if nothing of the filesystem can be opened."""
        hot = [handle for handle, count in self._counts.items() if count >= HOT_EVENTS]
        for handle in hot:
            del self._counts[handle]
            if self.is_supported and self._tree.is_outside(handle):
                self._mute(handle)
        if now_ns - self._aged_ns > HALF_LIFE_NS:
            self._counts = {handle: count >> 1 for handle, count in self._counts.items() if count > 1}
            self._aged_ns = now_ns
        if len(self._counts) > COUNTED_MAX:
            self._counts.clear()

    def lift_near_layers(self) -> list[bytes]:
        """After a directory came into a layer or the root of one was renamed: hear those again that lie in a layer now, or
        directly above a root; returns them.

        Raises OSError, LayerError."""
        near = self._tree.near_layers(self._muted) if self._muted else []
        for handle in near:
            self._lift(handle)
        return near

    def clear(self) -> None:
        """Hear everything again. Raises OSError, LayerError."""
        for handle in list(self._muted):
            self._lift(handle)
        self._counts.clear()

    def _mute(self, handle: bytes) -> None:
        descriptor = self._tree.open(handle)
        if descriptor is None:
            return
        try:
            fan.fanotify_mark(self._group, _MUTE, IGNORED_MASK, dirfd=descriptor)
        except OSError as error:
            self.is_supported = error.errno != errno.EINVAL
            return
        finally:
            os.close(descriptor)
        self.set += 1
        self._muted.pop(handle, None)
        self._muted[handle] = None
        if len(self._muted) > MUTED_MAX:
            self._lift(next(iter(self._muted)))

    def _lift(self, handle: bytes) -> None:
        """An error here is not passed over: it would leave a directory unheard."""
        descriptor = self._tree.open(handle)
        if descriptor is not None:  # else it is gone, and its mark with it
            try:
                fan.fanotify_mark(self._group, _UNMUTE, IGNORED_MASK, dirfd=descriptor)
            except FileNotFoundError:
                pass  # the kernel dropped the mark before
            finally:
                os.close(descriptor)
        del self._muted[handle]
        self.lifted += 1
