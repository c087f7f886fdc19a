"""A place for tests that mount: a tmpfs, overlays on it, processes in namespaces of their own, and a strict tidy-up."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from watchd.kernel.libc import AT_FDCWD, function, system_call
from watchd.kernel.mounts import (
    FSCONFIG_CMD_CREATE,
    FSCONFIG_SET_FLAG,
    FSCONFIG_SET_STRING,
    fsconfig,
    fsmount,
    fsopen,
)
from watchd.kernel.namespaces import mount_namespace
from watchd.overlay.model import View
from watchd.wire.mountinfo import parse_mountinfo

MS_REMOUNT, MS_RDONLY, MS_BIND, MS_REC = 0x20, 0x1, 0x1000, 0x4000
MS_PRIVATE, MS_SLAVE, MS_SHARED = 0x40000, 0x80000, 0x100000
_MOVE_MOUNT_F_EMPTY_PATH = 0x4

_mount = function("mount", ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_umount2 = function("umount2", ctypes.c_char_p, ctypes.c_int)
_move_mount = system_call(
    429, "move_mount", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint
)

Options = Sequence[tuple[bytes, bytes | None]]


def mount(source: bytes, target: bytes, fstype: bytes = b"", *, flags: int = 0, data: bytes = b"") -> None:
    """mount(2)."""
    _mount(source, target, fstype, flags, data)


def umount(target: bytes) -> None:
    """umount(2), not lazy: it fails with EBUSY if anybody holds on to the mount."""
    _umount2(target, 0)


def _umount_soon(target: bytes) -> None:
    for _ in range(100):
        try:
            umount(target)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            os.sched_yield()
        else:
            return
    umount(target)


def move_mount(detached: int, target: bytes) -> None:
    """move_mount(2): a detached mount to a mount point."""
    _move_mount(detached, b"", AT_FDCWD, target, _MOVE_MOUNT_F_EMPTY_PATH)


class Inmate:
    """A shell in a mount namespace of its own, which does what it is told."""

    def __init__(self, *unshare_flags: str, propagation: str = "private") -> None:
        command = ["unshare", *unshare_flags, "--mount", "--propagation", propagation, "sh"]
        self._shell = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.pid = self._shell.pid
        self.run("true")
        self.view = View(self.pid, mount_namespace(self.pid))

    def run(self, command: str) -> str:
        """What the command prints; a failing one fails the test."""
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.write(os.fsencode(f"{command}\nprintf '\\nstatus %s\\n' $?\n"))
        lines: list[str] = []
        while not (line := os.fsdecode(self._shell.stdout.readline())).startswith("status "):
            assert line, f"the shell ended at: {command}"
            lines.append(line)
        assert line == "status 0\n", f"failed: {command}"
        return "".join(lines).strip()

    def end(self) -> None:
        """End the shell and everything it started in the background, and its namespace with them."""
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        if self._shell.poll() is None:
            self.run("for job in $(jobs -p); do kill -9 $job; done; wait")
        self._shell.stdin.close()
        self._shell.stdout.close()
        self._shell.wait()


class Server:
    """A FUSE filesystem that shows a directory, with a server that can be stopped."""

    def __init__(self, source: bytes, target: bytes) -> None:
        outside = os.stat(target).st_dev
        # Nothing is cached by the kernel, so that every look has to be answered.
        options = b"attr_timeout=0,entry_timeout=0,negative_timeout=0"
        self._process = subprocess.Popen(
            [b"bindfs", b"-f", b"-o", options, source, target], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while os.stat(target).st_dev == outside:
            assert self._process.poll() is None, "bindfs ended"
            os.sched_yield()

    def stop(self) -> None:
        """SIGSTOP: who asks for anything waits from now on."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def go_on(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def die(self) -> None:
        """SIGKILL: who asks for anything is told ENOTCONN from now on."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Wait for it to end, which it does when nothing shows its filesystem any more."""
        self._process.wait()


