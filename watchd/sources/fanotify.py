"""Changes of all layers on one filesystem, through one fanotify group with one mark.

Facts
* FAN_MARK_FILESYSTEM with FAN_REPORT_DFID_NAME_TARGET costs the same whatever the size of the filesystem, and hears all of it:
  what lies outside of every layer is dropped by directory handle, before anything else is decoded.
* Refused: EXDEV on a btrfs subvolume, ENODEV where f_fsid is 0 (FUSE, overlay without upper), EOPNOTSUPP without file handles.
* With the target's handle in the record a directory is known from its creation on, so names in a directory that is gone by
  the time its events are read still have a path.
* A directory that is moved in from outside brings contents that no event tells of.
* Events are queued before the changing system call returns, one queue for all marks of a group. So an event that watchd makes
  itself in a directory that the group marks too is a barrier: once it is read, everything before it was read.
* What is busy outside of every layer is muted in the kernel (`watchd.sources.mute`).
* MODIFY tells of writes as they happen; CLOSE_WRITE of those through mmap, which nothing else tells of.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterable, Sequence
from functools import partial

from watchd.errors import LayerError, UnsupportedError
from watchd.kernel import fanotify as fan
from watchd.kernel.files import FileHandle, name_to_handle_at, open_by_handle_at
from watchd.records import Change, Kind
from watchd.sources.base import Batch, Ledger, MovedIn, WatchedLayer
from watchd.sources.look import SELF, Place, Touch, look
from watchd.sources.mute import Mutes
from watchd.sources.tree import DirectoryTree
from watchd.sources.who import Commands, shows_our_ids
from watchd.wire.fanotify import MASK, MASK_BITS, Events, by_directory, decode, file_handle, split

FIRST_READ_BYTES = 32 * 1024
READ_BYTES = 256 * 1024
EVENT_MAX_BYTES = 8 * 1024
"""More than any event takes: two names of 255 bytes and three handles of 128."""

BATCH_BYTES = 512 * 1024
"""At most so much is merged into one batch, which bounds both memory and the time to the first repair."""

STRUCTURE_MASK = fan.FAN_CREATE | fan.FAN_DELETE | fan.FAN_RENAME | fan.FAN_ATTRIB | fan.FAN_ONDIR
CONTENT_MASK = fan.FAN_MODIFY | fan.FAN_CLOSE_WRITE

_KINDS = (
    (fan.FAN_CREATE, Kind.CREATE),
    (fan.FAN_DELETE, Kind.DELETE),
    (fan.FAN_MOVED_FROM | fan.FAN_MOVED_TO, Kind.RENAME),
    (fan.FAN_MODIFY | fan.FAN_CLOSE_WRITE, Kind.MODIFY),
    (fan.FAN_ATTRIB, Kind.ATTRIB),
)
_Directories = dict[bytes, list[tuple[bytes, int, bytes]]]
"""See `watchd.wire.fanotify.by_directory`."""

_UNSUPPORTED = (errno.EXDEV, errno.ENODEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class FanotifySource:
    """A `watchd.sources.base.Source` for the layers of one filesystem."""

    backend = "fanotify"

    def __init__(
        self,
        *,
        barrier_directory: bytes | None,
        content: bool,
        unlimited_queue: bool,
        inherited: int | None = None,
        unrecorded: Sequence[bytes] = (),
    ) -> None:
        """`inherited`: a group of an earlier process with the same `group_flags` and `event_mask`; it is taken over.
        `unrecorded`: what that process has read from it, to be told once more.

        Raises UnsupportedError where the kernel lacks a feature, OSError (EPERM, EMFILE) otherwise."""
        self._group = _new_group(group_flags(unlimited_queue=unlimited_queue)) if inherited is None else inherited
        if inherited is not None:
            # What that process had muted, and where its barriers were.
            fan.fanotify_mark(self._group, fan.FAN_MARK_FLUSH, 0)
        self._mask = event_mask(content=content)
        self.ledger = Ledger()
        self._unrecorded = unrecorded
        self._layers: dict[str, WatchedLayer] = {}
        self._opened: list[int] = []
        self._tree = DirectoryTree(self._anchors)
        self.mutes = Mutes(self._group, self._tree)
        self._barrier = self._mark_barrier(barrier_directory) if barrier_directory else b""
        self._kinds: dict[int, int] = {}
        self._waiting: _Directories = {}
        """What happened in directories that were gone when it was read; at most one reading of it."""
        self._knows_commands = shows_our_ids()
        self.is_catching_up = inherited is not None
        """What is read may have waited for so long that its processes' ids are others' by now; until the queue was emptied."""

    def fileno(self) -> int:
        return self._group

    def add(self, layer: WatchedLayer) -> None:
        if layer.root is None:
            raise UnsupportedError("no fanotify mark for this filesystem: it has no file handles")
        mount = layer.open_mount()
        try:
            fan.fanotify_mark(self._group, fan.FAN_MARK_ADD | fan.FAN_MARK_FILESYSTEM, self._mask, dirfd=mount)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                raise UnsupportedError(f"no fanotify mark for this filesystem: {error.strerror}") from None
            raise LayerError(f"no fanotify mark on {os.fsdecode(layer.path)}: {error.strerror}") from None
        finally:
            os.close(mount)
        self.idle()
        self._layers[layer.name] = layer
        self._tree.add_root(layer.root.pack(), layer.name)
        self.mutes.clear()  # any of them may lie in this layer

    def resume(self, layer: WatchedLayer) -> bool:
        """The same for a layer that an inherited group has; whether that has heard its filesystem until now."""
        mount = layer.open_mount()
        try:
            is_marked = self._is_marked(mount)
        finally:
            os.close(mount)
        self.add(layer)
        return is_marked

    def remove(self, name: str) -> None:
        self._layers.pop(name, None)
        self._tree.remove_root(name)
        self.idle()

    def recover(self) -> None:
        self._tree.clear()
        self.mutes.clear()  # the rename that brought one of them into a layer may have been lost

    def idle(self) -> None:
        while self._opened:
            os.close(self._opened.pop())

    def close(self) -> None:
        self.idle()
        os.close(self._group)
        self.ledger = Ledger()  # lets go of the old one

    def collect(self) -> Batch | None:
        read_ns, now_ns = time.monotonic_ns(), time.time_ns()
        events = Events()
        emptied = self._read(events)
        batch = self._batch(events, read_ns, now_ns, emptied=emptied) if events.records else None
        if batch is None or batch.is_nothing:
            self.ledger.nothing()
        return batch

    def _batch(self, events: Events, read_ns: int, now_ns: int, *, emptied: bool) -> Batch:
        commands = Commands() if self._knows_commands and not self.is_catching_up else None
        self.is_catching_up = self.is_catching_up and not emptied
        self._tree.begin()
        linked: set[str] = set()
        moved_in = self._learn_directories(events, linked)
        directories = by_directory(events.names)
        barriers = tuple(name for name, _, _ in directories.pop(self._barrier, ()))
        groups = self._in_layers(directories, events)
        counts: dict[str, int] = {}
        suspects: dict[str, dict[bytes, int]] = {}
        for _, place, touches in groups:
            counts[place.layer] = counts.get(place.layer, 0) + len(touches)
            stale = suspects.setdefault(place.layer, {})
            for touch in touches:
                if touch.kinds != Kind.MODIFY:
                    stale[touch.path] = touch.kinds
        with contextlib.suppress(LayerError):  # nothing can be opened now: a loss only if something has to be looked at
            self.mutes.update(read_ns)
        return Batch(
            changes=[],
            records=counts,
            read_ns=read_ns,
            complete_ns=now_ns if emptied else 0,
            barriers=barriers,
            overflow=events.overflow,
            moved_in=moved_in,
            suspects=suspects,
            linked=linked,
            look=partial(self._look, groups, commands, now_ns, linked),
        )

    def _in_layers(self, directories: _Directories, events: Events) -> list[tuple[bytes, Place, list[Touch]]]:
        """What lies in layers, with its paths; the rest is only counted. Where a directory was that is gone is told by its
        removal, which may be read after what happened in it before: so that waits for one more reading."""
        groups = []
        waited, self._waiting = self._waiting, {}
        for directory, names in (*waited.items(), *directories.items()):
            handle = file_handle(directory)
            places = self._tree.places(handle)
            if not places:
                if directory not in waited and self._tree.is_gone(handle):
                    self._waiting[directory] = names
                self.mutes.heard(handle, len(names))
            for place in places:
                groups.append((handle, place, self._touches(place, names, events)))
        return groups

    def _read(self, events: Events) -> bool:
        """Read and merge what is queued; true if the queue was emptied."""
        if self._unrecorded:
            for data in self._unrecorded:
                decode(data, events)
            self._unrecorded = ()
            return False
        taken, wanted = 0, FIRST_READ_BYTES
        while taken < BATCH_BYTES:
            try:
                data = self.ledger.read(self._group, wanted)
            except BlockingIOError:
                return True
            decode(data, events)
            if len(data) < wanted - EVENT_MAX_BYTES:
                return True  # another event would have fitted in, so there was none
            taken += len(data)
            wanted = READ_BYTES
        return False

    def _learn_directories(self, events: Events, linked: set[str]) -> tuple[MovedIn, ...]:
        """Bring the tree up to date before any path is asked of it; returns what came with contents, and adds the layers to
        `linked` into which something came that was not heard until now."""
        moved: list[tuple[bytes, tuple[bytes, ...]]] = []
        root_moved = False
        for child, (key, origins) in events.children.items():
            directory, name = split(key)
            if origins:
                self._tree.moved(file_handle(child), file_handle(directory), name)
                root_moved = root_moved or self._tree.is_root(file_handle(child))
                moved.append((file_handle(child), origins))
            elif name != b".":
                self._tree.created(file_handle(child), file_handle(directory), name)
        found = self._moved_in(moved)
        if found or root_moved:
            found += self._hear_again(found, linked)
        return tuple(found)

    def _moved_in(self, moved: list[tuple[bytes, tuple[bytes, ...]]]) -> list[MovedIn]:
        """Those directories that came into a layer, those too that had left it just before: what was read while they were
        outside was dropped. Where the one that they came from is now need not be where it was then: it may have come in
        after them."""
        found: dict[MovedIn, None] = {}
        before = -1
        while before < len(found):
            before = len(found)
            for handle, origins in moved:
                came_from = [self._tree.places(file_handle(origin)) if origin else () for origin in origins]
                for place in self._tree.places(handle):
                    stayed = all(any(_was_there(one, place.layer, found) for one in places) for places in came_from)
                    if place.path and not stayed:  # a root brings nothing into its own layer
                        found[MovedIn(place.layer, place.path)] = None
        return list(found)

    def _hear_again(self, moved_in: list[MovedIn], linked: set[str]) -> list[MovedIn]:
        """Lift the marks of what is near a layer now; returns what of it nobody else is going to scan."""
        found = []
        for handle in self.mutes.lift_near_layers():
            for place in self._tree.places(handle):
                linked.add(place.layer)
                if not any(place.layer == moved.layer and _is_in(place.path, moved.path) for moved in moved_in):
                    found.append(MovedIn(place.layer, place.path))
        return found

    def _touches(self, place: Place, names: list[tuple[bytes, int, bytes]], events: Events) -> list[Touch]:
        prefix, renames = place.child(b""), events.renames
        return [
            Touch(
                name,
                place.path if name == SELF else prefix + name,
                self._kinds_of(value & MASK),
                value & fan.FAN_ONDIR != 0,
                value >> MASK_BITS or None,
                self._renamed_from(renames[key], place.layer) if key in renames else None,
            )
            for name, value, key in names
        ]

    def _look(
        self, groups: list[tuple[bytes, Place, list[Touch]]], commands: Commands | None, now_ns: int, linked: set[str]
    ) -> list[Change]:
        changes: list[Change] = []
        nothing: set[bytes] = set()
        for handle, place, touches in groups:
            descriptor = self._tree.open(handle)
            if descriptor is None:  # another directory may be where it was, and the same names in it
                descriptor = self._tree.open_instead(handle, nothing)
            try:
                changes += look(descriptor, place.layer, touches, now_ns, linked=linked, commands=commands)
            finally:
                if descriptor is not None:
                    os.close(descriptor)
        return changes

    def _renamed_from(self, old: bytes, layer: str) -> bytes | None:
        directory, name = split(old)
        for place in self._tree.places(file_handle(directory)):
            if place.layer == layer:
                return place.child(name)
        return None

    def _kinds_of(self, mask: int) -> int:
        kinds = self._kinds.get(mask)
        if kinds is None:
            kinds = self._kinds[mask] = sum(int(kind) for bits, kind in _KINDS if mask & bits)
        return kinds

    def _anchors(self) -> list[int]:
        """Descriptors of the mounts that the layers lie in, opened when they are needed and closed when idle."""
        if not self._opened:
            problem: LayerError | None = None
            for layer in self._layers.values():
                try:
                    self._open_anchor(layer)
                except LayerError as error:
                    problem = error
            if problem is not None and not self._opened:
                raise problem  # nothing can be looked at, so what is told would be lost
        return self._opened

    def _open_anchor(self, layer: WatchedLayer) -> None:
        mount = layer.open_mount()
        try:
            anchor = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
        finally:
            os.close(mount)
        root = name_to_handle_at(anchor)
        if any(_reaches(opened, root) for opened in self._opened):
            os.close(anchor)
            return
        # A mount that shows less would end the climb from a directory below the root of a layer that lies further up.
        for narrower in [opened for opened in self._opened if _reaches(anchor, name_to_handle_at(opened))]:
            self._opened.remove(narrower)
            os.close(narrower)
        self._opened.append(anchor)

    def _is_marked(self, mount: int) -> bool:
        """Whether the group hears the filesystem of this mount. To take an event from a mark that it does not ask for changes
        nothing, and fails where there is no mark."""
        try:
            fan.fanotify_mark(self._group, fan.FAN_MARK_REMOVE | fan.FAN_MARK_FILESYSTEM, fan.FAN_OPEN, dirfd=mount)
        except FileNotFoundError:
            return False
        return True

    def _mark_barrier(self, directory: bytes) -> bytes:
        """Mark the barrier directory; returns its key as it stands in records."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fan.fanotify_mark(
                self._group, fan.FAN_MARK_ADD | fan.FAN_MARK_ONLYDIR, fan.FAN_CREATE, dirfd=descriptor, path=b"."
            )
            fsid = os.fstatvfs(descriptor).f_fsid
            return fsid.to_bytes(8, "little") + name_to_handle_at(descriptor).pack()
        finally:
            os.close(descriptor)


def group_flags(*, unlimited_queue: bool) -> int:
    """How a source makes its group, for fanotify_init(2)."""
    return fan.FAN_REPORT_DFID_NAME_TARGET | (fan.FAN_UNLIMITED_QUEUE if unlimited_queue else 0)


def event_mask(*, content: bool) -> int:
    """What a source asks to be told of."""
    return STRUCTURE_MASK | (CONTENT_MASK if content else 0)


def _new_group(flags: int) -> int:
    try:
        return fan.fanotify_init(flags)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            raise UnsupportedError(f"fanotify with names and targets is not available: {error.strerror}") from None
        raise


def _was_there(place: Place, layer: str, moved_in: Iterable[MovedIn]) -> bool:
    """Whether a directory that is in a layer now is there since before."""
    return place.layer == layer and not any(one.layer == layer and _is_in(place.path, one.path) for one in moved_in)


def _is_in(path: bytes, directory: bytes) -> bool:
    return path == directory or path.startswith(directory + b"/") or not directory


def _reaches(anchor: int, directory: FileHandle) -> bool:
    """Whether a directory lies in what the mount of `anchor` shows."""
    try:
        descriptor = open_by_handle_at(anchor, directory.pack(), flags=os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        os.close(os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=descriptor))
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
