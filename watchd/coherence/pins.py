"""Who holds the objects of a merged mount that stay stale.

Facts (proc(5))
* A dentry that is in use survives every invalidation. It is used by open files (/proc/<pid>/fd), by working and root
  directories, by the running program (exe) and by what is mapped (maps).
* The text of these links is the path at which the object was found, with " (deleted)" behind it once its dentry left the
  cache; for a process in another mount namespace it is the path in that namespace. In maps only a newline is escaped.
* An inotify watch holds an inode: fdinfo of its descriptor shows `inotify wd:1 ino:<hex> sdev:<hex>`, where sdev is the
  superblock's device, major << 20 | minor.
* Looking through all processes takes about 1 ms for each 20 of them; so it is done for what stays stale only, and never in a
  source's thread.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

USED_MAX = 100_000
"""Somebody who opens more files than that keeps the audit from trying all of them, not from ending."""

_DELETED = b" (deleted)"
_WATCH = re.compile(rb"^inotify wd:\S+ ino:([0-9a-f]+) sdev:([0-9a-f]+) ", re.MULTILINE)
_INOTIFY_LINK = b"anon_inode:inotify"
_LINKS = ((b"cwd", "cwd"), (b"root", "root"), (b"exe", "exe"))


class Holder(msgspec.Struct, frozen=True, order=True):
    """A process that uses an object."""

    pid: int
    command: str
    how: str
    """open, cwd, root, mapped, exe or watch."""


class Wanted(msgspec.Struct, frozen=True):
    """What to look for: objects of one overlay."""

    device: int
    """st_dev of the superblock."""
    mount_points: Sequence[bytes]
    inodes: Mapping[bytes, int]
    """Path below the mount -> inode number as the mount shows it; 0 if it cannot be seen."""


def find_holders(wanted: Wanted) -> dict[bytes, tuple[Holder, ...]]:
    """The processes that use each path or, if it is a directory, something below it. Those that end meanwhile are left out."""
    found: dict[bytes, set[Holder]] = {}
    prefixes = tuple(point.rstrip(b"/") + b"/" for point in wanted.mount_points)
    watched = {inode: path for path, inode in wanted.inodes.items() if inode}
    for pid in [name for name in os.listdir(b"/proc") if name.isdigit()]:
        uses = {(path, how) for link, how in _links(pid) for path in _concerned(link, prefixes, wanted.inodes)}
        uses |= {(path, "watch") for path in _watches(pid, wanted.device, watched)}
        if uses:
            command = _command(pid)
            for path, how in uses:
                found.setdefault(path, set()).add(Holder(int(pid), command, how))
    return {path: tuple(sorted(holders)) for path, holders in found.items()}


def used_paths(mount_points: Sequence[bytes]) -> set[bytes]:
    """Where all objects were found that processes use below these mount points, and the directories above those.

    Of what is mounted elsewhere under the same path too; at most `USED_MAX`.
    """
    prefixes = tuple(point.rstrip(b"/") + b"/" for point in mount_points)
    used: set[bytes] = set()
    for pid in [name for name in os.listdir(b"/proc") if name.isdigit()]:
        for link, _ in _links(pid):
            for prefix in prefixes:
                if link.startswith(prefix) and len(used) < USED_MAX:
                    used |= _upwards(link[len(prefix) :]) | _upwards(link[len(prefix) :].removesuffix(_DELETED))
    return used - {b""}


def _upwards(path: bytes) -> set[bytes]:
    parts = path.split(b"/")
    return {b"/".join(parts[:count]) for count in range(1, len(parts) + 1)}


def _concerned(link: bytes, prefixes: Iterable[bytes], paths: Mapping[bytes, int]) -> Iterator[bytes]:
    """The wanted paths that an object at `link` is, or lies below of."""
    for prefix in prefixes:
        if link.startswith(prefix):
            path = link[len(prefix) :].removesuffix(_DELETED)
            while path:
                if path in paths:
                    yield path
                path = path.rpartition(b"/")[0]


def _links(pid: bytes) -> Iterator[tuple[bytes, str]]:
    for name, how in _LINKS:
        if link := _readlink(b"/proc/%b/%b" % (pid, name)):
            yield link, how
    for _, link in _descriptors(pid):
        yield link, "open"
    for line in _read(b"/proc/%b/maps" % pid).splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[5].startswith(b"/"):
            yield fields[5].replace(rb"\012", b"\n"), "mapped"


def _descriptors(pid: bytes) -> Iterator[tuple[bytes, bytes]]:
    directory = b"/proc/%b/fd" % pid
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        if link := _readlink(directory + b"/" + name):
            yield name, link


def _watches(pid: bytes, device: int, watched: Mapping[int, bytes]) -> Iterator[bytes]:
    if not watched:
        return
    superblock = os.major(device) << 20 | os.minor(device)
    for descriptor, link in _descriptors(pid):
        if link == _INOTIFY_LINK:
            for inode, sdev in _WATCH.findall(_read(b"/proc/%b/fdinfo/%b" % (pid, descriptor))):
                if int(sdev, 16) == superblock and int(inode, 16) in watched:
                    yield watched[int(inode, 16)]


def _command(pid: bytes) -> str:
    return os.fsdecode(_read(b"/proc/%b/comm" % pid).rstrip(b"\n"))


def _readlink(path: bytes) -> bytes:
    try:
        return os.readlink(path)
    except OSError:
        return b""


def _read(path: bytes) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall() or b""
    except OSError:
        return b""
