"""Drop what one overlay superblock has cached.

Facts: a reconfigure without options runs shrink_dcache_sb() for this superblock only and changes no flag; about 12 us when the
cache is empty and 0.1 ms for 1 000 cached dentries. The flag `ro` must be given if and only if the superblock is read-only:
without it a read-only overlay answers EROFS (its cache is dropped by then), with it a writable one would become read-only. It
covers all mounts of the superblock in all namespaces. EBUSY while frozen. What is in use is not dropped.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from watchd.coherence.target import Target
from watchd.errors import MountError, NotPermittedError
from watchd.kernel.mounts import FSCONFIG_CMD_RECONFIGURE, FSCONFIG_SET_FLAG, fsconfig, fspick


def invalidate(merged: int, *, read_only: bool) -> None:
    """Reconfigure the superblock of `merged`, the root of one of its mounts. Raises NotPermittedError, MountError."""
    try:
        context = fspick(merged)
        try:
            if read_only:
                fsconfig(context, FSCONFIG_SET_FLAG, b"ro")
            fsconfig(context, FSCONFIG_CMD_RECONFIGURE)
        finally:
            os.close(context)
    except PermissionError:
        raise NotPermittedError("invalidating needs CAP_SYS_ADMIN", remedy="run it as root") from None
    except OSError as error:
        raise MountError(f"cannot invalidate: {error.strerror}") from None


def invalidate_around(targets: Iterable[Target]) -> None:
    """Drop what overlays around one hold of it, outermost first. One that cannot be had is gone, or fails its own round."""
    for target in targets:
        with contextlib.suppress(MountError):
            merged = target.open()
            try:
                invalidate(merged, read_only=target.read_only)
            finally:
                os.close(merged)
