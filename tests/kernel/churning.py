"""Operations for random sequences: what may happen to a lower layer directly, and through a merged mount.

They take place among a few names, so that they meet each other. What an operation runs into is part of the game: an OSError
changes nothing and is no failure.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import stat
from collections.abc import Callable

NAMES = (b"a", b"b")
PATHS = [b"c", *(b"/".join(names) for depth in (1, 2, 3) for names in itertools.product(NAMES, repeat=depth))]
MODES = (0o600, 0o644, 0o700, 0o755, 0o4755)
STRANGER = 12345

_contents = itertools.count()

Operation = Callable[[bytes, bytes, bytes, int], None]
"""root directory, path, another path, a number to choose by"""


def plant(root: bytes) -> None:
    """A tree to begin with, so that there is something to happen to."""
    for directory in (b"a/a", b"b/a"):
        os.makedirs(root + b"/" + directory)
    for file in (b"a/a/a", b"a/a/b", b"a/b", b"b/a/b", b"c"):
        _write(root, file, b"", 0)
    _symlink(root, b"b/b", b"", 0)


def _write(root: bytes, path: bytes, other: bytes, number: int) -> None:
    with open(root + b"/" + path, "wb") as file:
        file.write(b"content %d" % next(_contents))


def _append(root: bytes, path: bytes, other: bytes, number: int) -> None:
    with open(os.open(root + b"/" + path, os.O_WRONLY | os.O_APPEND), "ab") as file:
        file.write(b"more %d" % next(_contents))


def _truncate(root: bytes, path: bytes, other: bytes, number: int) -> None:
    os.truncate(root + b"/" + path, number)


def _create(root: bytes, path: bytes, other: bytes, number: int) -> None:
    os.close(os.open(root + b"/" + path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


def _program(root: bytes, path: bytes, other: bytes, number: int) -> None:
    """Installed as `install -m 4755` does."""
    temporary = root + b"/.program"
    shutil.copyfile(os.fsencode(shutil.which("id") or "/usr/bin/id"), temporary)
    os.chmod(temporary, 0o4755)
    os.rename(temporary, root + b"/" + path)


def _replace(root: bytes, path: bytes, other: bytes, number: int) -> None:
    _write(root, b".replacement", b"", 0)
    os.rename(root + b"/.replacement", root + b"/" + path)


def _unlink(root: bytes, path: bytes, other: bytes, number: int) -> None:
    os.unlink(root + b"/" + path)


def _mkdir(root: bytes, path: bytes, other: bytes, number: int) -> None:
    os.mkdir(root + b"/" + path)


def _makedirs(root: bytes, path: bytes, other: bytes, number: int) -> None:
    os.makedirs(root + b"/" + path)


def _rmdir(root: bytes, path: bytes, other: bytes, number: int) -> None:
    os.rmdir(root + b"/" + path)


def _rmtree(root: bytes, path: bytes, other: bytes, number: int) -> None:
    shutil.rmtree(root + b"/" + path, ignore_errors=True)


def _rename(root: bytes, path: bytes, other: bytes, number: int) -> None:
    os.rename(root + b"/" + path, root + b"/" + other)


def _rename_chain(root: bytes, path: bytes, other: bytes, number: int) -> None:
    for old, new in ((path, b".between"), (other, path), (b".between", other)):
        with contextlib.suppress(OSError):
            os.rename(root + b"/" + old, root + b"/" + new)


def _symlink(root: bytes, path: bytes, other: bytes, number: int) -> None:
    os.symlink(NAMES[number % 2], root + b"/" + path)


def _link(root: bytes, path: bytes, other: bytes, number: int) -> None:
    os.link(root + b"/" + path, root + b"/" + other, follow_symlinks=False)


def _chmod(root: bytes, path: bytes, other: bytes, number: int) -> None:
    if not stat.S_ISLNK(os.lstat(root + b"/" + path).st_mode):
        os.chmod(root + b"/" + path, MODES[number % len(MODES)])


def _chown(root: bytes, path: bytes, other: bytes, number: int) -> None:
    os.lchown(root + b"/" + path, STRANGER * (number % 2), STRANGER * (number // 2 % 2))


def _whiteout(root: bytes, path: bytes, other: bytes, number: int) -> None:
    os.mknod(root + b"/" + path, stat.S_IFCHR, 0)


def _read(root: bytes, path: bytes, other: bytes, number: int) -> None:
    with open(root + b"/" + path, "rb") as file:
        file.read()


def _stat(root: bytes, path: bytes, other: bytes, number: int) -> None:
    os.lstat(root + b"/" + path)


def _list(root: bytes, path: bytes, other: bytes, number: int) -> None:
    os.listdir(root + b"/" + path)


def _look_at_all(root: bytes, path: bytes, other: bytes, number: int) -> None:
    for each in PATHS:
        for look in (_stat, _list, _read):
            with contextlib.suppress(OSError):
                look(root, each, b"", 0)


ANYWHERE: dict[str, Operation] = {
    "write": _write,
    "append": _append,
    "truncate": _truncate,
    "create": _create,
    "program": _program,
    "replace": _replace,
    "unlink": _unlink,
    "mkdir": _mkdir,
    "makedirs": _makedirs,
    "rmdir": _rmdir,
    "rmtree": _rmtree,
    "rename": _rename,
    "rename_chain": _rename_chain,
    "symlink": _symlink,
    "link": _link,
    "chmod": _chmod,
    "chown": _chown,
}
IN_A_LOWER = ANYWHERE | {"whiteout": _whiteout}
THROUGH_A_MOUNT = ANYWHERE | {"read": _read, "stat": _stat, "list": _list, "look_at_all": _look_at_all}


def operate(operation: Operation, root: bytes, path: bytes, other: bytes, number: int) -> None:
    """Have it happen, or not."""
    with contextlib.suppress(OSError):
        operation(root, path, other, number)
