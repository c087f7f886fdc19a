"""Does a merged object grant what its real object grants?

Facts: overlayfs checks permissions against its own cached mode, owner and group first, while stat(2) reports those of the real
inode. faccessat2(AT_EACCESS) in a thread that has set its filesystem uid and gid asks the question itself; setfsuid(2) and
setfsgid(2) are per thread, and a non-zero fsuid drops the capabilities that override permissions. Supplementary groups of the
thread are those of watchd; both objects are asked with the same ones. EROFS answers for the filesystem, not for the file.

What the real object grants is what its mode says, nearly always, so the merged one is held against the mode first; only where
it grants something else (an ACL, a security module) both are asked.
"""

from __future__ import annotations

import errno
import os

from watchd.kernel.files import AT_EACCESS, AT_EMPTY_PATH, setfsgid, setfsuid, try_faccessat2

NOBODY = 65534
_MODES = (os.R_OK, os.W_OK, os.X_OK)


def access_differs(merged: int, real: int) -> bool:
    """Whether the owner, the group or others are granted something else by `merged` than by `real` (both may be O_PATH)."""
    status = os.stat(real)
    stranger = NOBODY if status.st_uid != NOBODY else NOBODY - 1
    strange_group = NOBODY if status.st_gid != NOBODY else NOBODY - 1
    asked = [(stranger, strange_group, status.st_mode & 7), (stranger, status.st_gid, status.st_mode >> 3 & 7)]
    if status.st_uid != 0:
        asked.append((status.st_uid, strange_group, status.st_mode >> 6 & 7))
    group, user = setfsgid(NOBODY), setfsuid(NOBODY)
    try:
        return any(_differs(merged, real, *one) for one in asked)
    finally:
        setfsuid(user)
        setfsgid(group)


def _differs(merged: int, real: int, uid: int, gid: int, expected: int) -> bool:
    setfsgid(gid)
    setfsuid(uid)
    if _grants_just(merged, expected):
        return False
    answers = [(_granted(merged, mode), _granted(real, mode)) for mode in _MODES]
    return any(None not in pair and pair[0] != pair[1] for pair in answers)


def _grants_just(descriptor: int, expected: int) -> bool:
    """Whether these modes and no others are granted, for certain."""
    refused = (_granted(descriptor, mode) for mode in _MODES if not expected & mode)
    return _granted(descriptor, expected) is True and not any(answer is not False for answer in refused)


def _granted(descriptor: int, mode: int) -> bool | None:
    answer = try_faccessat2(descriptor, b"", mode=mode, flags=AT_EACCESS | AT_EMPTY_PATH)
    if answer == -errno.EROFS:
        return None
    if answer not in (0, -errno.EACCES):
        raise OSError(-answer, os.strerror(-answer))
    return answer == 0
