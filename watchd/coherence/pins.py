"""Who holds the objects of a merged mount that stay stale.

Facts (proc(5); held by tests)
* A dentry that is in use survives every invalidation. It is used by open files (/proc/<pid>/fd), by working and root
  directories, by the running program (exe), by what is mapped (maps), and by mounts: those on it, bind mounts of it, and
  overlays with a layer in it.
* The text of these links is the path from the root of the mount namespace at which the object was found, with " (deleted)"
  behind it once its dentry left the cache; so a name may seem deleted that only ends so, and the same text may mean
  something else in another namespace. From a mount that was unmounted lazily it is the path below that mount. Longer than
  PATH_MAX it cannot be read.
* stat(2) of a link tells the object itself. With AT_STATX_DONT_SYNC no server is asked for it, though a filesystem may want to
  look once more at what a link leads to (d_weak_revalidate: NFS, 9p); so only links are followed whose text fits.
* A line of maps shows device and inode number of the overlay's object (seen on 6.18; where they are the real file's, the text
  has to do) and escapes nothing but a newline.
* An inotify watch and a fanotify mark on an object hold its inode: fdinfo of the descriptor shows `inotify wd:1 ino:<hex>
  sdev:<hex>` and `fanotify ino:<hex> sdev:<hex> mflags:<hex>`, where sdev is the superblock's device, major << 20 | minor. An
  evictable mark (mflags 0x200) holds nothing.
* Not to be seen here: threads with a working directory or descriptors of their own, descriptors in flight over a socket,
  files registered with io_uring, swap files, loop devices, exports of nfsd. What only they hold is stale without a holder.
* Looking through all processes takes about 1 ms for each 20 of them; so it is done for what stays stale only, and never in a
  source's thread.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from watchd.errors import WireError
from watchd.kernel.namespaces import mount_namespace
from watchd.kernel.statx import identity_of
from watchd.overlay.model import MountPoint, View, build_overlays
from watchd.wire.mountinfo import OVERLAY, MountInfo, parse_mountinfo

USED_MAX = 100_000
"""Somebody who opens more files than that keeps the audit from trying all of them, not from ending."""

_DELETED = b" (deleted)"
_NEWLINE = rb"\012"
_WATCH = re.compile(
    rb"^(?:inotify wd:\S+|fanotify) ino:([0-9a-f]+) sdev:([0-9a-f]+) (?:mflags:([0-9a-f]+))?", re.MULTILINE
)
_WATCHING = (b"anon_inode:inotify", b"anon_inode:[fanotify]")
_EVICTABLE = 0x200
_LINKS = ((b"cwd", "cwd"), (b"root", "root"), (b"exe", "exe"))

Object = tuple[int, int]
"""st_dev and st_ino as the merged mount shows them."""


class Holder(msgspec.Struct, frozen=True, order=True):
    """A process that uses an object."""

    pid: int
    command: str
    """For a mount: its mount point."""
    how: str
    """open, cwd, root, mapped, exe, watch; or mount: a mount that this process sees."""


class Wanted(msgspec.Struct, frozen=True):
    """What to look for: objects of one overlay."""

    device: int
    """st_dev of the superblock."""
    points: Sequence[MountPoint]
    """All mounts that show something of it."""
    objects: Mapping[bytes, Object | None]
    """By path below the mount; None if it cannot be seen."""
    around: Sequence[MountPoint] = ()
    """Mounts of overlays around it, whose objects are others; `root` is the directory of this one that each shows."""


def find_holders(wanted: Wanted) -> dict[bytes, tuple[Holder, ...]]:
    """The processes that use each path or, if it is a directory, something below it. Those that end meanwhile are left out."""
    found: dict[bytes, set[Holder]] = {}
    search = _Search(wanted)
    own = b"%d" % os.getpid()
    for pid in [name for name in os.listdir(b"/proc") if name.isdigit() and name != own]:
        uses = {*search.links(pid), *search.maps(pid)}
        if uses:
            command = os.fsdecode(_read(b"/proc/%b/comm" % pid).rstrip(b"\n"))
            for path, how in uses:
                found.setdefault(path, set()).add(Holder(int(pid), command, how))
    for path, holder in search.mounts():
        found.setdefault(path, set()).add(holder)
    return {path: tuple(sorted(holders)) for path, holders in found.items()}


class _Candidate(msgspec.Struct, frozen=True):
    """What the text of a link may mean."""

    path: bytes
    is_itself: bool
    """Not something below it."""
    is_there: bool
    """The process sees the overlay at this place."""


class _Search:
    """What is wanted, prepared for being looked up."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._places = {
            (point.namespace, point.path.rstrip(b"/"), point.root.strip(b"/"), is_around)
            for points, is_around in ((wanted.points, False), (wanted.around, True))
            for point in points
        }
        self._numbers = {known[1]: path for path, known in wanted.objects.items() if known is not None}
        self._by_object = {known: path for path, known in wanted.objects.items() if known is not None}

    def links(self, pid: bytes) -> Iterator[tuple[bytes, str]]:
        """What the process has open, watches, stands in or runs."""
        namespace = _namespace(pid)
        for link, how in _links(pid):
            text = _readlink(link)
            if text is None:
                path = self._by_object.get(_object(link) or (0, 0))
                if path is not None:
                    yield path, how
                continue
            if text in _WATCHING:
                yield from ((path, "watch") for path in self._watched(link.replace(b"/fd/", b"/fdinfo/")))
                continue
            for candidate in self._candidates(text, namespace):
                if self._agrees(candidate, link):
                    yield candidate.path, how

    def maps(self, pid: bytes) -> Iterator[tuple[bytes, str]]:
        """What the process has mapped."""
        namespace = _namespace(pid)
        for device, inode, text in set(_mapped(pid)):
            ours = device == self._wanted.device
            if _NEWLINE in text:  # or those very characters, which are not escaped
                path = self._numbers.get(inode) if ours else None
                if path is not None:
                    yield path, "mapped"
                continue
            for candidate in self._candidates(text, namespace):
                known = self._wanted.objects[candidate.path]
                is_other = candidate.is_itself and known is not None and known[1] != inode
                agrees = not is_other if ours else candidate.is_there
                if agrees:
                    yield candidate.path, "mapped"

    def _watched(self, fdinfo: bytes) -> Iterator[bytes]:
        """What is watched by way of the merged mount, through a descriptor of inotify or fanotify."""
        superblock = os.major(self._wanted.device) << 20 | os.minor(self._wanted.device)
        for inode, sdev, flags in _WATCH.findall(_read(fdinfo)):
            path = self._numbers.get(int(inode, 16))
            if path is not None and int(sdev, 16) == superblock and not int(flags or b"0", 16) & _EVICTABLE:
                yield path

    def mounts(self) -> Iterator[tuple[bytes, Holder]]:
        """Mounts on it, bind mounts of it, and overlays with a layer in it."""
        device = os.major(self._wanted.device), os.minor(self._wanted.device)
        pids = {point.namespace: point.pid for point in self._wanted.points}
        for namespace, pid in pids.items():
            for mount in _mountinfo(pid):
                if mount.device == device:
                    root = mount.root.removesuffix(b"//deleted").strip(b"/")
                    paths = {candidate.path for candidate in self._at_and_above(root, is_there=True)} if root else set()
                else:
                    used = [mount.mount_point, *_layers(mount, View(pid, namespace))]
                    paths = {c.path for text in used for c in self._candidates(text, namespace) if c.is_there}
                for path in paths:
                    yield path, Holder(pid, os.fsdecode(mount.mount_point), "mount")

    def _agrees(self, candidate: _Candidate, link: bytes) -> bool:
        """Whether the object that a link leads to is the one that is wanted, or may be below it."""
        known = self._wanted.objects[candidate.path]
        if candidate.is_itself and known is not None:
            return _object(link) == known
        if candidate.is_there:
            return True
        found = _object(link)
        return found is not None and found[0] == self._wanted.device

    def _candidates(self, text: bytes, namespace: int) -> Iterator[_Candidate]:
        if not text.startswith(b"/"):
            return
        for told in {text, text.removesuffix(_DELETED)}:
            for where, mount_point, root, is_around in self._places:
                below = told[len(mount_point) :]
                if told.startswith(mount_point) and below[:1] in (b"", b"/"):
                    path = b"/".join(filter(None, (root, below.strip(b"/"))))
                    for candidate in self._at_and_above(path, is_there=where == namespace):
                        yield _Candidate(candidate.path, candidate.is_itself and not is_around, candidate.is_there)
            yield from self._at_and_above(told[1:], is_there=False)  # if it was unmounted lazily

    def _at_and_above(self, path: bytes, *, is_there: bool) -> Iterator[_Candidate]:
        wanted = self._wanted.objects
        if path in wanted:
            yield _Candidate(path, is_itself=True, is_there=is_there)
        while path := path.rpartition(b"/")[0]:
            if path in wanted:
                yield _Candidate(path, is_itself=False, is_there=is_there)


