"""The processes that are measured: one interface over watchd's baselines, and (in `daemon`) over watchd itself.

A subject is a context manager. It is ready when the `with` block is entered, and gone when it is left.
"""

from __future__ import annotations

import abc
import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import msgspec

from tests.bench.arena import Arena, Workspace
from tests.bench.baselines.protocol import END, READY
from tests.bench.loads import REPOSITORY

PATIENCE_S = 300.0
LOOK_AGAIN_S = 0.02
MAX_USER_WATCHES = Path("/proc/sys/fs/inotify/max_user_watches")
EVENTS = "create,delete,move,modify,close_write,attrib"


class SubjectError(Exception):
    """A subject died, or did not answer in time."""


class UnavailableError(Exception):
    """This machine lacks what a subject needs."""


class Tally(msgspec.Struct, frozen=True):
    """What a subject says that it saw of a heavy load."""

    lost: int
    """Names that it never reported; each file has two."""
    overflows: int | None = None
    """Overflows (watchd: desync records) that it told of, None if it cannot."""
    records: int | None = None
    """Events that it read, None if it does not say."""


def require_program(name: str) -> str:
    """The path of a program. Raises UnavailableError."""
    path = shutil.which(name)
    if path is None:
        raise UnavailableError(f"{name} is not installed")
    return path


def require_inotify_watches(directories: int) -> None:
    """Raise UnavailableError if the host allows fewer inotify watches than a tree needs."""
    needed = directories + directories // 100 + 100
    allowed = int(MAX_USER_WATCHES.read_text())
    if allowed < needed:
        raise UnavailableError(f"needs fs.inotify.max_user_watches >= {needed}, it is {allowed}")


class Subject(abc.ABC):
    """A program that watches an arena's lower."""

    process: subprocess.Popen[bytes]
    ready_s: float
    """Seconds from exec until it said that it watches."""

    def __init__(self, workspace: Workspace, arena: Arena, *, files: int = 0) -> None:
        self.arena = arena
        self.files = files
        self._workspace = workspace
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.scratch = stack.enter_context(self._workspace.scratch())
            self._stderr = stack.enter_context((self.scratch / "stderr").open("wb"))
            started = time.perf_counter()
            self.process = self._spawn()
            stack.callback(self._end)
            self._await_ready()
            self.ready_s = time.perf_counter() - started
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stack.close()

    def drained(self) -> Callable[[], Tally]:
        """Wait until everything that happened before the call was read. Calling the result does the counting."""
        raise NotImplementedError(f"{type(self).__name__} is not made for a heavy load")

    @abc.abstractmethod
    def _spawn(self) -> subprocess.Popen[bytes]: ...

    @abc.abstractmethod
    def _await_ready(self) -> None: ...

    def _popen(
        self,
        command: Sequence[str],
        *,
        stdout: IO[bytes] | int = subprocess.DEVNULL,
        stderr: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start the subject in a session of its own. What it writes to stderr is kept for `failure`."""
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=self._stderr if stderr is None else stderr,
            env=env,
            cwd=REPOSITORY,
            start_new_session=True,
        )

    def _end(self) -> None:
        """Ask the whole session of the subject to end, then make sure."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()

    def failure(self, what: str) -> SubjectError:
        """An error that carries the subject's last words."""
        words = (self.scratch / "stderr").read_text(errors="replace").strip().splitlines()
        return SubjectError(": ".join([f"{type(self).__name__} {what}", *words[-1:]]))

    def checks(self, *, every_s: float) -> Iterator[int]:
        """Count up at an interval while the subject lives and the patience lasts. Raises SubjectError after that."""
        deadline = time.monotonic() + PATIENCE_S
        count = 0
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise self.failure(f"ended with status {self.process.returncode}")
            yield count
            count += 1
            time.sleep(every_s)
        raise self.failure("did not answer in time")

    def end_of_load(self, number: int) -> None:
        """Make a file, for a moment, whose event tells the subject that the load is over."""
        path = self.arena.lower / f"{os.fsdecode(END)}{number}"
        path.touch()
        path.unlink()


def await_text(subject: Subject, fd: int, text: bytes) -> None:
    """Wait until a subject writes `text` to a pipe. Raises SubjectError."""
    seen = b""
    for _ in subject.checks(every_s=0):
        if select.select([fd], [], [], 1.0)[0]:
            chunk = os.read(fd, 4096)
            if not chunk:
                raise subject.failure("closed its output")
            seen += chunk
            if text in seen:
                return


class _Script(Subject):
    """A baseline that is a module of `tests.bench.baselines`."""

    module: str

    def _arguments(self) -> list[str]:
        return [str(self.arena.lower), str(self.files)]

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"tests.bench.baselines.{self.module}", *self._arguments()]
        return self._popen(command, stdout=subprocess.PIPE)

    def _await_ready(self) -> None:
        assert self.process.stdout is not None
        await_text(self, self.process.stdout.fileno(), READY.encode())

    def drained(self) -> Callable[[], Tally]:
        assert self.process.stdout is not None
        for count in self.checks(every_s=0):
            self.end_of_load(count)
            if select.select([self.process.stdout], [], [], LOOK_AGAIN_S)[0]:
                break
        answer = self.process.stdout.readline()
        if not answer:
            raise self.failure("closed its output")
        return lambda: msgspec.json.decode(answer, type=Tally)


