"""SIGKILL at a file operation of one's choice, for processes that write a journal. What runs in production knows nothing of it.

    python -m tests.crash.mortal NUMBER COMMAND…

runs a command line of watchd's, of which only what follows the word `watchd` counts, in this process, and kills it before its
operation with that number, or in the midst of it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from watchd.journal import disk

OPERATIONS = (
    (disk.RealFile, ("pwrite", "truncate", "sync")),
    (disk.RealDisk, ("open", "rename", "unlink", "make_directory", "sync_directory")),
)


def arm(number: int) -> None:
    """From now on this process may do so many operations."""
    left = number

    def mortal(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: object, *arguments: Any) -> Any:
            nonlocal left
            if not left:
                die(operation, self, arguments)
            left -= 1
            return operation(self, *arguments)

        return run

    for owner, names in OPERATIONS:
        for name in names:
            setattr(owner, name, mortal(getattr(owner, name)))


def die(operation: Callable[..., Any], owner: object, arguments: tuple[Any, ...]) -> None:
    """SIGKILL before the operation; a write is done by half, and everything else after every second time."""
    if operation.__name__ == "pwrite":
        data, offset = arguments
        operation(owner, data[: len(data) // 2], offset)
    elif os.getpid() % 2:
        operation(owner, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    words = sys.argv[2:]
    arm(int(sys.argv[1]))
    from watchd.cli import main

    main(words[words.index("watchd") + 1 :])
