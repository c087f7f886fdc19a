"""The few system calls that the fanotify baselines share.

Facts: one FAN_MARK_FILESYSTEM covers the whole filesystem whatever its size. With FAN_REPORT_DFID_NAME_TARGET
every record carries the handle of the directory, the name in it, and the handle of the child.
FAN_UNLIMITED_QUEUE never overflows. The mount fd that open_by_handle_at takes must not be O_PATH.
(fanotify_init(2), fanotify_mark(2), linux/fanotify.h)
"""

from __future__ import annotations

import ctypes
import os

FAN_CLOEXEC = 0x1
FAN_CLASS_NOTIF = 0x0
FAN_UNLIMITED_QUEUE = 0x10
FAN_REPORT_DFID_NAME_TARGET = 0x1E00

FAN_MARK_ADD = 0x1
FAN_MARK_FILESYSTEM = 0x100

FAN_MODIFY = 0x2
FAN_ATTRIB = 0x4
FAN_CLOSE_WRITE = 0x8
FAN_CREATE = 0x100
FAN_DELETE = 0x200
FAN_Q_OVERFLOW = 0x4000
FAN_RENAME = 0x10000000
FAN_ONDIR = 0x40000000
MASK = FAN_CREATE | FAN_DELETE | FAN_RENAME | FAN_MODIFY | FAN_CLOSE_WRITE | FAN_ATTRIB | FAN_ONDIR

AT_FDCWD = -100

libc = ctypes.CDLL(None, use_errno=True)
libc.fanotify_init.argtypes = [ctypes.c_uint, ctypes.c_uint]
libc.fanotify_mark.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p]
libc.open_by_handle_at.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
libc.syscall.restype = ctypes.c_long


def check(result: int) -> int:
    """Return a system call's result, or raise OSError when it failed."""
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def watch_filesystem(root: bytes) -> int:
    """A blocking fanotify fd that reports every change on the filesystem of `root`."""
    flags = FAN_CLASS_NOTIF | FAN_CLOEXEC | FAN_UNLIMITED_QUEUE | FAN_REPORT_DFID_NAME_TARGET
    group: int = check(libc.fanotify_init(flags, os.O_RDONLY | os.O_CLOEXEC))
    check(libc.fanotify_mark(group, FAN_MARK_ADD | FAN_MARK_FILESYSTEM, MASK, AT_FDCWD, root))
    return group


def directory_path(mount_fd: int, handle: bytes) -> bytes:
    """The path of the directory behind a file_handle (`<Ii` header and handle), b"" if it is gone."""
    fd = libc.open_by_handle_at(mount_fd, handle, os.O_PATH | os.O_CLOEXEC)
    if fd < 0:
        return b""
    try:
        return os.readlink(b"/proc/self/fd/%d" % fd)
    finally:
        os.close(fd)
