"""What a process sees in a merged mount, and what the kernel itself says that it should see.

Facts
* A twin, a read-only overlay of the same layers with the upper on top of the lowers, has cached nothing: it is the kernel's own
  answer, whiteouts, opaque directories and all. It keeps the layers busy, so it is gone at once. It has to be mounted
  somewhere, because nothing on a detached mount runs setuid.
* A name that a listing lacks may still open, and one that it has may not: so names are asked for whether listed or not.
* stat(2) tells the mode of the real inode, but what is granted is decided by the cached one. And a setuid bit counts at execve
  only. So a process of another user has to try.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tests.kernel.sandbox import Options, move_mount, umount
from watchd.kernel.mounts import FSCONFIG_CMD_CREATE, FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, fsconfig, fsmount, fsopen

STRANGER = 12345
"""A user who owns nothing."""

Picture = dict[bytes, Any]

_TRY = f"""
import json, os, sys
def opens(root, path):
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=root))
    except OSError as error:
        return error.errno
    return 0
def runs_as(root, path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.fchdir(root)
        os.dup2(writer, 1)
        try:
            os.execv(b"./" + path, [b"id", b"-u"])
        finally:
            os._exit(1)
    os.close(writer)
    os.waitpid(child, 0)
    return os.read(reader, 64).decode().strip()
root, paths, programs = int(sys.argv[1]), *json.load(sys.stdin)
os.setgroups([])
os.setresgid({STRANGER}, {STRANGER}, {STRANGER})
os.setresuid({STRANGER}, {STRANGER}, {STRANGER})
tries = {{}}
for path in paths:
    name = os.fsencode(path)
    tries[path] = [opens(root, name), os.access(name, os.X_OK, dir_fd=root, effective_ids=True, follow_symlinks=False)]
    if path in programs:
        tries[path].append(runs_as(root, name))
json.dump(tries, sys.stdout)
"""


@contextlib.contextmanager
def open_root(path: bytes) -> Iterator[int]:
    """The root directory of a mount, for a moment."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_twin(
    at: bytes,
    layers: Sequence[bytes],
    *,
    data_only: Sequence[bytes] = (),
    options: Options = (),
    userxattr: bool = False,
) -> Iterator[int]:
    """The root of a fresh read-only overlay of these layers, upper first, mounted there for so long. The options that make
    a difference to what is shown have to be those of the mount that it is compared with."""
    context = fsopen(b"overlay")
    try:
        for layer in layers:
            fsconfig(context, FSCONFIG_SET_STRING, b"lowerdir+", layer)
        for layer in data_only:
            fsconfig(context, FSCONFIG_SET_STRING, b"datadir+", layer)
        for key, value in options:
            fsconfig(context, FSCONFIG_SET_FLAG if value is None else FSCONFIG_SET_STRING, key, value)
        if userxattr:
            fsconfig(context, FSCONFIG_SET_FLAG, b"userxattr")
        fsconfig(context, FSCONFIG_SET_FLAG, b"ro")
        fsconfig(context, FSCONFIG_CMD_CREATE)
        detached = fsmount(context)
    finally:
        os.close(context)
    try:
        move_mount(detached, at)
    finally:
        os.close(detached)
    try:
        with open_root(at) as root:
            yield root
    finally:
        umount(at)


def names_below(root: int, directory: bytes = b"") -> set[bytes]:
    """Every path that listings show."""
    names = set()
    for name in _listing(root, directory) or ():
        path = directory + b"/" + name if directory else name
        names |= {path} | names_below(root, path)
    return names


def look(root: int, paths: Iterable[bytes]) -> Picture:
    """What root and a stranger get to see of these paths, in this order, and of the root directory itself."""
    wanted = list(paths)
    seen = {path: _look_at(root, path) for path in wanted}
    programs = [
        path for path, what in seen.items() if isinstance(what, tuple) and what[0] == stat.S_IFREG and what[1] & 1
    ]
    tried = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _TRY, str(root)],
        input=json.dumps([[os.fsdecode(path) for path in wanted], [os.fsdecode(path) for path in programs]]).encode(),
        capture_output=True,
        pass_fds=[root],
        check=True,
    )
    tries = {os.fsencode(path): answer for path, answer in json.loads(tried.stdout).items()}
    return {b"": _listing(root, b""), **{path: (what, tries[path]) for path, what in seen.items()}}


def _look_at(root: int, path: bytes) -> object:
    try:
        status = os.stat(path, dir_fd=root, follow_symlinks=False)
        attributes = stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
        if stat.S_ISDIR(status.st_mode):
            return *attributes, _listing(root, path)
        if stat.S_ISLNK(status.st_mode):
            return *attributes, os.readlink(path, dir_fd=root)
        if stat.S_ISREG(status.st_mode):
            return *attributes, _content(root, path)
    except OSError as error:
        return error.strerror
    return attributes


def _content(root: int, path: bytes) -> bytes:
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, dir_fd=root)) as file:
        content = file.read()
    return content if len(content) < 100 else hashlib.sha256(content).digest()


def _listing(root: int, directory: bytes) -> list[bytes] | None:
    """None for what is no directory."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(directory or b".", flags, dir_fd=root)
    except OSError:
        return None
    try:
        return sorted(os.fsencode(name) for name in os.listdir(descriptor))
    finally:
        os.close(descriptor)
