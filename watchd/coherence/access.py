"""Does a merged object grant what its real object grants?

Facts: overlayfs checks permissions against its own cached mode, owner and group first, while stat(2) reports those of the real
inode. faccessat2(AT_EACCESS) in a thread that has set its filesystem uid and gid asks the question itself; setfsuid(2) and
setfsgid(2) are per thread, and a non-zero fsuid drops the capabilities that override permissions. Supplementary groups of the
thread are those of watchd; both objects are asked with the same ones. EROFS answers for the filesystem, not for the file.
"""

from __future__ import annotations

import errno
import os

from watchd.kernel.files import AT_EACCESS, AT_EMPTY_PATH, faccessat2, setfsgid, setfsuid

NOBODY = 65534
_MODES = (os.R_OK, os.W_OK, os.X_OK)


def access_differs(merged: int, real: int) -> bool:
    """Whether the owner, the group or others are granted something else by `merged` than by `real` (both may be O_PATH)."""
    status = os.stat(real)
    stranger = NOBODY if status.st_uid != NOBODY else NOBODY - 1
    strange_group = NOBODY if status.st_gid != NOBODY else NOBODY - 1
    asked = [(stranger, status.st_gid), (stranger, strange_group)]
    if status.st_uid != 0:
        asked.append((status.st_uid, strange_group))
    return any(_differs(merged, real, uid, gid) for uid, gid in asked)


def _differs(merged: int, real: int, uid: int, gid: int) -> bool:
    group, user = setfsgid(gid), setfsuid(uid)
    try:
        answers = [(_granted(merged, mode), _granted(real, mode)) for mode in _MODES]
    finally:
        setfsuid(user)
        setfsgid(group)
    return any(None not in pair and pair[0] != pair[1] for pair in answers)


def _granted(descriptor: int, mode: int) -> bool | None:
    try:
        return faccessat2(descriptor, b"", mode=mode, flags=AT_EACCESS | AT_EMPTY_PATH)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return None
