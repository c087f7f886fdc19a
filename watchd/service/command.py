"""Run a command of the configuration to its end: without a shell, bounded in time and in what it may say.

Facts that shape this module:

* A pipe holds 64 KiB, and whoever writes more into it waits for the reader. What a command is to read is a file in memory
  (memfd_create(2)) instead: it can be left unread, closed or read again, and nobody has to stand by.
* The number of a process group is free for others as soon as its leader is reaped and its last member gone. So the leader is
  reaped only after the group was signalled for the last time.
* A process that waits in the kernel for a dead filesystem may outlive SIGKILL. It is left to a thread that reaps it when it
  ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from watchd.service import launch

GRACE_S = 2.0
"""From SIGTERM to SIGKILL, and from there until the process is left to itself."""

LINE_MAX_BYTES = 1024
"""The rest of a longer line of output is left out."""

_READ_BYTES = 65536
_READ_PAUSE_S = 0.01
"""One read in this time, 6 MB/s: who says more waits, and takes no time from the daemon."""
_LAST_READS = 16
"""When the command has ended; what it left running may go on to write for ever."""

Result = Literal["ok", "failed", "timeout", "stopped"]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    result: Result
    """ok: with status 0; failed: with another one or by a signal of somebody else; timeout: it was ended at its deadline;
    stopped: it was ended because the daemon stops."""
    status: int | None
    """The exit status, a negative signal number, or None if it never began or has not ended even after SIGKILL."""
    duration_s: float


def run(
    command: Sequence[str],
    *,
    paths: bytes,
    environment: Mapping[bytes, bytes],
    timeout_s: float,
    stop: int,
    tell: Callable[[bytes], None],
) -> Ended:
    """Run `command` with `paths` on its standard input, in a session of its own, and wait for its end.

    `stop` is a descriptor that becomes readable when it is to end at once; `tell` gets its output line by line. A command
    that cannot be executed has failed, with status 127 or 126 and a line of output that says why. Raises OSError if there
    are no descriptors, processes or memory to begin with.
    """
    started = time.monotonic()
    if _is_readable(stop):
        return Ended("stopped", None, 0.0)
    with contextlib.ExitStack() as stack:
        process, outlet = _launch(command, paths, environment)
        stack.callback(_leave, process)
        stack.callback(os.close, outlet)
        pidfd = os.pidfd_open(process.pid)
        stack.callback(os.close, pidfd)
        output = _Output(outlet, tell)
        over = _watch(pidfd, output, started + timeout_s, stop)
        if over != pidfd:
            _end(process, pidfd, output)
        output.finish()
    duration_s = time.monotonic() - started
    if over != pidfd:
        return Ended("timeout" if over is None else "stopped", process.returncode, duration_s)
    return Ended("ok" if process.returncode == 0 else "failed", process.returncode, duration_s)


def _launch(
    command: Sequence[str], paths: bytes, environment: Mapping[bytes, bytes]
) -> tuple[subprocess.Popen[bytes], int]:
    """The process, and a descriptor to read what it says from."""
    outlet, inlet = os.pipe()
    try:
        with open(os.memfd_create("paths"), "r+b") as stdin:
            stdin.write(paths)
            stdin.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", launch.__file__, *command],
                env=environment,
                cwd="/",
                stdin=stdin,
                stdout=inlet,
                stderr=inlet,
                start_new_session=True,
            )
    except BaseException:
        os.close(outlet)
        raise
    finally:
        os.close(inlet)
    return process, outlet


def _is_readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _watch(pidfd: int, output: _Output, deadline: float, stop: int | None) -> int | None:
    """Take in the output until the process ends or is to end: the descriptor that says so, None at the deadline."""
    poll = select.poll()
    for descriptor in (pidfd, stop):
        if descriptor is not None:
            poll.register(descriptor, select.POLLIN)
    while (remaining := deadline - time.monotonic()) > 0:
        pause = output.pause_s()
        if pause == 0:
            poll.register(output.outlet, select.POLLIN)
        ready = dict(poll.poll((remaining if not pause else min(remaining, pause)) * 1000))
        if pause == 0:
            poll.unregister(output.outlet)
        if output.outlet in ready:
            output.read()
        for descriptor in (pidfd, stop):
            if descriptor in ready:
                return descriptor
    return None


def _end(process: subprocess.Popen[bytes], pidfd: int, output: _Output) -> None:
    """End a process and all of its group that stayed in it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has none any more, or became somebody else
            os.killpg(process.pid, number)
        _watch(pidfd, output, time.monotonic() + GRACE_S, None)


def _leave(process: subprocess.Popen[bytes]) -> None:
    """Reap a process that has ended; see that any other one ends, and is reaped then."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        threading.Thread(target=process.wait, name="reaper", daemon=True).start()


class _Output:
    """What a command says, told line by line and not faster than is good."""

    def __init__(self, outlet: int, tell: Callable[[bytes], None]) -> None:
        self.outlet, self._tell = outlet, tell
        self._begun = b""
        self._not_before: float | None = 0.0
        os.set_blocking(outlet, False)

    def pause_s(self) -> float | None:
        """How long nothing is to be read, None at its end."""
        return None if self._not_before is None else max(0.0, self._not_before - time.monotonic())

    def read(self) -> bool:
        """Take in what is there; false if there is nothing."""
        try:
            data = os.read(self.outlet, _READ_BYTES)
        except BlockingIOError:
            return False
        self._not_before = time.monotonic() + _READ_PAUSE_S if data else None
        *lines, begun = (self._begun + data).split(b"\n")
        for line in lines:
            self._tell(line[:LINE_MAX_BYTES])
        self._begun = begun[:LINE_MAX_BYTES]
        return bool(data)

    def finish(self) -> None:
        """Take in what the command said last."""
        for _ in range(_LAST_READS):
            if not self.read():
                break
        if self._begun:
            self._tell(self._begun)
