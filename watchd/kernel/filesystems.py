"""What kind of filesystem a directory is on.

Facts
* `f_type` is the first word of struct statfs, a long on all 64-bit machines; its values are those of
  include/uapi/linux/magic.h.
* FS_IOC_GETFSUUID (6.9) answers for every filesystem that has a uuid, ENOTTY where there is none or the kernel is older.
  It is an ioctl, so it wants a descriptor that is not O_PATH.
* ustat(2) finds a superblock by its device number, mounted or not; EINVAL if there is none. The generic table of system calls
  (arm64) lacks it. It takes the number in the encoding of new_encode_dev (include/linux/kdev_t.h).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct

from watchd.kernel.libc import function, quiet_system_call

EXT4_SUPER_MAGIC = 0xEF53
"""Of ext2 and ext3 too."""
XFS_SUPER_MAGIC = 0x58465342
BTRFS_SUPER_MAGIC = 0x9123683E
TMPFS_MAGIC = 0x01021994
SQUASHFS_MAGIC = 0x73717368
EROFS_SUPER_MAGIC = 0xE0F5E1E2
FUSE_SUPER_MAGIC = 0x65735546
OVERLAYFS_SUPER_MAGIC = 0x794C7630
CGROUP_SUPER_MAGIC = 0x27E0EB
CGROUP2_SUPER_MAGIC = 0x63677270
NFS_SUPER_MAGIC = 0x6969

_FS_IOC_GETFSUUID = 0x80111500
_SIZE_OF_STATFS_BYTES = 256

_fstatfs = function("fstatfs", ctypes.c_int, ctypes.c_char_p)
_USTAT = {"x86_64": 136}.get(platform.machine())
_ustat = quiet_system_call(_USTAT, ctypes.c_uint, ctypes.c_char_p) if _USTAT else None
_SIZE_OF_USTAT_BYTES = 32
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


def superblock_is_alive(device: int) -> bool:
    """Whether a superblock with this st_dev exists, mounted or only still in use; True where the kernel cannot tell."""
    if _ustat is None:
        return True
    major, minor = os.major(device), os.minor(device)
    encoded = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
    return _ustat(encoded, ctypes.create_string_buffer(_SIZE_OF_USTAT_BYTES)) != -errno.EINVAL