class BareReader(_Script):
    """Reads fanotify, decodes and resolves."""

    module = "fanotify_reader"


class BareLoop(_Script):
    """Reads fanotify and reconfigures on every batch."""

    module = "reconfigure_loop"

    def _arguments(self) -> list[str]:
        return [str(self.arena.lower), *map(str, self.arena.all_merged)]


class DropCachesLoop(_Script):
    """Reads fanotify and drops the caches of the whole host on every batch."""

    module = "drop_caches_loop"

    def _arguments(self) -> list[str]:
        return [str(self.arena.lower)]


class Nobody(Subject):
    """Nobody watches."""

    def _spawn(self) -> subprocess.Popen[bytes]:
        return self._popen(["sleep", "infinity"])

    def _await_ready(self) -> None:
        """There is nothing to wait for."""


class Pyinotify(_Script):
    """pyinotify with its own loop."""

    module = "pyinotify_reader"

    def _spawn(self) -> subprocess.Popen[bytes]:
        require_inotify_watches(self.arena.directories)
        return super()._spawn()


class Inotifywait(Subject):
    """`inotifywait -m -r`, its output in a file. It says nothing of an overflow; only the missing names tell."""

    def _spawn(self) -> subprocess.Popen[bytes]:
        require_inotify_watches(self.arena.directories)
        program = require_program("inotifywait")
        self._output = self.scratch / "events"
        with self._output.open("wb") as output:
            command = (program, "-m", "-r", "-e", EVENTS, "--format", "%f", str(self.arena.lower))
            return self._popen(command, stdout=output, stderr=subprocess.PIPE)

    def _await_ready(self) -> None:
        assert self.process.stderr is not None
        await_text(self, self.process.stderr.fileno(), b"Watches established.")

    def drained(self) -> Callable[[], Tally]:
        with self._output.open("rb") as output:
            for count in self.checks(every_s=LOOK_AGAIN_S):
                self.end_of_load(count)
                output.seek(max(0, self._output.stat().st_size - 1024))
                if END in output.read():
                    break
        return self._tally

    def _tally(self) -> Tally:
        seen = bytearray(2 * self.files)
        records = 0
        with self._output.open("rb") as output:
            for line in output:
                records += 1
                if not line.startswith(END):
                    seen[int(line)] = 1
        return Tally(lost=seen.count(0), records=records)


class InotifywaitRemount(Subject):
    """What people do today: `inotifywait -m -r` piped into `mount -o remount`, one for each event."""

    SCRIPT = 'inotifywait -m -r -e "$1" --format x "$2" | while read -r _; do mount -o remount "$3" 2>&1; done'
    VARIANTS: tuple[dict[str, str], ...] = ({}, {"LIBMOUNT_FORCE_MOUNT2": "always"})
    """util-linux 2.39 and later remounts with fsconfig(2), which overlayfs refuses, unless told to use mount(2)."""

    def _spawn(self) -> subprocess.Popen[bytes]:
        require_inotify_watches(self.arena.directories)
        require_program("inotifywait")
        environment = {**os.environ, **self.remount_environment(self.arena.merged)}
        arguments = (EVENTS, str(self.arena.lower), str(self.arena.merged))
        command = ("sh", "-c", self.SCRIPT, "sh", *arguments)
        return self._popen(command, env=environment, stderr=subprocess.PIPE)

    def _await_ready(self) -> None:
        assert self.process.stderr is not None
        await_text(self, self.process.stderr.fileno(), b"Watches established.")

    @classmethod
    def remount_environment(cls, merged: Path) -> dict[str, str]:
        """What `mount -o remount` needs in its environment to work here. Raises UnavailableError if it never does."""
        program = require_program("mount")
        for variant in cls.VARIANTS:
            remount = [program, "-o", "remount", str(merged)]
            if subprocess.run(remount, env={**os.environ, **variant}, capture_output=True, check=False).returncode == 0:
                return variant
        raise UnavailableError("mount -o remount is refused for an overlay")
