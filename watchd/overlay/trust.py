"""Who could make a path lead elsewhere.

Facts
* An entry of a directory can be exchanged, for a symlink too, by the owner of the directory and by those who may write to it;
  if it is sticky (/tmp), by the owners of the directory and of the entry only.
* fsconfig follows symlinks in the strings it is given. A mounter that does so with root's rights, at a time that a tenant may
  choose by exchanging a layer, would show in the merged mount what lies below directories that the tenant must not search.

What this means for us: a path that somebody else than root can change is walked without following a link, and given as the
descriptor that was found.
"""

from __future__ import annotations

import os
import stat

from watchd.kernel.files import O_PATH_DIRECTORY

_MAX_LINKS = 40


def is_exposed(path: bytes) -> bool:
    """Whether somebody else than root could make an absolute path lead elsewhere; the calling thread's view counts.

    True for one that cannot be walked. Raises nothing.
    """
    try:
        return _is_exposed([name for name in path.split(b"/") if name])
    except OSError:
        return True


def _is_exposed(names: list[bytes]) -> bool:
    directory = _open(b"/", None)
    links = 0
    try:
        while names:
            name = names.pop(0)
            entry = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if not _is_roots_own(os.fstat(directory), entry):
                return True
            if stat.S_ISLNK(entry.st_mode):
                links += 1
                text = os.readlink(name, dir_fd=directory)
                names[:0] = [part for part in text.split(b"/") if part]
                step = b"/" if text.startswith(b"/") else b"."
            else:
                step = name
            if links > _MAX_LINKS:
                return True
            above, directory = directory, _open(step, directory)
            os.close(above)
    finally:
        os.close(directory)
    return False


def _open(name: bytes, directory: int | None) -> int:
    return os.open(name, O_PATH_DIRECTORY, dir_fd=directory)


def _is_roots_own(directory: os.stat_result, entry: os.stat_result) -> bool:
    if directory.st_uid != 0:
        return False
    others_write = directory.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return not others_write or bool(directory.st_mode & stat.S_ISVTX and entry.st_uid == 0)
