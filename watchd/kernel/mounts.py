"""The mount system calls (mount_api, Linux 5.2), one function each.

Facts
* open_tree(OPEN_TREE_CLONE) of a directory gives a detached clone whose root is that directory. It takes 5 us to make and
  30 to 70 us to close (its umount waits for RCU). umount(2) of the original succeeds while the clone is held, because a clone
  is a mount of its own; but the superblock stays busy, so clones are held only for as long as one piece of work takes.
* `..` from a directory that is not below the clone's root fails with ENOENT (fs/namei.c, path_connected).
* fspick with FSPICK_EMPTY_PATH works on such a clone, whatever directory it is rooted at.
* mount_setattr works on a detached clone: it changes the flags of this mount and of no other.
* A failed fsconfig leaves its reason, in the kernel's own words, to be read from the context descriptor.
* fsconfig takes strings of up to 255 bytes (strndup_user in fs/fsopen.c).
* move_mount(MOVE_MOUNT_BENEATH) (6.5) puts a mount between another one and what that is mounted on, in one step. Unknown flags
  are EINVAL before a descriptor is looked at, so a call with none tells whether the kernel has it.
* A detached mount may be attached in any namespace by one who is there; an attached one only within its own.
* umount2 resolves its path to the mount on top of whatever is mounted there, be it given as a descriptor: what is covered
  cannot be named.
* umount2(MNT_EXPIRE) of a mount that somebody has open is EBUSY and changes nothing; of a locked one it is EINVAL.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import struct

from watchd.kernel.libc import AT_EMPTY_PATH, function, system_call

OPEN_TREE_CLONE = 0x1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
AT_RECURSIVE = 0x8000

MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
MOVE_MOUNT_BENEATH = 0x200

MNT_DETACH = 0x2
MNT_EXPIRE = 0x4
UMOUNT_NOFOLLOW = 0x8

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_RELATIME = 0x0
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_NOSYMFOLLOW = 0x200000
MOUNT_ATTR_ALL = 0x2000FF
"""All of these; what mount_setattr must clear to set the ones that are wanted."""

MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20

FSOPEN_CLOEXEC = 0x1
FSPICK_CLOEXEC = 0x1
FSPICK_EMPTY_PATH = 0x8
FSMOUNT_CLOEXEC = 0x1

FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_STRING_MAX = 255
FSCONFIG_SET_FD = 5
FSCONFIG_CMD_CREATE = 6
FSCONFIG_CMD_RECONFIGURE = 7


_open_tree = system_call(428, "open_tree", ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_move_mount = system_call(
    429, "move_mount", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint
)
_fsopen = system_call(430, "fsopen", ctypes.c_char_p, ctypes.c_uint)
_fsconfig = system_call(431, "fsconfig", ctypes.c_int, ctypes.c_uint, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int)
_fsmount = system_call(432, "fsmount", ctypes.c_int, ctypes.c_uint, ctypes.c_uint)
_fspick = system_call(433, "fspick", ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_mount_setattr = system_call(
    442, "mount_setattr", ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_char_p, ctypes.c_size_t
)
_umount2 = function("umount2", ctypes.c_char_p, ctypes.c_int)

_mount_attr = struct.Struct("=QQQQ")  # attr_set, attr_clr, propagation, userns_fd


def open_tree_clone(dirfd: int, path: bytes = b"", *, flags: int = 0) -> int:
    """A detached clone of the mount at `path`, rooted there, without submounts; returns an owned descriptor (O_PATH).

    With the flag AT_RECURSIVE submounts are cloned too, those that are unbindable excepted.
    """
    return _open_tree(dirfd, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | flags | (0 if path else AT_EMPTY_PATH))


def move_mount(mount: int, dirfd: int, path: bytes = b"", *, flags: int = 0) -> None:
    """move_mount(2) of a mount's root descriptor to `path`, or to what dirfd itself is. Raises OSError."""
    empty = MOVE_MOUNT_F_EMPTY_PATH | (0 if path else MOVE_MOUNT_T_EMPTY_PATH)
    _move_mount(mount, b"", dirfd, path, flags | empty)


@functools.lru_cache(maxsize=1)
def has_move_mount_beneath() -> bool:
    """Whether this kernel knows MOVE_MOUNT_BENEATH."""
    try:
        move_mount(-1, -1, flags=MOVE_MOUNT_BENEATH)
    except OSError as error:
        return error.errno == errno.EBADF
    return False


def mount_setattr(
    dirfd: int, path: bytes = b"", *, attr_set: int = 0, attr_clr: int = 0, propagation: int = 0, flags: int = 0
) -> None:
    """mount_setattr(2) (5.12): MOUNT_ATTR_* to set and to clear, and one of MS_SHARED, MS_SLAVE, ...

    Raises OSError (EPERM: a flag is locked).
    """
    attributes = _mount_attr.pack(attr_set, attr_clr, propagation, 0)
    _mount_setattr(dirfd, path, flags | (0 if path else AT_EMPTY_PATH), attributes, len(attributes))


def umount2(path: bytes, flags: int = 0) -> None:
    """umount2(2) of whatever is on top at `path`. Raises OSError."""
    _umount2(path, flags | UMOUNT_NOFOLLOW)


def fsopen(fstype: bytes) -> int:
    """A context for a new superblock; returns an owned descriptor."""
    return _fsopen(fstype, FSOPEN_CLOEXEC)


def fspick(mount: int) -> int:
    """A context to reconfigure the superblock of a mount, given by its root (O_PATH); returns an owned descriptor."""
    return _fspick(mount, b"", FSPICK_CLOEXEC | FSPICK_EMPTY_PATH)


def fsconfig(context: int, command: int, key: bytes | None = None, value: bytes | None = None, aux: int = 0) -> None:
    """fsconfig(2). Raises OSError whose text ends in the kernel's own words, if it left any."""
    try:
        _fsconfig(context, command, key, value, aux)
    except OSError as error:
        words = _messages(context)
        if not words:
            raise
        raise OSError(error.errno, f"{error.strerror} ({words})") from None


def fsmount(context: int) -> int:
    """The mount of a created context, detached and without any flags; returns an owned descriptor (O_PATH)."""
    return _fsmount(context, FSMOUNT_CLOEXEC, 0)


def _messages(context: int) -> str:
    lines = []
    with contextlib.suppress(OSError):
        for _ in range(8):
            lines.append(os.read(context, 1024).decode(errors="replace").strip())
    return " / ".join(lines)
