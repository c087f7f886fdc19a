"""Looking at files: openat2(2), file handles, access checks as another user; and renaming them without replacing any.

Facts
* openat2 with RESOLVE_CACHED (5.12) answers from the dentry cache alone: EAGAIN means that a component of the path is not
  cached, ENOENT that a negative dentry is cached. It neither fills the cache nor sleeps. Dentries with a d_revalidate that
  refuses RCU walks (cgroup, FUSE, NFS and overlays over them) answer EAGAIN even when cached.
* name_to_handle_at with AT_HANDLE_FID (6.5; answered by every overlay since 6.6) gives the identity of the object that an
  overlay resolves to now (kernel source: fs/overlayfs/export.c). AT_HANDLE_FID has the value of AT_REMOVEDIR.
* A path of PATH_MAX (4096) bytes or more is refused with ENAMETOOLONG, though trees may be deeper than that.
* open_by_handle_at wants a mount_fd that is not O_PATH.
* setfsuid and setfsgid are per thread as raw system calls; a non-zero fsuid drops CAP_DAC_* for file access by itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import threading

import msgspec

from watchd.kernel.libc import AT_EACCESS as AT_EACCESS
from watchd.kernel.libc import AT_EMPTY_PATH as AT_EMPTY_PATH
from watchd.kernel.libc import function, quiet_system_call, system_call

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_CACHED = 0x20

CONFINED = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV
"""Never out of the directory the walk starts in, by no symlink and no mount."""

O_PATH_NOFOLLOW = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
O_PATH_DIRECTORY = O_PATH_NOFOLLOW | os.O_DIRECTORY

RENAME_NOREPLACE = 0x1
RENAME_EXCHANGE = 0x2

AT_HANDLE_FID = 0x200
MAX_HANDLE_SZ = 128
_PATH_MAX = 4096

_openat2 = system_call(437, "openat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
_quiet_openat2 = quiet_system_call(437, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
_quiet_faccessat2 = quiet_system_call(439, ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int)
_name_to_handle_at = function(
    "name_to_handle_at", ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int), ctypes.c_int
)
_open_by_handle_at = function("open_by_handle_at", ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
_renameat2 = function("renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_SETFSUID, _SETFSGID = {"x86_64": (122, 123), "aarch64": (151, 152)}.get(platform.machine(), (151, 152))
_setfsuid = system_call(_SETFSUID, "setfsuid", ctypes.c_uint)
_setfsgid = system_call(_SETFSGID, "setfsgid", ctypes.c_uint)

_open_how = struct.Struct("=QQQ")
_handle_header = struct.Struct("=Ii")


class FileHandle(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What `struct file_handle` holds: the identity of an object within its filesystem, opaque to user space."""

    type: int
    fid: bytes

    def pack(self) -> bytes:
        """The struct file_handle that open_by_handle_at takes, native byte order."""
        return _handle_header.pack(len(self.fid), self.type) + self.fid


def openat2(dirfd: int, path: bytes, *, flags: int = O_PATH_NOFOLLOW, resolve: int = CONFINED) -> int:
    """openat2(2); returns an owned descriptor. Raises OSError."""
    how = _open_how.pack(flags | os.O_CLOEXEC, 0, resolve)
    return _openat2(dirfd, path, how, len(how))


def try_openat2(dirfd: int, path: bytes, *, flags: int = O_PATH_NOFOLLOW, resolve: int = CONFINED) -> int:
    """openat2(2) where not being able to is an everyday answer: an owned descriptor, or -errno.

    The path may be of any length."""
    if len(path) >= _PATH_MAX:
        return _try_in_pieces(dirfd, path, flags=flags, resolve=resolve)
    how = _open_how.pack(flags | os.O_CLOEXEC, 0, resolve)
    return _quiet_openat2(dirfd, path, how, len(how))


def _try_in_pieces(dirfd: int, path: bytes, *, flags: int, resolve: int) -> int:
    cut = path.rfind(b"/", 0, _PATH_MAX)
    if cut <= 0:
        return -errno.ENAMETOOLONG
    directory = try_openat2(dirfd, path[:cut], flags=O_PATH_DIRECTORY, resolve=resolve)
    if directory < 0:
        return directory
    try:
        return try_openat2(directory, path[cut + 1 :], flags=flags, resolve=resolve)
    finally:
        os.close(directory)


def renameat2(old_dirfd: int, old: bytes, new_dirfd: int, new: bytes, *, flags: int = RENAME_NOREPLACE) -> None:
    """renameat2(2). Raises OSError (EEXIST: the new name is taken)."""
    _renameat2(old_dirfd, old, new_dirfd, new, flags)


def try_faccessat2(dirfd: int, path: bytes, *, mode: int, flags: int) -> int:
    """faccessat2(2) where a refusal is an everyday answer: 0, or -errno."""
    return _quiet_faccessat2(dirfd, path, mode, flags)


class _HandleBuffer(threading.local):
    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(_handle_header.size + MAX_HANDLE_SZ)
        self.mount_id = ctypes.c_int()
        self.mount_id_pointer = ctypes.pointer(self.mount_id)


_handle_buffer = _HandleBuffer()


def name_to_handle_at(dirfd: int, path: bytes = b"", *, flags: int = AT_EMPTY_PATH) -> FileHandle:
    """name_to_handle_at(2) without the mount id; does not follow a final symlink. Raises OSError."""
    local = _handle_buffer
    buffer = local.buffer
    _handle_header.pack_into(buffer, 0, MAX_HANDLE_SZ, 0)
    _name_to_handle_at(dirfd, path, buffer, local.mount_id_pointer, flags)
    length, kind = _handle_header.unpack_from(buffer, 0)
    return FileHandle(kind, buffer.raw[_handle_header.size : _handle_header.size + length])


def open_by_handle_at(mount_fd: int, handle: bytes, *, flags: int = os.O_PATH) -> int:
    """open_by_handle_at(2) of a packed struct file_handle; returns an owned descriptor. Raises OSError (ESTALE: gone)."""
    return _open_by_handle_at(mount_fd, handle, flags | os.O_CLOEXEC)


def setfsuid(uid: int) -> int:
    """setfsuid(2) of the calling thread only; returns the previous id (an error is not told)."""
    return _setfsuid(uid)


def setfsgid(gid: int) -> int:
    """setfsgid(2) of the calling thread only; returns the previous id (an error is not told)."""
    return _setfsgid(gid)