def used_paths(mount_points: Sequence[bytes]) -> set[bytes]:
    """Where all objects were found that processes use below these mount points, and the directories above those.

    Of what is mounted elsewhere under the same path too; at most `USED_MAX`.
    """
    prefixes = tuple(point.rstrip(b"/") + b"/" for point in mount_points)
    used: set[bytes] = set()
    for pid in [name for name in os.listdir(b"/proc") if name.isdigit()]:
        for text in _texts(pid):
            for prefix in prefixes:
                if text.startswith(prefix) and len(used) < USED_MAX:
                    used |= _upwards(text[len(prefix) :]) | _upwards(text[len(prefix) :].removesuffix(_DELETED))
    return used - {b""}


def _texts(pid: bytes) -> Iterator[bytes]:
    """Where the objects that a process uses were found."""
    for link, _ in _links(pid):
        yield _readlink(link) or b""
    for _, _, text in set(_mapped(pid)):
        yield text.replace(_NEWLINE, b"\n")


def _upwards(path: bytes) -> set[bytes]:
    parts = path.split(b"/")
    return {b"/".join(parts[:count]) for count in range(1, len(parts) + 1)}


def _links(pid: bytes) -> Iterator[tuple[bytes, str]]:
    for name, how in _LINKS:
        yield b"/proc/%b/%b" % (pid, name), how
    for number in _list(b"/proc/%b/fd" % pid):
        yield b"/proc/%b/fd/%b" % (pid, number), "open"