class Sandbox:
    """A fresh tmpfs at `root` (bytes), and what a test did on it, to be taken back by `tidy_up`."""

    def __init__(self, root: Path) -> None:
        self.root = os.fsencode(root)
        self._mounts: list[bytes] = []
        self._inmates: list[Inmate] = []
        self._servers: dict[bytes, Server] = {}
        self.mount_tmpfs(b"")

    def path(self, name: bytes) -> bytes:
        """Where `name` is."""
        return os.path.join(self.root, name) if name else self.root

    def directory(self, name: bytes) -> bytes:
        """A directory of that name, made if need be."""
        os.makedirs(self.path(name), exist_ok=True)
        return self.path(name)

    def mount_tmpfs(self, name: bytes) -> bytes:
        """A tmpfs of its own at `name`."""
        mount(b"tmpfs", self.directory(name), b"tmpfs", data=b"mode=755")
        self._mounts.append(self.path(name))
        return self.path(name)

    def serve(self, name: bytes, source: bytes) -> Server:
        """The directory `source` at `name` too, by way of a FUSE server."""
        server = Server(self.directory(source), self.directory(name))
        self._servers[self.path(name)] = server
        self._mounts.append(self.path(name))
        return server

    def bind(self, name: bytes, target: bytes) -> bytes:
        """The directory `name` at `target` too."""
        mount(self.path(name), self.directory(target), flags=MS_BIND)
        self._mounts.append(self.path(target))
        return self.path(target)

    def mount_overlay(self, name: bytes, options: Options) -> bytes:
        """An overlay at `name` through fsconfig(2), whose values may hold any byte."""
        context = fsopen(b"overlay")
        try:
            for key, value in options:
                fsconfig(context, FSCONFIG_SET_FLAG if value is None else FSCONFIG_SET_STRING, key, value)
            fsconfig(context, FSCONFIG_CMD_CREATE)
            detached = fsmount(context)
        finally:
            os.close(context)
        try:
            return self.attach(detached, name)
        finally:
            os.close(detached)

    def attach(self, detached: int, name: bytes) -> bytes:
        """A detached mount at `name`."""
        move_mount(detached, self.directory(name))
        self._mounts.append(self.path(name))
        return self.path(name)

    def overlay(self, name: bytes, *lowers: bytes, upper: bytes | None = None) -> bytes:
        """An overlay at `name` over directories of the sandbox, which are made if need be."""
        options = [(b"lowerdir+", self.directory(lower)) for lower in lowers]
        if upper is not None:
            options += [(b"upperdir", self.directory(upper)), (b"workdir", self.directory(upper + b".work"))]
        return self.mount_overlay(name, options)

    def umount(self, name: bytes) -> None:
        """Take a mount back before the end."""
        umount(self.path(name))
        self.forget(name)

    def forget(self, name: bytes) -> None:
        """A mount that somebody else took away."""
        self._mounts.remove(self.path(name))

    def inmate(self, *unshare_flags: str, propagation: str = "private") -> Inmate:
        """A shell in a mount namespace of its own, a copy of ours as it is now."""
        inmate = Inmate(*unshare_flags, propagation=propagation)
        self._inmates.append(inmate)
        return inmate

    def tidy_up(self) -> None:
        """Take everything back; a mount that stays busy makes the test fail.

        Whoever resolves a path, a stat of anybody's too, holds the mount that it ends in for microseconds.
        """
        for inmate in self._inmates:
            inmate.end()
        for server in self._servers.values():
            server.go_on()
        for path in reversed(self._mounts):
            _umount_soon(path)
            if path in self._servers:
                self._servers[path].end()  # until then it uses what it served


class Belongings:
    """What a process has, to be compared before and after."""

    def __init__(self, home: Path) -> None:
        """Loop devices belong to the host, so only those of files below `home` count."""
        self.mounts = {info.mount_id for info in parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())}
        self.loop_devices = {path for path in Path("/sys/block").glob("loop*/loop/backing_file") if _is_of(path, home)}
        self.descriptors = {(fd, target) for fd in os.listdir("/proc/self/fd") if (target := _target(fd))}
        self.children = Path("/proc/thread-self/children").read_text().split()
        self.threads = {thread.name for thread in threading.enumerate()}


def _is_of(backing_file: Path, home: Path) -> bool:
    try:
        return backing_file.read_text().startswith(f"{home}/")
    except OSError:  # somebody detached it just now
        return False


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:  # the one that listed them
        return ""
