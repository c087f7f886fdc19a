"""Drop every filesystem's cached dentries and inodes, on the whole host: the last resort.

Facts
* Writing 2 to /proc/sys/vm/drop_caches runs the shrinkers of dentries and inodes; 1 would drop the page cache too. What is in
  use stays, so it heals what an invalidation heals, and nothing that is pinned (Documentation/admin-guide/sysctl/vm.rst).
* Everybody pays: a neighbour's walk of 200 000 warm files took 0.40 s before and 2.2 s after. So it is limited in rate, for all
  mounts together.
* systemd's ProtectKernelTunables= mounts /proc/sys read-only (EROFS); without CAP_SYS_ADMIN in the first user namespace
  opening it is EACCES or EPERM.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable

from watchd.errors import MountError, NotPermittedError, RefusedError

_PATH = "/proc/sys/vm/drop_caches"
_DENTRIES_AND_INODES = b"2\n"


class DropCaches:
    """One for all mounts, to be used from any thread."""

    def __init__(
        self, interval_ns: int, *, path: str = _PATH, monotonic_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        """At most one drop in `interval_ns`. `path` and `monotonic_ns` are for tests."""
        self.interval_ns = interval_ns
        """May be changed at any time."""
        self._path = path
        self._monotonic_ns = monotonic_ns
        self._lock = threading.Lock()
        self._last_ns: int | None = None
        self.count = 0
        """How often the caches were dropped."""
        self.refused = 0
        """How often it was asked for too early."""

    def drop(self) -> None:
        """Write 2 to vm.drop_caches; returns when the kernel is done.

        Raises RefusedError if the interval since the last drop is not over, NotPermittedError if it must not be written,
        MountError if it cannot be.
        """
        with self._lock:
            now_ns = self._monotonic_ns()
            next_ns = now_ns if self._last_ns is None else self._last_ns + self.interval_ns
            if now_ns < next_ns:
                self.refused += 1
                wait_s = (next_ns - now_ns) / 1e9
                raise RefusedError(f"the caches were dropped a moment ago; allowed again in {wait_s:.1f} s")
            self._write()
            self.count += 1
            self._last_ns = self._monotonic_ns()

    def _write(self) -> None:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(descriptor, _DENTRIES_AND_INODES)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                remedy = (
                    "run watchd as root, with ProtectKernelTunables=no, or take drop_caches out of coherence.actions"
                )
                raise NotPermittedError(f"{self._path} must not be written: {error.strerror}", remedy=remedy) from error
            raise MountError(f"{self._path}: {error.strerror}") from error