def _mapped(pid: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Device, inode number and path of each mapped file."""
    for line in _read(b"/proc/%b/maps" % pid).splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[5].startswith(b"/"):
            major, _, minor = fields[3].partition(b":")
            yield os.makedev(int(major, 16), int(minor, 16)), int(fields[4]), fields[5]


def _mountinfo(pid: int) -> tuple[MountInfo, ...]:
    try:
        return parse_mountinfo(_read(b"/proc/%d/mountinfo" % pid))
    except WireError:
        return ()


def _layers(mount: MountInfo, view: View) -> Iterator[bytes]:
    """The paths of its layers if it is an overlay."""
    if mount.fstype == OVERLAY:
        for overlay in build_overlays([(view, mount)]):
            yield from overlay.lowerdir
            yield from overlay.data_only
            if overlay.upperdir is not None:
                yield overlay.upperdir


def _namespace(pid: bytes) -> int:
    try:
        return mount_namespace(int(pid))
    except OSError:
        return 0


def _object(link: bytes) -> Object | None:
    try:
        return identity_of(link)
    except OSError:
        return None


def _readlink(path: bytes) -> bytes | None:
    """The text of a link, None if it is too long to be told, empty if the process is gone."""
    try:
        return os.readlink(path)
    except OSError as error:
        return None if error.errno == errno.ENAMETOOLONG else b""


def _list(directory: bytes) -> list[bytes]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _read(path: bytes) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall() or b""
    except OSError:
        return b""
