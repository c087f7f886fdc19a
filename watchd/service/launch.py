"""A file of its own that becomes a command of the configuration: `python -I -S launch.py COMMAND [ARGUMENT…]`.

Facts: execve(2) waits for the filesystem that the command lies on. subprocess waits for execve, in some 3.11 releases with the
interpreter's lock held, and until then nobody knows whom to kill. So the daemon executes Python, which is there for sure, and
this process waits in its place. It also takes back what the daemon has for itself and a child inherits: a limit of
descriptors that makes programs slow which close them all, its rank when memory is short, and the signals that Python ignores.

Imports nothing of watchd, so that it begins quickly.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys

NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""Exit statuses, as those of a shell."""

DESCRIPTORS = 1024
"""The soft limit that every process has by default."""


def main(command: list[str]) -> int:
    """Becomes the command; returns only if it cannot."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "wb") as score:
        score.write(b"0")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(DESCRIPTORS, hard), hard))
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
