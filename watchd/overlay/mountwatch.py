"""Telling that mounts came or went.

Facts (measured on 6.18)
* fanotify groups with FAN_REPORT_MNT (6.15) take marks on mount namespaces, one on any number of them. The mark of a
  namespace neither keeps it alive nor any of its mounts busy: when the last process leaves, every mount is told as detached
  and the mark is gone. Marking again what is marked changes nothing and takes 6 us.
* Told are mounts, umounts (lazy ones too) and moves; a remount is not. Records name a mount by an id that means nothing to
  mountinfo, so all we learn is "look again". An overflow says the same.
* Without it, a descriptor on /proc/self/mountinfo has POLLPRI|POLLERR after a change in the namespace where it was opened;
  polling is what takes the event off. It pins its namespace, so it is only ever opened on our own. An epoll descriptor that
  holds it is plainly readable, and readiness is told once per change.
* Neither tells of new namespaces: `find_namespaces` has to be asked now and then.
"""

from __future__ import annotations

import os
import select
from collections.abc import Mapping

from watchd.kernel.fanotify import (
    FAN_MARK_ADD,
    FAN_MARK_MNTNS,
    FAN_MNT_ATTACH,
    FAN_MNT_DETACH,
    FAN_REPORT_MNT,
    FAN_UNLIMITED_MARKS,
    fanotify_init,
    fanotify_mark,
)
from watchd.kernel.namespaces import mount_namespace

_READ_BYTES = 65536
_READS_PER_DRAIN = 64


class MountWatch:
    """Readable when mounts of a watched namespace came or went. Owns its descriptors until `close`.

    `group`: a notification group that can watch mount namespaces, which becomes ours, or None to do without.
    """

    def __init__(self, group: int | None) -> None:
        self._group = group
        self._mountinfo: int | None = None
        self._epoll: select.epoll | None = None
        self._own = mount_namespace()
        if group is None:
            self._mountinfo = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
            self._epoll = select.epoll()
            self._epoll.register(self._mountinfo, select.EPOLLPRI)

    @classmethod
    def open(cls) -> MountWatch:
        """A watch of our own namespace, by what this kernel has and permits."""
        return cls(_probe_group())

    def fileno(self) -> int:
        """To be polled for reading."""
        if self._group is not None:
            return self._group
        assert self._epoll is not None, "closed"
        return self._epoll.fileno()

    def watch(self, namespaces: Mapping[int, int]) -> frozenset[int]:
        """Watch these too (inode number -> a process in it), and return those that cannot be: look at them in intervals.

        To be called with everything that `find_namespaces` found, each time: a number may mean another namespace by now.
        What was mounted before the call is not told, so read the mounts after it.
        """
        if self._group is None:
            return frozenset(namespaces) - {self._own}
        unwatched = set()
        for namespace, pid in namespaces.items():
            try:
                _mark(self._group, pid)
            except FileNotFoundError:
                continue  # the process is gone; if others are there, the next look names one of them
            except OSError:
                unwatched.add(namespace)
        return frozenset(unwatched)

    def drain(self) -> None:
        """Take off what made us readable. Mounts may have changed whenever we were."""
        if self._epoll is not None:
            self._epoll.poll(0)
        elif self._group is not None:
            try:
                # Bounded, because somebody who mounts in a loop must not keep us here: what is left keeps us readable.
                for _ in range(_READS_PER_DRAIN):
                    os.read(self._group, _READ_BYTES)
            except BlockingIOError:
                pass

    def close(self) -> None:
        """Give up the descriptors; harmless when done already."""
        if self._epoll is not None:
            self._epoll.close()
        for fd in (self._group, self._mountinfo):
            if fd is not None:
                os.close(fd)
        self._epoll = self._group = self._mountinfo = None


def _probe_group() -> int | None:
    try:
        group = fanotify_init(FAN_REPORT_MNT | FAN_UNLIMITED_MARKS)
    except OSError:
        return None
    try:
        _mark(group, os.getpid())
    except OSError:
        os.close(group)
        return None
    return group


def _mark(group: int, pid: int) -> None:
    fanotify_mark(group, FAN_MARK_ADD | FAN_MARK_MNTNS, FAN_MNT_ATTACH | FAN_MNT_DETACH, path=b"/proc/%d/ns/mnt" % pid)
