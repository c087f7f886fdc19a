"""A faithful copy of a file or symlink, made where nobody sees it, and watched over from then on.

Facts (measured unless said otherwise)
* chown clears the setuid bit and security.capability, writing too; so the order is content, owner, xattrs, mode, times.
* overlayfs opens the real file of the upper as anybody does, so a lease on that holds back whoever opens the merged name: with
  F_RDLCK all who want to write, until it is given up or /proc/sys/fs/lease-break-time seconds (45) have passed (fcntl(2)). It
  cannot be had while somebody has the file open for writing (EAGAIN). F_GETLEASE says F_UNLCK as soon as somebody waits.
* F_SETLEASE makes the caller the one to get SIGIO, which kills; F_SETOWN 0 calls that off.
* A lease goes with its descriptor, so nobody waits for a process that died.
* A rename changes the ctime, so what was done to the copy is told by everything else: a digest of it all is written on the copy
  itself (xattr trusted.watchd.copy), which also tells whoever comes after a crash that it is a copy.
* copy_file_range shares extents where the filesystem can; between filesystems of different types it is EXDEV (5.19).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat

from watchd.errors import RefusedError
from watchd.kernel.files import openat2

MARK = "trusted.watchd.copy"

_ATTEMPTS = 3
_CHUNK_BYTES = 1 << 26
_NO_SUCH_COPY = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


class Replica:
    """A copy that is watched over until it is closed."""

    def __init__(self, directory: int, name: bytes) -> None:
        """Of an existing copy. Raises OSError (BlockingIOError: somebody has it open for writing)."""
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        self.inode = status.st_ino
        self._lease = _take_lease(directory, name) if stat.S_ISREG(status.st_mode) else -1

    def close(self) -> None:
        """Give up the lease."""
        if self._lease >= 0:
            os.close(self._lease)
            self._lease = -1

    def writer_waits(self) -> bool:
        """Whether somebody is about to open it for writing."""
        return self._lease >= 0 and fcntl.fcntl(self._lease, fcntl.F_GETLEASE) != fcntl.F_RDLCK

    def disown(self) -> None:
        """Wherever it is by now, it is a file like any other."""
        if self._lease >= 0:
            with contextlib.suppress(OSError):
                os.removexattr(self._lease, MARK)


def make_replica(source: int, directory: int, name: bytes, *, limit_bytes: int, private: str) -> Replica:
    """A copy of `source` (O_PATH) under a new name in a directory that strangers do not reach.

    `private` is the prefix of overlay's own xattrs. Raises OSError, RefusedError; nothing is left then.
    """
    try:
        for _ in range(_ATTEMPTS):
            before = os.stat(source)
            _refuse(source, before, limit_bytes=limit_bytes, private=private)
            _copy(source, before, directory, name, private=private)
            if _version(os.stat(source)) == _version(before):
                link = _link(directory, name)
                os.setxattr(link, MARK, _digest(directory, name), follow_symlinks=False)
                return Replica(directory, name)
            os.unlink(name, dir_fd=directory)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)
        raise
    raise RefusedError("it is being written to all the time")


def is_replica(directory: int, name: bytes) -> bool:
    """Whether it carries the mark of a copy. Raises OSError."""
    return _mark(directory, name) is not None


def is_replica_at(descriptor: int) -> bool:
    """The same of a file or symlink that is open by O_PATH; what has no xattrs is none."""
    with contextlib.suppress(OSError):
        return MARK in os.listxattr(_self(descriptor))
    return False


def disown(directory: int, name: bytes) -> None:
    """Take the mark off."""
    with contextlib.suppress(OSError):
        os.removexattr(_link(directory, name), MARK, follow_symlinks=False)


def is_untouched(directory: int, name: bytes) -> bool:
    """Whether a copy is still as it was made. Raises OSError."""
    return _mark(directory, name) == _digest(directory, name)


def _mark(directory: int, name: bytes) -> bytes | None:
    try:
        return os.getxattr(_link(directory, name), MARK, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise


def _digest(directory: int, name: bytes) -> bytes:
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    link = _link(directory, name)
    xattrs = {key: os.getxattr(link, key, follow_symlinks=False) for key in os.listxattr(link, follow_symlinks=False)}
    xattrs.pop(MARK, None)
    facts = (status.st_mode, status.st_uid, status.st_gid, status.st_nlink, status.st_size, status.st_mtime_ns)
    return hashlib.sha256(repr((facts, sorted(xattrs.items()))).encode()).hexdigest().encode()


def _take_lease(directory: int, name: bytes) -> int:
    descriptor = openat2(directory, name, flags=os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, 0)
    except OSError as error:
        os.close(descriptor)
        if error.errno == errno.EINVAL:
            raise RefusedError("the upper's filesystem has no leases, which keep writers from being lost") from None
        raise
    return descriptor


def _refuse(source: int, status: os.stat_result, *, limit_bytes: int, private: str) -> None:
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISLNK(status.st_mode):
        raise RefusedError("it is neither a regular file nor a symlink")
    if status.st_size > limit_bytes:
        raise RefusedError(
            f"its {status.st_size} bytes are more than the limit of {limit_bytes} (coherence.evict_limit)"
        )
    if private + "metacopy" in os.listxattr(_self(source)):
        raise RefusedError("the layer holds only its attributes (metacopy)")


def _copy(source: int, status: os.stat_result, directory: int, name: bytes, *, private: str) -> None:
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(b"", dir_fd=source), name, dir_fd=directory)
    else:
        target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
        try:
            _copy_content(source, target, status.st_size)
        finally:
            os.close(target)
    link = _link(directory, name)
    os.chown(link, status.st_uid, status.st_gid, follow_symlinks=False)
    for key in os.listxattr(_self(source)):
        if not key.startswith(private) or key.startswith(private + "overlay."):
            os.setxattr(link, key, os.getxattr(_self(source), key), follow_symlinks=False)
    if stat.S_ISREG(status.st_mode):
        os.chmod(link, stat.S_IMODE(status.st_mode))
    os.utime(link, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def _copy_content(source: int, target: int, size: int) -> None:
    content = os.open(_self(source), os.O_RDONLY | os.O_NOATIME | os.O_CLOEXEC)
    try:
        copied = 0
        while copied < size:
            count = _copy_some(content, target, copied)
            if not count:
                return
            copied += count
    finally:
        os.close(content)


def _copy_some(content: int, target: int, offset: int) -> int:
    try:
        return os.copy_file_range(content, target, _CHUNK_BYTES, offset, offset)
    except OSError as error:
        if error.errno not in _NO_SUCH_COPY:
            raise
    os.lseek(target, offset, os.SEEK_SET)
    return os.sendfile(target, content, offset, _CHUNK_BYTES)


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ctime_ns, status.st_mtime_ns, status.st_size, status.st_mode, status.st_nlink


def _self(descriptor: int) -> bytes:
    """The object behind an O_PATH descriptor, as a path; a symlink itself, if it is one."""
    return b"/proc/self/fd/%d" % descriptor


def _link(directory: int, name: bytes) -> bytes:
    """For calls that take no dirfd; to be used without following a final symlink."""
    return b"/proc/self/fd/%d/%b" % (directory, name)
