"""Changes of one layer from inotify(7): a watch on every directory of it.

Facts and what they mean for us
* A watch is on an inode: where layers lie in one another, or in bind mounts of one another, they would share watches.
  So there is one source, with an instance of its own, per layer.
* A directory that appears has no watches in it: it is watched first and listed then, and what is found is told as created.
  What was created between the two is told twice, nothing is missed. Whether a directory is known already the kernel knows
  best: inotify_add_watch of a directory that is watched gives its watch descriptor again.
* A walk sees the tree later than the events that were queued before it ended, so those may contradict it. A walk that did not
  find what it looked for was led astray by a rename that is still in the queue: until the queue was emptied once after
  that, a directory that was renamed is walked again. What happened in a directory that was not found, or that a namesake took
  the place of, is held until that rename was read (`watchd.sources.held`).
* The watch of a directory that was moved out of the layer goes on; it is removed when its other half has not come by the next
  `idle`. Removing a watch queues IN_IGNORED, so many are removed in slices, lest that overflows the queue.
* RENAME_EXCHANGE of a and b queues MOVED_FROM a, MOVED_TO b, MOVED_FROM b, MOVED_TO a: what left b with the third is what had
  been there before the second. Two renames to and fro queue the same, so both names are looked at.
* A watch holds its inode but not its filesystem: umount works, and queues IN_UNMOUNT.
* Walking opens and lists directories. IN_OPEN, IN_ACCESS and IN_CLOSE_NOWRITE are not asked for, so walks queue nothing.
* An attribute change of a directory is told by its own watch and by its parent's. Writes through another hard link, and
  changes that a server or another host made, are told by neither.
* Watches need read permission and are limited per user (fs.inotify.max_user_watches), instances too (max_user_instances).
* pyinotify is used for its binding and its constants only. It is told no path but /proc/self/fd/N; its descriptor is made
  non-blocking and close-on-exec here, read and decoded here. Its import needs asyncore: deprecated in Python 3.11, from
  3.12 on in the package pyasyncore.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import warnings
from collections import deque
from collections.abc import Iterable
from functools import cache
from typing import Any

from watchd.errors import LayerError, UnsupportedError
from watchd.kernel.files import O_PATH_DIRECTORY
from watchd.records import Change, Kind, pack_status
from watchd.sources.base import Batch, MovedIn, WatchedLayer
from watchd.sources.held import Held
from watchd.sources.look import SELF, Place, Touch, look
from watchd.sources.walk import Directory, Walk, join, open_below
from watchd.sources.watchtree import ROOT, WatchTree
from watchd.wire.inotify import IN_CREATE, IN_IGNORED, IN_MOVED_FROM, IN_MOVED_TO, IN_UNMOUNT, Events, Key, Step, decode

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import pyinotify

READ_BYTES = 64 * 1024
LONGEST_EVENT_BYTES = 4096
BATCH_BYTES = 2 * 1024 * 1024
FOUND_LIMIT = 20_000
"""Entries of appeared directories told in one batch; beyond it, directories are told as MovedIn."""
SUSPECTS_LIMIT = 4096
RETIRE_SLICE = 1024
LIMITS = "/proc/sys/fs/inotify"

_DIRECTORY_MASK: int = (
    pyinotify.IN_CREATE
    | pyinotify.IN_DELETE
    | pyinotify.IN_MOVED_FROM
    | pyinotify.IN_MOVED_TO
    | pyinotify.IN_MODIFY
    | pyinotify.IN_ATTRIB
    | pyinotify.IN_CLOSE_WRITE
    | pyinotify.IN_ONLYDIR
    | pyinotify.IN_EXCL_UNLINK
)
_CONTENT_MASK: int = pyinotify.IN_MODIFY | pyinotify.IN_CLOSE_WRITE
_BARRIER_MASK: int = pyinotify.IN_CREATE | pyinotify.IN_ONLYDIR | pyinotify.IN_MASK_ADD

_KINDS: tuple[tuple[int, Kind], ...] = (
    (pyinotify.IN_CREATE, Kind.CREATE),
    (pyinotify.IN_DELETE, Kind.DELETE),
    (pyinotify.IN_MOVED_FROM | pyinotify.IN_MOVED_TO, Kind.RENAME),
    (_CONTENT_MASK, Kind.MODIFY),
    (pyinotify.IN_ATTRIB, Kind.ATTRIB),
)

CREATED = 0
MOVED_IN = -1
"""How a directory came, if not by a rename of the watch descriptor that stands there otherwise."""

_VANISHED = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE, errno.EXDEV})


@cache
def _kinds(mask: int) -> int:
    return sum(kind for bits, kind in _KINDS if mask & bits)


def _limit(name: str) -> int:
    with open(f"{LIMITS}/{name}", encoding="ascii") as file:
        return int(file.read())


def _unwatchable(path: bytes, error: OSError) -> LayerError:
    shown = os.fsdecode(path) or "the layer's root directory"
    return LayerError(f"inotify cannot watch {shown}: {error.strerror}", remedy="see whether it can be listed")


class Instance:
    """An inotify instance: pyinotify's binding with an owned, non-blocking descriptor."""

    def __init__(self) -> None:
        self._binding: Any = pyinotify.INotifyWrapper.create()
        if self._binding is None:
            raise UnsupportedError("this system has no inotify", remedy="use another source")
        self.descriptor = self._check(self._binding.inotify_init(), "inotify_init")
        # inotify_init1 is not bound; until here a fork without exec could have inherited it, which nobody does.
        os.set_inheritable(self.descriptor, False)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, os.O_NONBLOCK)

    def add(self, descriptor: int, mask: int) -> int:
        """Watch the directory that is open there; returns the watch descriptor. Raises OSError (ENOSPC: the limit)."""
        result = self._binding.inotify_add_watch(self.descriptor, f"/proc/self/fd/{descriptor}", mask)
        return result if result >= 0 else self._check(result, "inotify_add_watch")

    def remove(self, wd: int) -> None:
        """Remove a watch, if it has not ended already."""
        self._binding.inotify_rm_watch(self.descriptor, wd)

    def close(self) -> None:
        """Give up the instance and all its watches."""
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)

    def _check(self, result: int, name: str) -> int:
        if result >= 0:
            return result
        number = self._binding.get_errno()
        if name == "inotify_init" and number in (errno.EMFILE, errno.ENFILE):
            raise LayerError(
                f"no inotify instance: {os.strerror(number)}",
                remedy=f"raise the sysctl fs.inotify.max_user_instances above {_limit('max_user_instances')} or LimitNOFILE=",
            )
        raise OSError(number, f"{name}: {os.strerror(number)}")


