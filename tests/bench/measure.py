"""Numbers about processes and about this machine.

Facts: clock_gettime(2) takes the CPU clock of another process as clock id `(~pid << 3) | 2` (CPUCLOCK_SCHED,
the same as clock_getcpuclockid(3) gives): user and system time of all its threads in nanoseconds, where
/proc/PID/stat has ticks of 10 ms. VmHWM of /proc/PID/status is the highest RSS so far.
"""

from __future__ import annotations

import errno
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

CPUCLOCK_SCHED = 2


class Memory(msgspec.Struct, frozen=True):
    """Resident set of a process."""

    rss_bytes: int
    peak_bytes: int


def cpu_ns(pid: int) -> int:
    """User and system time of all threads of a process so far. Raises OSError when it is gone."""
    return time.clock_gettime_ns(~pid << 3 | CPUCLOCK_SCHED)


def memory(pid: int) -> Memory:
    """RSS and peak RSS of a process. Raises OSError when it is gone."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    if "VmRSS" not in fields:
        raise ProcessLookupError(errno.ESRCH, "the process has ended", pid)
    rss_kib, peak_kib = (int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return Memory(rss_kib << 10, peak_kib << 10)


def filesystem_of(path: Path) -> str:
    """The type of the filesystem that holds `path`, as mountinfo has it (proc_pid_mountinfo(5)), and its device."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, filesystem = line.partition(" - ")
        if mount.split()[2] == wanted:
            return " on ".join(filesystem.split()[:2])
    return f"an unknown filesystem, device {wanted}"


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of `values` do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)  # rounded up
    return ordered[max(int(rank), 1) - 1]


def machine() -> dict[str, str | int]:
    """What the numbers depend on."""
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
