"""What overlayfs writes on the objects of a layer: its xattrs, and whiteouts.

Facts (Documentation/filesystems/overlayfs.rst)
* The xattrs live in trusted.overlay.*, with the option userxattr in user.overlay.*. They cannot be read through an O_PATH
  descriptor, but through its /proc/self/fd link.
* A whiteout is a character device 0:0, or an empty regular file with the xattr overlay.whiteout.
"""

from __future__ import annotations

import os
import stat


class Marks:
    """The xattrs of one overlay's layers, without their prefix: opaque, redirect, metacopy, origin, whiteout, …"""

    def __init__(self, *, userxattr: bool = False) -> None:
        self.userxattr = userxattr
        self.prefix = "user.overlay." if userxattr else "trusted.overlay."

    def of(self, descriptor: int) -> set[str]:
        """Which of them an object has (O_PATH will do); none where they cannot be read."""
        try:
            names = os.listxattr(b"/proc/self/fd/%d" % descriptor)
        except OSError:
            return set()
        return {name.removeprefix(self.prefix) for name in names if name.startswith(self.prefix)}

    def value(self, descriptor: int, mark: str, name: bytes = b"") -> bytes | None:
        """What one of them says, on an object or on a `name` in a directory; None if it is not there."""
        path = b"/proc/self/fd/%d" % descriptor + (b"/" + name if name else b"")
        try:
            return os.getxattr(path, self.prefix + mark, follow_symlinks=not name)
        except OSError:
            return None


def is_whiteout(status: os.stat_result) -> bool:
    """Whether it is a whiteout of the first kind, which is what overlayfs itself leaves where it deleted something."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
