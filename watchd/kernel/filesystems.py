"""What kind of filesystem a directory is on.

Facts
* `f_type` is the first word of struct statfs, a long on all 64-bit machines.
* FS_IOC_GETFSUUID (6.9) answers for every filesystem that has a uuid, ENOTTY where there is none or the kernel is older.
  It is an ioctl, so it wants a descriptor that is not O_PATH.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

from watchd.kernel.libc import function

_FS_IOC_GETFSUUID = 0x80111500
_SIZE_OF_STATFS_BYTES = 256

_fstatfs = function("fstatfs", ctypes.c_int, ctypes.c_char_p)
_word = struct.Struct("@L")


def filesystem_magic(fd: int) -> int:
    """f_type of fstatfs(2); O_PATH will do. Raises OSError."""
    buffer = ctypes.create_string_buffer(_SIZE_OF_STATFS_BYTES)
    _fstatfs(fd, buffer)
    return int(_word.unpack_from(buffer)[0])


def filesystem_uuid(dirfd: int) -> bytes | None:
    """The uuid of the superblock that the directory (O_PATH will do) is on, None where it cannot be had."""
    try:
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dirfd)
    except OSError:
        return None
    try:
        answer = fcntl.ioctl(directory, _FS_IOC_GETFSUUID, bytes(17))
    except OSError:
        return None
    finally:
        os.close(directory)
    return answer[1:17] if answer[0] == 16 else None
