"""The bare loop: reads fanotify and reconfigures the superblocks of merged mounts on every batch, without
looking.

This is the least that can heal a merged mount, and so the floor of the latency. It needs a lower that nothing
else changes, and it flushes for everything.
"""

from __future__ import annotations

import os
import sys

from tests.bench.baselines import fanotify
from tests.bench.baselines.protocol import say_ready

SYS_FSCONFIG = 431
SYS_FSPICK = 433
FSPICK_CLOEXEC = 0x1
FSPICK_SYMLINK_NOFOLLOW = 0x2
FSCONFIG_CMD_RECONFIGURE = 7
READ_SIZE = 1 << 20


def reconfigure(merged: bytes) -> None:
    """Drop the cached names of the superblock that is mounted at `merged`."""
    flags = FSPICK_CLOEXEC | FSPICK_SYMLINK_NOFOLLOW
    context = fanotify.check(fanotify.libc.syscall(SYS_FSPICK, fanotify.AT_FDCWD, merged, flags))
    try:
        fanotify.check(fanotify.libc.syscall(SYS_FSCONFIG, context, FSCONFIG_CMD_RECONFIGURE, None, None, 0))
    finally:
        os.close(context)


def main() -> None:
    """Usage: reconfigure_loop LOWER MERGED...."""
    root, *mounts = map(os.fsencode, sys.argv[1:])
    group = fanotify.watch_filesystem(root)
    say_ready()
    while True:
        os.read(group, READ_SIZE)
        for merged in mounts:
            reconfigure(merged)


if __name__ == "__main__":
    main()
