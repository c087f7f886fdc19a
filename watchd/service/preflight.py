"""What must be true before the daemon starts, each with its own sentence if it is not."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from pathlib import Path

from watchd.errors import NotPermittedError, UnsupportedError, UsageError, WatchdError
from watchd.kernel.capabilities import missing_capabilities
from watchd.kernel.mounts import fspick

CAPABILITIES = {"CAP_DAC_READ_SEARCH": 2, "CAP_SYS_ADMIN": 21}
"""Without these nothing works (capabilities(7)); more are wanted for other namespaces."""

LOCK_NAME = "watchd.lock"


def check_capabilities() -> None:
    """Raises NotPermittedError if a capability is missing."""
    if missing := missing_capabilities(CAPABILITIES):
        raise NotPermittedError(f"watchd needs {' and '.join(missing)}", remedy="run it as root")


def check_kernel() -> None:
    """Raises UnsupportedError if the kernel cannot reconfigure a superblock."""
    try:
        os.close(fspick(-1))
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise UnsupportedError(
                "this kernel has no fspick(2), so nothing can be invalidated", remedy="use Linux 5.2 or newer"
            ) from None


def make_directory(path: Path, *, key: str, mode: int) -> None:
    """Make sure that one of our directories exists and can be used. Raises WatchdError."""
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        remedy = f"make it a directory that root can write, or set {key} to another one"
        cls = NotPermittedError if isinstance(error, PermissionError) else WatchdError
        raise cls(f"{key} {path} cannot be used: {error.strerror}", remedy=remedy) from None


def lock_runtime(directory: Path) -> int:
    """One daemon for each runtime directory; returns the descriptor that holds the lock. Raises UsageError."""
    descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise UsageError(
            f"a watchd runs already in {directory}" + (f", process {holder}" if holder.isdigit() else ""),
            remedy="stop it, or give this one another runtime_directory and state_directory",
        ) from None
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    return descriptor


def barrier_directory(runtime: Path) -> Path:
    """An empty directory of ours whose events serve as barriers."""
    path = runtime / "barrier"
    path.mkdir(mode=0o700, exist_ok=True)
    for leftover in path.iterdir():
        leftover.unlink()
    return path


def raise_limits() -> None:
    """Use as many descriptors as we are allowed to."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
