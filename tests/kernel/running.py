"""watchd as it really runs: a process of its own, seen through its socket, its journal and its verbs."""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from watchd import client
from watchd.errors import DeadlineError

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 20.0
"""Nothing here takes so long; who waits longer has found a hang."""

_numbers = itertools.count(1)

Json = dict[str, Any]


_PASS_ON = """
import fcntl, os, sys
numbers = [int(number) for number in sys.argv[2].split(",")]
given = [fcntl.fcntl(number, fcntl.F_DUPFD, 100) for number in numbers]
for number in numbers:
    os.close(number)
for place, descriptor in enumerate(given, 3):
    os.dup2(descriptor, place)
    os.close(descriptor)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(given)), LISTEN_FDNAMES=sys.argv[1])
os.execv(sys.argv[3], sys.argv[3:])
"""


class ManagerSocket:
    """The service manager's end of sd_notify(3); with `keeps`, its store of file descriptors too."""

    def __init__(self) -> None:
        self.keeps = False
        self.store: dict[str, int] = {}
        """Descriptors that a process has given, by name, for those that follow."""
        self.address = f"@watchd-test-{os.getpid()}-{next(_numbers)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind("\0" + self.address[1:])

    def wait_for(self, line: str, process: subprocess.Popen[bytes]) -> bool:
        """Whether the process says so before it ends."""
        pidfd = os.pidfd_open(process.pid)
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        try:
            while ready := dict(poll.poll(PATIENCE_S * 1000)):
                if self._socket.fileno() not in ready:
                    return False
                if line in self._take():
                    return True
        finally:
            os.close(pidfd)
        raise AssertionError(f"{line} was not said within {PATIENCE_S:g} s")

    def forget(self) -> None:
        """Take off what was said until now."""
        while select.select([self._socket], [], [], 0)[0]:
            self._take()

    def passing_on(self) -> list[str]:
        """What to put before a command for it to get what is in the store (sd_listen_fds(3))."""
        if not self.store:
            return []
        numbers = ",".join(map(str, self.store.values()))
        return [sys.executable, "-I", "-S", "-c", _PASS_ON, ":".join(self.store), numbers]

    def close(self) -> None:
        self._socket.close()
        for descriptor in self.store.values():
            os.close(descriptor)

    def _take(self) -> list[str]:
        """One message."""
        if not self.keeps:
            return self._socket.recv(65536).decode().split("\n")
        message, descriptors, _, _ = socket.recv_fds(self._socket, 65536, 16)
        lines = message.decode().split("\n")
        name = next((line.removeprefix("FDNAME=") for line in lines if line.startswith("FDNAME=")), "")
        if "FDSTORE=1" in lines:
            [self.store[name]] = descriptors
        elif "FDSTOREREMOVE=1" in lines:
            os.close(self.store.pop(name))
        return lines


