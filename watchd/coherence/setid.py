"""Does a program of a merged mount still run setuid or setgid?

Facts
* The bits that count are those of the cached inode (fs/exec.c, bprm_fill_uid). stat(2), access(2) and execveat(2) with
  AT_EXECVE_CHECK do not show them; execve does.
* A traced process stops at the end of its execve, before the first instruction of the new program (ptrace(2)). A tracer with
  CAP_SYS_PTRACE does not keep the bits from counting. So /proc/<pid>/status tells what they gave, and nothing of the program
  ever runs. It takes 1.5 ms.
* Nothing on a detached mount runs setuid (fs/namespace.c, mnt_may_suid), so the clone is attached in a mount namespace of our
  own.
* fork(2) is for processes with one thread only, hence a helper: `python -m watchd.coherence.setid FD`. It reads paths, each
  ended by a NUL, and answers each with a line: the user and the group that the program would have run as, or `-`.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from watchd.coherence.access import NOBODY
from watchd.kernel.files import O_PATH_NOFOLLOW
from watchd.kernel.libc import AT_FDCWD
from watchd.kernel.mounts import AT_RECURSIVE, MS_PRIVATE, mount_setattr, move_mount
from watchd.kernel.namespaces import CLONE_NEWNS, unshare
from watchd.kernel.trace import execute, trace_me


class Identity(NamedTuple):
    """As whom a program runs that nobody executes."""

    uid: int
    gid: int


class Prober:
    """A helper that finds out as whom programs of one mount run."""

    def __init__(self, clone: int) -> None:
        """`clone` is a detached clone of the mount (given away). Raises OSError."""
        # -P, because the working directory, from which -m would import first, may be a tenant's.
        command = [sys.executable, "-P", "-m", "watchd.coherence.setid", str(clone)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        pipe = subprocess.PIPE
        try:
            self._helper = subprocess.Popen(command, stdin=pipe, stdout=pipe, pass_fds=[clone], env=environment)
        finally:
            os.close(clone)

    def close(self) -> None:
        """End it."""
        self._helper.communicate()

    def runs_as(self, path: bytes) -> Identity | None:
        """None if it cannot be executed by nobody. Raises OSError if the helper is gone."""
        assert self._helper.stdin is not None
        assert self._helper.stdout is not None
        self._helper.stdin.write(path + b"\0")
        self._helper.stdin.flush()
        answer = self._helper.stdout.readline().split()
        if not answer:
            raise OSError("setuid programs cannot be tried")
        return Identity(int(answer[0]), int(answer[1])) if len(answer) == 2 else None

    def is_stale(self, path: bytes, real: os.stat_result) -> bool:
        """Whether the program at `path` runs with a bit that the lower's file has not."""
        identity = self.runs_as(path)
        if identity is None:
            return False
        gained_user = identity.uid != NOBODY and not real.st_mode & stat.S_ISUID
        return gained_user or (identity.gid != NOBODY and not real.st_mode & stat.S_ISGID)


# ---- the helper -----------------------------------------------------------------------------------------------------


def _attach(clone: int) -> None:
    """Attach a detached mount in a mount namespace of our own; where does not matter, it is used by its descriptor."""
    unshare(CLONE_NEWNS)
    mount_setattr(AT_FDCWD, b"/", propagation=MS_PRIVATE, flags=AT_RECURSIVE)
    move_mount(clone, AT_FDCWD, b"/")


def _try(mount: int, path: bytes) -> Identity | None:
    child = os.fork()
    if child == 0:
        _execute(mount, path)
    _, status = os.waitpid(child, 0)
    if not os.WIFSTOPPED(status):
        return None
    try:
        with open(f"/proc/{child}/status", "rb") as file:
            fields = dict(line.split(b":", 1) for line in file)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return Identity(int(fields[b"Uid"].split()[1]), int(fields[b"Gid"].split()[1]))


def _execute(mount: int, path: bytes) -> None:
    """Be traced, be nobody, and stop at the first instruction of the program. Does not return."""
    try:
        program = os.open(path, O_PATH_NOFOLLOW, dir_fd=mount)
        trace_me()
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        execute(program, [b"program"])
    finally:
        os._exit(1)


def main() -> None:
    """The helper."""
    mount = int(sys.argv[1])
    try:
        _attach(mount)
    except OSError:
        return  # who asks finds nobody there
    pending = b""
    while data := os.read(0, 65536):
        *paths, pending = (pending + data).split(b"\0")
        for path in paths:
            identity = _try(mount, path)
            os.write(1, b"%d %d\n" % identity if identity else b"-\n")


if __name__ == "__main__":
    main()
