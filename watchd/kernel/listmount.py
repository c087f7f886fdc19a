"""listmount(2) and statmount(2) (6.8): the mounts of a namespace by ids that are never used again, without walking any path.

Facts (include/uapi/linux/mount.h, nsfs.h)
* Whoever resolves a path holds the mount that it ends in for a moment, and an umount in that moment is told EBUSY. These two
  hold none.
* struct mnt_id_req: size u32, unused u32, mnt_id u64, param u64, and since 6.11 mnt_ns_id u64 (0: the caller's namespace). For
  listmount mnt_id may be LSMT_ROOT, and param is the last id that is known already; for statmount param is what is asked for.
* struct statmount: mask u64 at 8, sb_dev_major and sb_dev_minor u32 at 16.
* ioctl NS_GET_MNTNS_ID (6.11) of an ns/mnt file gives the id for mnt_ns_id.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys

from watchd.kernel.libc import system_call

LSMT_ROOT = 0xFFFF_FFFF_FFFF_FFFF
STATMOUNT_SB_BASIC = 0x1
NS_GET_MNTNS_ID = 0x8008B705

_request = struct.Struct("=IIQQQ")
_device = struct.Struct("=QII")
_BATCH = 512
_BYTES = 512

_statmount = system_call(457, "statmount", ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint)
_listmount = system_call(458, "listmount", ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint)


def mount_namespace_id(pid: int) -> int:
    """What mnt_ns_id of a process's mount namespace is. Raises OSError."""
    descriptor = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        answer = fcntl.ioctl(descriptor, NS_GET_MNTNS_ID, bytes(8))
    finally:
        os.close(descriptor)
    return int.from_bytes(answer, sys.byteorder)


def listmount(namespace: int) -> list[int]:
    """The ids of all mounts of the namespace with this mnt_ns_id. Raises OSError (ENOSYS: not this kernel)."""
    found: list[int] = []
    buffer = ctypes.create_string_buffer(8 * _BATCH)
    while True:
        request = _request.pack(_request.size, 0, LSMT_ROOT, found[-1] if found else 0, namespace)
        count = _listmount(request, buffer, _BATCH, 0)
        found += struct.unpack_from(f"={count}Q", buffer.raw)
        if count < _BATCH:
            return found


def statmount_device(mount: int, namespace: int) -> int:
    """st_dev of what is mounted. Raises OSError (ENOENT: it is gone)."""
    buffer = ctypes.create_string_buffer(_BYTES)
    request = _request.pack(_request.size, 0, mount, STATMOUNT_SB_BASIC, namespace)
    _statmount(request, buffer, _BYTES, 0)
    _, major, minor = _device.unpack_from(buffer.raw, 8)
    return os.makedev(major, minor)