class InotifySource:
    """A `watchd.sources.base.Source` for one layer.

    `collect`, `add` and `recover` also raise LayerError: a limit is reached or the layer cannot be read, so it is not watched
    completely and must count as not watched.
    """

    backend = "inotify"

    def __init__(self, *, barrier_directory: bytes | None = None, content: bool = True) -> None:
        """`content`: in-place writes too.

        Raises LayerError when there is no instance to be had, OSError when the barrier directory cannot be watched.
        """
        self._instance = Instance()
        self._mask = _DIRECTORY_MASK if content else _DIRECTORY_MASK & ~_CONTENT_MASK
        self._layer: WatchedLayer | None = None
        self._tree = WatchTree()
        self._root = self._barrier = self._clone_descriptor = -1
        self._departures: dict[int, Key] = {}
        self._departed: dict[int, int] = {}
        self._departing: frozenset[int] = frozenset()
        self._retired: deque[int] = deque()
        self._held = Held()
        self._astray = False
        """Since the queue was last emptied, a directory was not found where it was looked for."""
        if barrier_directory is not None:
            self._watch_barrier(barrier_directory)

    def fileno(self) -> int:
        """The inotify descriptor."""
        return self._instance.descriptor

    def statistics(self) -> dict[str, int]:
        """Sizes of what is held: watches, suspects (may be lost), retired (to be removed)."""
        return {"watches": len(self._tree), "suspects": self._tree.suspects, "retired": len(self._retired)}

    def add(self, layer: WatchedLayer) -> None:
        """Watch this layer. Raises LayerError, leaving nothing watched; UnsupportedError if there is a layer already."""
        if self._layer is not None:
            raise UnsupportedError("an inotify source watches one layer", remedy="use a source for each layer")
        self._layer = layer
        try:
            self._watch_everything()
        except BaseException:
            self.remove(layer.name)
            raise

    def remove(self, name: str) -> None:
        """Stop watching; what is queued is dropped when it is read."""
        if self._layer is None or self._layer.name != name:
            return
        self._layer = None
        self._root = -1
        self._held.clear()
        self._retired.extend(self._tree.keep(set()))
        self._retire()
        self._let_go()

    def recover(self) -> None:
        """Walk the layer again: watch what was missed, drop what is gone. Tells nothing of what it finds: scan for that."""
        self._departures, self._departed = {}, {}
        self._held.clear()
        if self._layer is not None:
            self._retired.extend(self._tree.keep(self._watch_everything()))
            self._retire()

    def idle(self) -> None:
        """Drop the watches of what left the layer, and let go of the layer. What is held is tried once more soon."""
        self._retired.extend(self._tree.lost())
        self._retire()
        self._let_go()
        if self._held:
            self._held.expect_nothing()
            self._become_readable()

    def close(self) -> None:
        """Give up the instance with all its watches."""
        self._let_go()
        self._instance.close()

    def collect(self) -> Batch | None:
        """Read and follow what is queued and look at it. Raises OSError: the source is lost; LayerError: so is the layer."""
        read_ns = time.monotonic_ns()
        events, time_ns, emptied = self._read()
        if not events.records:
            return None
        touched = events.names.get(self._barrier, {})
        barriers = tuple(name for name, mask in touched.items() if mask & pyinotify.IN_CREATE)
        batch = Batch([], {}, read_ns, time_ns if emptied else 0, barriers, events.overflow)
        astray, self._astray = self._astray, self._astray and not emptied
        if self._layer is not None:
            batch.records[self._layer.name] = events.records - len(barriers)
            self._process(self._layer, events, batch, time_ns=time_ns, astray=astray)
        self._wait_for_held(batch)
        self._retire()
        return batch

    def _wait_for_held(self, batch: Batch) -> None:
        """The batch is not complete, nor are barriers reached, before what is held was looked at or counts as lost."""
        if self._held:
            batch.complete_ns = 0
        if batch.overflow or self._held.is_in_vain:
            batch.overflow = True
            self._held.clear()
        batch.barriers = self._held.release(batch.barriers)

    def _read(self) -> tuple[Events, int, bool]:
        """What is queued, up to a bound; the time before the last read; whether that emptied the queue."""
        events = Events(self._departures)
        total = 0
        while True:
            time_ns = time.time_ns()
            try:
                buffer = os.read(self._instance.descriptor, READ_BYTES)
            except BlockingIOError:
                return events, time_ns, True
            decode(buffer, events)
            total += len(buffer)
            # A read ends when nothing is queued or the next event does not fit.
            if len(buffer) <= READ_BYTES - LONGEST_EVENT_BYTES:
                return events, time_ns, True
            if total >= BATCH_BYTES:
                return events, time_ns, False

    def _process(self, layer: WatchedLayer, events: Events, batch: Batch, *, time_ns: int, astray: bool) -> None:
        arrivals, ended = self._follow(events.steps, self._held.take(events))
        self._departing = frozenset(self._departed.values())
        found = _Found(layer.name, time_ns, events)
        # One that was not found may lie in another that came from outside: once more when all of those are placed.
        left = {key: way for key, way in arrivals.items() if not self._settle(key, way, found, astray=astray)}
        for key, way in left.items():
            if not self._settle(key, way, found, astray=True) and self._is_in_layer(key[0]):
                self._held.hold_arrival(key, way)
        batch.changes += found.arrived
        batch.changes += self._look(layer, events, time_ns, batch.linked)
        batch.changes += found.changes
        batch.moved_in = tuple(found.moved_in)
        for wd in ended:
            self._tree.forget(wd)
        self._departures = events.departures
        self._tree.forget_paths()
        if self._tree.suspects > SUSPECTS_LIMIT:
            self._retired.extend(self._tree.lost())

    def _follow(self, steps: Iterable[Step], arrivals: dict[Key, int]) -> tuple[dict[Key, int], list[int]]:
        """Replay what happened to directories; returns those to be looked at, with how they came, and the ended watches.

        `arrivals`: those that came before."""
        contested: set[Key] = set()
        ended = []
        departed_before, self._departed = self._departed, {}
        for wd, mask, cookie, name in steps:
            if mask & (IN_UNMOUNT | IN_IGNORED):
                self._check_end(wd, mask)
                ended.append(wd)
            elif mask & IN_MOVED_TO:
                moved = self._departed.pop(cookie, 0) or departed_before.pop(cookie, 0)
                if moved in self._tree and wd in self._tree:
                    if self._tree.is_taken(wd, name, by_other_than=moved):
                        contested.add((wd, name))
                    self._tree.place(moved, wd, name)
                arrivals[wd, name] = moved or MOVED_IN
            elif mask & IN_CREATE:
                arrivals[wd, name] = CREATED
            else:
                arrivals.pop((wd, name), None)
                if (wd, name) in contested:
                    arrivals[wd, name] = MOVED_IN  # which one left cannot be told: look
                gone = self._tree.leave(wd, name)
                if gone is not None and mask & IN_MOVED_FROM:
                    self._departed[cookie] = gone
        return arrivals, ended

    def _check_end(self, wd: int, mask: int) -> None:
        if mask & IN_UNMOUNT and wd in self._tree:
            raise OSError(errno.ENODEV, "the layer's filesystem was unmounted")
        if wd == self._root:
            raise OSError(errno.ESTALE, "the layer's root directory is gone")
        if wd == self._barrier:
            raise OSError(errno.ESTALE, "the barrier directory is gone")

    def _settle(self, key: Key, arrival: int, found: _Found, *, astray: bool) -> bool:
        """See what directory has this name now; watch it and all below if that may not be so yet. False if the directory
        that it came to is not where it should be."""
        parent, name = key
        path = self._tree.path(parent)
        directory = self._open(path)
        try:
            if path is None or directory is None or not self._is_watched_as(parent, directory):
                self._astray = True
                return False
            found.start(path, name, everything=arrival == MOVED_IN)
            # What is below is told as found where the directory is now, so that this is there is told as found now too.
            mask = found.events.names.get(parent, {}).get(name, 0)
            touches = self._touches(Place(found.layer, path), parent, {name: mask}, found.events.renames)
            if not found.has_arrived(key, look(directory, found.layer, touches, found.time_ns)):
                self._astray = True
                return True
            again = arrival == MOVED_IN or (arrival != CREATED and astray)
            self._watch(directory, key, found, again=again)
            return True
        finally:
            if directory is not None:
                os.close(directory)

    def _is_in_layer(self, wd: int) -> bool:
        """Whether, as far as events tell, that directory is in the layer, be it that half of a rename was read only."""
        return self._tree.is_rooted(wd, but_for=self._departing)

    def _is_watched_as(self, wd: int, directory: int) -> bool:
        """Whether this open directory is the one with that watch; only inotify itself knows for sure."""
        actual = self._add(directory)
        if actual not in self._tree:
            self._retired.append(actual)
        return actual == wd

    def _watch_everything(self) -> set[int]:
        seen = self._watch(self._clone(), (ROOT, b""), None, again=True)
        self._root = self._tree.wd_at(ROOT, b"")
        return seen

    def _watch(self, base: int, key: Key, found: _Found | None, *, again: bool) -> set[int]:
        """Watch a name in an open directory and all below it; with `again` also below it if it is watched already."""
        walk = Walk(base, key[1], failed=self._failed)
        seen = set()
        for directory in walk:
            above = directory.parent
            wd = directory.tag = self._add(directory.descriptor)
            is_news = self._tree.place(wd, above.tag, directory.name) if above else self._tree.place(wd, *key)
            seen.add(wd)
            if found is not None and found.is_to_be_told(directory, is_news=is_news):
                directory.descend = found.tell(directory, walk.entries(directory))
            elif is_news or again or above:
                directory.descend = walk.subdirectories(directory)
        return seen

    def _add(self, directory: int) -> int:
        try:
            return self._instance.add(directory, self._mask)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise self._too_many() from None
            raise _unwatchable(os.fsencode(os.readlink(f"/proc/self/fd/{directory}")), error) from None

    def _too_many(self) -> LayerError:
        limit = _limit("max_user_watches")
        walk = Walk(self._clone(), failed=lambda path, error: None)
        total = 0
        for directory in walk:
            total += 1
            directory.descend = walk.subdirectories(directory)
        needed = limit - len(self._tree) + total + 1
        return LayerError(
            f"{total} directories need more inotify watches than the limit of {limit} leaves",
            remedy=f"raise the sysctl fs.inotify.max_user_watches to {needed} or more",
        )

    def _failed(self, path: bytes, error: OSError) -> None:
        """What vanished is told by events; anything else would leave a hole in what is watched."""
        if not path or error.errno not in _VANISHED:
            raise _unwatchable(path, error) from None
        self._astray = True

    def _look(self, layer: WatchedLayer, events: Events, time_ns: int, linked: set[str]) -> list[Change]:
        self._name_selves(events.names)
        changes: list[Change] = []
        for wd, names in events.names.items():
            path = self._tree.path(wd)
            directory = self._open(path) if names else None
            try:
                if names and self._is_elsewhere(wd, directory):
                    self._held.hold_names(wd, names, events.renames)
                elif names and path is not None:
                    touches = self._touches(Place(layer.name, path), wd, names, events.renames)
                    changes += look(directory, layer.name, touches, time_ns, linked=linked)
            finally:
                if directory is not None:
                    os.close(directory)
        return changes

    def _is_elsewhere(self, wd: int, directory: int | None) -> bool:
        """Whether that directory is in the layer, but not what is open there."""
        if wd == self._root or wd not in self._tree:
            return False
        if wd not in self._held and directory is not None and self._is_watched_as(wd, directory):
            return False
        return self._is_in_layer(wd)

    def _touches(self, place: Place, wd: int, names: dict[bytes, int], renames: dict[Key, Key]) -> list[Touch]:
        return [
            Touch(
                name,
                place.child(name),
                _kinds(mask & _DIRECTORY_MASK),
                bool(mask & pyinotify.IN_ISDIR),
                from_path=self._path(renames.get((wd, name))) if mask & pyinotify.IN_MOVED_TO else None,
            )
            for name, mask in names.items()
            if mask
        ]

    def _name_selves(self, names: dict[int, dict[bytes, int]]) -> None:
        """What watched directories told of themselves belongs to their names in their parents."""
        for wd in [wd for wd, touched in names.items() if b"" in touched]:
            mask = names[wd].pop(b"")
            place = self._tree.place_of(wd)
            if place is not None:
                parent, name = place if wd != self._root else (wd, SELF)
                touched = names.setdefault(parent, {})
                touched[name] = touched.get(name, 0) | mask

    def _path(self, key: Key | None) -> bytes | None:
        base = self._tree.path(key[0]) if key else None
        if key is None or base is None:
            return None
        return join(base, key[1])

    def _open(self, path: bytes | None) -> int | None:
        if path is None:
            return None
        try:
            return open_below(self._clone(), path)
        except OSError as error:
            if error.errno in _VANISHED:
                return None
            raise

    def _clone(self) -> int:
        assert self._layer is not None
        if self._clone_descriptor < 0:
            self._clone_descriptor = self._layer.open()
        return self._clone_descriptor

    def _let_go(self) -> None:
        if self._clone_descriptor >= 0:
            descriptor, self._clone_descriptor = self._clone_descriptor, -1
            os.close(descriptor)

    def _retire(self) -> None:
        """Remove some of the watches to be removed. Their IN_IGNORED make the queue readable: so it goes on by itself."""
        for _ in range(min(len(self._retired), RETIRE_SLICE)):
            wd = self._retired.popleft()
            if wd not in self._tree and wd != self._barrier:
                self._instance.remove(wd)

    def _become_readable(self) -> None:
        """Queue an event that tells nothing: the IN_IGNORED of a watch that was not there before."""
        descriptor = os.open(b"/proc/self/fd", O_PATH_DIRECTORY)
        try:
            wd = self._instance.add(descriptor, pyinotify.IN_DELETE_SELF | pyinotify.IN_ONLYDIR)
        finally:
            os.close(descriptor)
        self._instance.remove(wd)

    def _watch_barrier(self, path: bytes) -> None:
        try:
            descriptor = os.open(path, O_PATH_DIRECTORY)
            try:
                self._barrier = self._instance.add(descriptor, _BARRIER_MASK)
            finally:
                os.close(descriptor)
        except OSError:
            self.close()
            raise