class Daemon:
    """`watchd run`, with directories of its own below `home`, which looks after mounts below `scope` only."""

    def __init__(self, home: bytes, *, scope: bytes | None = None, settings: Mapping[str, Any] | None = None) -> None:
        """`settings` are laid over the configuration as it is for tests."""
        self.home = Path(os.fsdecode(home))
        self.home.mkdir(exist_ok=True)
        self.config = self.home / "watchd.yaml"
        self._errors = self.home / "stderr"
        self.manager = ManagerSocket()
        self._process: subprocess.Popen[bytes] | None = None
        self.runtime_directory = self.home / "run"
        self.settings: Json = {
            "state_directory": str(self.home / "state"),
            "runtime_directory": str(self.runtime_directory),
            "discovery": {"include": [os.fsdecode(scope if scope is not None else home) + "/*"], "exclude": ["*.twin"]},
            "metrics": {"listen": "off"},
            **(settings or {}),
        }
        self.configure()

    def configure(self, **settings: Any) -> None:
        """Write the configuration file anew."""
        self.settings |= settings
        self.config.write_text(json.dumps(self.settings))  # JSON is YAML

    def start(self) -> Daemon:
        """Begin, and return when it is ready."""
        self.launch()
        if not self.manager.wait_for("READY=1", self.process):
            self.process.wait()
            raise AssertionError(f"it ended with status {self.process.returncode}:\n{self.errors()}")
        return self

    def launch(self, *, launcher: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Begin, without waiting; `launcher` is a command that runs the command it is given."""
        assert self._process is None, "it runs already"
        self.manager.forget()
        command = [
            *launcher,
            *self.manager.passing_on(),
            sys.executable,
            "-W",
            "always::ResourceWarning",
            "-m",
            "watchd",
            "run",
        ]
        with self._errors.open("ab") as errors:
            self._process = subprocess.Popen(
                [*command, "--config", str(self.config)],
                env={**_environment(), "NOTIFY_SOCKET": self.manager.address},
                pass_fds=list(self.manager.store.values()),
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )
        return self._process

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process that runs now."""
        assert self._process is not None, "it does not run"
        return self._process

    def fails(self, *, launcher: Sequence[str] = ()) -> tuple[int, str]:
        """Begin what must end by itself; its exit status and what it said."""
        said_before = len(self.errors())
        status = self.launch(launcher=launcher).wait(PATIENCE_S)
        self._process = None
        return status, self.errors()[said_before:]

    def stop(self) -> None:
        """End in good order."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            status = process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            process.wait()
            raise AssertionError(f"it did not stop; its threads were at:\n{self.errors()}") from None
        assert status == 0, f"it ended with status {status}:\n{self.errors()}"

    def kill(self) -> None:
        """kill -9."""
        process, self._process = self.process, None
        process.kill()
        process.wait()

    def pause(self) -> None:
        """SIGSTOP; returns when it stands."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def resume(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def signal_and_wait(self, number: signal.Signals, line: str) -> None:
        """Send a signal; return when the daemon has said `line` to its manager."""
        self.manager.forget()
        self.process.send_signal(number)
        assert self.manager.wait_for(line, self.process)

    def close(self) -> None:
        """Stop, and look back: nothing that the daemon printed may be a traceback or tell of a leak."""
        try:
            self.stop()
            self.assert_calm()
        finally:
            self.manager.close()

    def assert_calm(self) -> None:
        """It runs, if it was started, and has printed nothing that a user should not see."""
        assert self._process is None or self._process.poll() is None, f"it ended by itself:\n{self.errors()}"
        errors = self.errors()
        assert not re.search(r"Traceback|ResourceWarning|internal error|never retrieved", errors), errors

    def errors(self) -> str:
        """What it has printed so far."""
        return self._errors.read_text(errors="surrogateescape") if self._errors.exists() else ""

    # ---- asking it --------------------------------------------------------------------------------------------------

    def ask(self, verb: str, **arguments: Any) -> Json:
        """The answer over the socket. Raises as `watchd.client.request` does."""
        try:
            return client.request(self.runtime_directory, verb, timeout=PATIENCE_S, arguments=arguments)
        except DeadlineError:
            process, self._process = self.process, None
            process.send_signal(signal.SIGABRT)
            process.wait()
            raise AssertionError(f"it did not answer; its threads were at:\n{self.errors()}") from None

    def status(self) -> Json:
        """What `watchd status --json` gives."""
        return self.ask("status")

    def mount(self, path: bytes) -> Json:
        """What the status says of the mount at this mount point."""
        return next(mount for mount in self.status()["mounts"] if os.fsdecode(path) in _points(mount))

    def sync(self, *mounts: bytes) -> list[Json]:
        """The barrier; returns the mounts that are not coherent, so `[]` is what exit status 0 of the verb is."""
        answer = self.ask("sync", mounts=[os.fsdecode(path) for path in mounts], timeout=PATIENCE_S)
        return [mount for mount in answer["mounts"] if mount["state"] != "coherent"]

    def actions(self, path: bytes) -> int:
        """How often anything was done to the mount."""
        return sum(self.mount(path)["actions"].values())

    def verb(self, *words: str | bytes) -> subprocess.CompletedProcess[str]:
        """A command line of watchd with this daemon's configuration, run to its end."""
        words = (*words, "--config", str(self.config))
        return subprocess.run(
            [sys.executable, "-m", "watchd", *map(os.fsdecode, words)],
            env=_environment(),
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=2 * PATIENCE_S,
            check=False,
        )

    def log(self, *, is_whole: bool = True) -> list[Json]:
        """The journal, which must be readable and without holes; retention may have removed its beginning if not `is_whole`."""
        done = self.verb("log", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        records = [json.loads(line) for line in done.stdout.splitlines()]
        first = 1 if is_whole else records[0]["seq"]
        assert [record["seq"] for record in records] == list(range(first, first + len(records)))
        return records

    def changed(self) -> set[str]:
        """The paths that the journal tells of."""
        return {record["path"] for record in self.log() if record["type"] == "change"}


def _points(mount: Json) -> set[str]:
    return {point["path"] for point in mount["mount_points"]}


def _environment() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("NOTIFY_SOCKET", "WATCHDOG_USEC")}
    # A hang that a test ends with SIGABRT shows where every thread was.
    return {**environment, "PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
