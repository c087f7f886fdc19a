"""The crudest cure: reads fanotify and drops the caches of the whole host on every batch.

Facts: writing 2 to /proc/sys/vm/drop_caches frees dentries and inodes of every filesystem (proc_sys_vm(5)).
"""

from __future__ import annotations

import os
import sys

from tests.bench.baselines import fanotify
from tests.bench.baselines.protocol import say_ready

READ_SIZE = 1 << 20


def main() -> None:
    """Usage: drop_caches_loop LOWER."""
    group = fanotify.watch_filesystem(os.fsencode(sys.argv[1]))
    switch = os.open("/proc/sys/vm/drop_caches", os.O_WRONLY | os.O_CLOEXEC)
    say_ready()
    while True:
        os.read(group, READ_SIZE)
        os.pwrite(switch, b"2", 0)


if __name__ == "__main__":
    main()