class _Found:
    """Directories that appeared, and their entries, told as created unless an event of the batch tells of them."""

    def __init__(self, layer: str, time_ns: int, events: Events) -> None:
        self.layer = layer
        self.time_ns = time_ns
        self.events = events
        self._base = self._top = b""
        self._everything = False
        self._told: set[int] = set()
        self.arrived: list[Change] = []
        self.changes: list[Change] = []
        self.moved_in: dict[MovedIn, None] = {}

    def start(self, base: bytes, top: bytes, *, everything: bool) -> None:
        """The name `top` appeared in the directory `base`; with `everything` it may be watched from before it left."""
        self._base, self._top, self._everything = base, top, everything
        self._told.clear()

    def has_arrived(self, key: Key, looked_at: list[Change]) -> bool:
        """Whether a directory was at that name when it was looked at; then this is told, and nobody need look once more."""
        if not all(change.exists and change.is_dir for change in looked_at):
            return False
        if looked_at:
            self.events.names[key[0]][key[1]] = 0
            self.arrived += looked_at
        return True

    def is_to_be_told(self, directory: Directory, *, is_news: bool) -> bool:
        """Whether to tell of its entries: it, or a directory above it, is new here, though maybe watched elsewhere before."""
        if not (is_news or self._everything or (directory.parent and directory.parent.tag in self._told)):
            return False
        self._told.add(directory.tag)
        return True

    def tell(self, directory: Directory, entries: Iterable[tuple[bytes, bool, os.DirEntry[str]]]) -> list[bytes]:
        """Tell of these; returns the names of the directories among them."""
        touched = self.events.names.get(directory.tag, {})
        subdirectories = []
        for name, is_dir, entry in entries:
            if is_dir:
                subdirectories.append(name)
            if name in touched and not (
                is_dir and touched[name]
            ):  # nothing is told of what is in a directory before it
                continue
            if len(self.changes) < FOUND_LIMIT:
                self._tell(join(self._base, directory.child(name)), entry, is_dir=is_dir)
            else:
                self.moved_in[MovedIn(self.layer, join(self._base, self._top))] = None
        return subdirectories

    def _tell(self, path: bytes, entry: os.DirEntry[str], *, is_dir: bool) -> None:
        with contextlib.suppress(OSError):  # gone again: nobody has heard of it, and its end is an event
            status = entry.stat(follow_symlinks=False)
            self.changes.append(
                Change(
                    self.time_ns,
                    self.layer,
                    path,
                    Kind.CREATE,
                    True,
                    is_dir,
                    inode=status.st_ino,
                    status=pack_status(status),
                )
            )
