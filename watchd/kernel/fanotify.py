"""fanotify(7): the two system calls and the constants that older headers lack.

Facts: a FAN_MARK_FILESYSTEM mark pins nothing, it goes with its superblock; nor does a FAN_MARK_EVICTABLE one, which goes with
its inode from memory. FAN_MARK_IGNORE (6.0) is refused with EINVAL by older kernels. Flags, masks and info types are those of
include/uapi/linux/fanotify.h.
"""

from __future__ import annotations

import ctypes
import os

from watchd.kernel.libc import AT_FDCWD, function

FAN_CLOEXEC = 0x1
FAN_NONBLOCK = 0x2
FAN_CLASS_NOTIF = 0x0
FAN_UNLIMITED_QUEUE = 0x10
FAN_UNLIMITED_MARKS = 0x20
FAN_REPORT_FID = 0x200
FAN_REPORT_DIR_FID = 0x400
FAN_REPORT_NAME = 0x800
FAN_REPORT_TARGET_FID = 0x1000
FAN_REPORT_DFID_NAME_TARGET = FAN_REPORT_FID | FAN_REPORT_DIR_FID | FAN_REPORT_NAME | FAN_REPORT_TARGET_FID
FAN_REPORT_MNT = 0x4000

FAN_MARK_ADD = 0x1
FAN_MARK_REMOVE = 0x2
FAN_MARK_ONLYDIR = 0x8
FAN_MARK_FLUSH = 0x80
FAN_MARK_FILESYSTEM = 0x100
FAN_MARK_MNTNS = 0x110
FAN_MARK_EVICTABLE = 0x200
FAN_MARK_IGNORE = 0x400
FAN_MARK_IGNORE_SURV = FAN_MARK_IGNORE | 0x40

FAN_MODIFY = 0x2
FAN_ATTRIB = 0x4
FAN_CLOSE_WRITE = 0x8
FAN_OPEN = 0x20
FAN_MOVED_FROM = 0x40
FAN_MOVED_TO = 0x80
FAN_CREATE = 0x100
FAN_DELETE = 0x200
FAN_Q_OVERFLOW = 0x4000
FAN_MNT_ATTACH = 0x1000000
FAN_MNT_DETACH = 0x2000000
FAN_EVENT_ON_CHILD = 0x8000000
FAN_RENAME = 0x10000000
FAN_ONDIR = 0x40000000

FAN_EVENT_INFO_TYPE_FID = 1
FAN_EVENT_INFO_TYPE_DFID_NAME = 2
FAN_EVENT_INFO_TYPE_OLD_DFID_NAME = 10
FAN_EVENT_INFO_TYPE_NEW_DFID_NAME = 12

FANOTIFY_METADATA_VERSION = 3

_fanotify_init = function("fanotify_init", ctypes.c_uint, ctypes.c_uint)
_fanotify_mark = function("fanotify_mark", ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)


def fanotify_init(flags: int) -> int:
    """A new notification group, non-blocking; returns an owned descriptor. Raises OSError (EPERM, EMFILE, EINVAL)."""
    return _fanotify_init(flags | FAN_CLASS_NOTIF | FAN_CLOEXEC | FAN_NONBLOCK, os.O_RDONLY | os.O_CLOEXEC)


def fanotify_mark(group: int, flags: int, mask: int, *, dirfd: int = AT_FDCWD, path: bytes = b".") -> None:
    """fanotify_mark(2) of `path` below `dirfd`, which may be O_PATH. Raises OSError."""
    _fanotify_mark(group, flags, mask, dirfd, path)
