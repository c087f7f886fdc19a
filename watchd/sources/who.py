"""Which command a process id stood for when a change was made.

Facts
* The metadata of a fanotify event has the id of the process (not of the thread), as it is in the pid namespace of whoever
  reads; 0 for a process that has none there. inotify tells nothing.
* An event does not keep the process. One that ended is gone from /proc as soon as its parent has waited for it, and its id
  may be given to another. Ids are given in a circle, so that takes as many new processes as there are ids (pid_max, 32 768
  at the least unless somebody lowered it) between the event and the reading of it.
* /proc/PID/stat is `pid (comm) state ...`: comm is up to 15 bytes of any kind, parentheses and newlines too, and the 22nd
  field is when the process began, in clock ticks of CLOCK_BOOTTIME. One read is of one process. Unlike cmdline it does not
  wait for the process's memory, so nobody can make us wait.
* comm is what the process calls itself now: after an execve it is the new program's.
"""

from __future__ import annotations

import os
import time

LOOKUPS_MAX = 1000
"""So many processes of one batch are looked up, at about 10 us each; the others keep their id only."""

OWN_COMMAND = b"watchd"
"""What we are called ourselves, however we were started."""

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_STAT_BYTES = 1024
_START_TIME = 22 - 3
"""Index of starttime among the fields behind comm."""


def shows_our_ids() -> bool:
    """Whether the ids in /proc are those of our pid namespace."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


class Commands:
    """The commands of the processes of one batch, each looked up once. To be asked soon after the events were read."""

    def __init__(self, *, read_ns: int | None = None) -> None:
        """`read_ns`: CLOCK_BOOTTIME when the events had been read; now, if not given."""
        self._read_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) if read_ns is None else read_ns
        self._known: dict[int, bytes | None] = {os.getpid(): OWN_COMMAND}

    def of(self, pid: int) -> bytes | None:
        """The command of a process that made a change before the events were read; None when that cannot be known."""
        if pid not in self._known:
            self._known[pid] = self._look_up(pid) if len(self._known) <= LOOKUPS_MAX else None
        return self._known[pid]

    def _look_up(self, pid: int) -> bytes | None:
        found = read_stat(pid)
        if found is None:
            return None
        command, started_ns = found
        return command if started_ns <= self._read_ns else None


def read_stat(pid: int) -> tuple[bytes, int] | None:
    """comm, and CLOCK_BOOTTIME when the process began, rounded down to a clock tick; None when there is no such process."""
    try:
        descriptor = os.open(b"/proc/%d/stat" % pid, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        stat = os.read(descriptor, _STAT_BYTES)
    except OSError:  # ESRCH: it ended in between
        return None
    finally:
        os.close(descriptor)
    command = stat[stat.index(b"(") + 1 : stat.rindex(b")")]
    fields = stat[stat.rindex(b")") + 1 :].split()
    return command, int(fields[_START_TIME]) * _TICK_NS
