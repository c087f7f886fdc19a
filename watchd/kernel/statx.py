"""statx(2), for what stat(2) does not tell: the mount that an object is seen through, and when it was born.

Facts (include/uapi/linux/stat.h): struct statx has 256 bytes; stx_mask u32 at 0, stx_ino u64 at 32, stx_btime (i64 seconds,
u32 nanoseconds) at 80, stx_dev_major and stx_dev_minor u32 at 136, stx_mnt_id u64 at 144. STATX_MNT_ID (5.8) gives the id that
mountinfo shows, which is used again after an umount; STATX_MNT_ID_UNIQUE (6.8) puts one in its place that never is. Device and
mount id come from the VFS, so with AT_STATX_DONT_SYNC the root of a mount answers even where the server of its filesystem
hangs. libc calls it without holding the object open.
"""

from __future__ import annotations

import ctypes
import os
import struct

from watchd.kernel.libc import AT_EMPTY_PATH, AT_FDCWD, AT_SYMLINK_NOFOLLOW, function

AT_STATX_DONT_SYNC = 0x4000
STATX_INO = 0x100
STATX_BTIME = 0x800
STATX_MNT_ID = 0x1000
STATX_MNT_ID_UNIQUE = 0x4000

_BYTES = 256
_mask = struct.Struct("=I")
_btime = struct.Struct("=qI")
_ino = struct.Struct("=Q")
_device = struct.Struct("=II")
_mnt_id = struct.Struct("=Q")

_statx = function("statx", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)


def _call(dirfd: int, path: bytes, flags: int, mask: int) -> tuple[bytes, int]:
    buffer = ctypes.create_string_buffer(_BYTES)
    _statx(dirfd, path, flags, mask, buffer)
    return buffer.raw, _mask.unpack_from(buffer.raw, 0)[0]


def birth_time_ns(name: bytes, dirfd: int) -> int | None:
    """When an object (a symlink itself) was born, CLOCK_REALTIME; None where the filesystem does not keep it."""
    data, given = _call(dirfd, name, AT_SYMLINK_NOFOLLOW | (0 if name else AT_EMPTY_PATH), STATX_BTIME)
    if not given & STATX_BTIME:
        return None
    seconds, nanoseconds = _btime.unpack_from(data, 80)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def mount_of(path: bytes) -> tuple[int, int]:
    """st_dev and `mount_id` of what is mounted at `path`, without asking a server for anything. Raises OSError."""
    data, given = _call(AT_FDCWD, path, AT_STATX_DONT_SYNC, STATX_MNT_ID_UNIQUE | STATX_MNT_ID)
    device = os.makedev(*_device.unpack_from(data, 136))
    return device, int(_mnt_id.unpack_from(data, 144)[0]) if given & (STATX_MNT_ID_UNIQUE | STATX_MNT_ID) else 0


def identity_of(path: bytes) -> tuple[int, int]:
    """(st_dev, st_ino) of what a magic link in /proc leads to, as stat(2) shows them, without asking a server for anything.

    Raises OSError."""
    data, _ = _call(AT_FDCWD, path, AT_STATX_DONT_SYNC, STATX_INO)
    return os.makedev(*_device.unpack_from(data, 136)), int(_ino.unpack_from(data, 32)[0])


def mount_id(path: bytes) -> int:
    """The mount that `path` is seen through, never used again where the kernel can tell. Raises OSError."""
    data, given = _call(AT_FDCWD, path, 0, STATX_MNT_ID_UNIQUE | STATX_MNT_ID)
    return int(_mnt_id.unpack_from(data, 144)[0]) if given & (STATX_MNT_ID_UNIQUE | STATX_MNT_ID) else 0


def shown_mount_id(dirfd: int, path: bytes = b"") -> int:
    """The id that mountinfo shows for the mount that `path` is seen through; asks no remote filesystem. Raises OSError."""
    data, _ = _call(dirfd, path, AT_STATX_DONT_SYNC | (0 if path else AT_EMPTY_PATH), STATX_MNT_ID)
    return int(_mnt_id.unpack_from(data, 144)[0])
