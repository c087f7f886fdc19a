"""watchd as a subject: the installed command line, driven from outside and known only by its contract."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import msgspec

from tests.bench.loads import REPOSITORY
from tests.bench.subjects import PATIENCE_S, Subject, SubjectError, Tally, require_inotify_watches

WATCHD = (sys.executable, "-m", "watchd")
STALE_STATUS = 1


class LogRecord(msgspec.Struct, frozen=True):
    """The part of a line of `watchd log --json` that matters here."""

    type: str
    path: str = ""
    from_path: str = msgspec.field(name="from", default="")
    duration_ns: int = 0


def tally(lines: Iterable[bytes], *, files: int) -> Tally:
    """Count the names of the load that a journal does not hold, and its desync records."""
    decode = msgspec.json.Decoder(LogRecord).decode
    seen = bytearray(2 * files)
    desyncs = 0
    for line in lines:
        record = decode(line)
        desyncs += record.type == "desync"
        for path in (record.path, record.from_path):
            name = path.rpartition("/")[2]
            if record.type == "change" and name.isdecimal():
                seen[int(name)] = 1
    return Tally(lost=seen.count(0), overflows=desyncs)


class Watchd(Subject):
    """`watchd run` with one backend, on the arena's mount alone."""

    backend: ClassVar[str]
    program: ClassVar[Sequence[str]] = WATCHD

    def _spawn(self) -> subprocess.Popen[bytes]:
        if self.backend == "inotify":
            require_inotify_watches(self.arena.directories)
        self._config = self.scratch / "watchd.yaml"
        self._config.write_text(json.dumps(self._configuration()))  # JSON is YAML
        notify = self.scratch / "notify"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(os.fspath(notify))
        self._notify.settimeout(1.0)
        environment = {**os.environ, "NOTIFY_SOCKET": os.fspath(notify)}
        return self._popen(self._command("run"), env=environment)

    def _configuration(self) -> dict[str, object]:
        return {
            "state_directory": str(self.scratch / "state"),
            "runtime_directory": str(self.scratch / "run"),
            "discovery": {"include": [self.arena.pattern]},
            "sources": {"backend": self.backend},
            "metrics": {"listen": "off"},
        }

    def _command(self, verb: str, *arguments: str) -> list[str]:
        return [*self.program, verb, "--config", str(self._config), *arguments]

    def _await_ready(self) -> None:
        for _ in self.checks(every_s=0):
            try:
                if b"READY=1" in self._notify.recv(4096).split(b"\n"):
                    return
            except TimeoutError:
                continue

    def _end(self) -> None:
        self._notify.close()
        super()._end()

    def drained(self) -> Callable[[], Tally]:
        command = self._command("sync", "--timeout", str(int(PATIENCE_S)), str(self.arena.merged))
        outcome = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False)
        if outcome.returncode not in (0, STALE_STATUS):
            raise SubjectError(f"watchd sync ended with status {outcome.returncode}: {outcome.stderr.decode().strip()}")
        return self._tally

    def acting_s(self) -> float:
        """The time that all actions together took."""
        self.drained()
        with self._log() as log:
            assert log.stdout is not None
            decode = msgspec.json.Decoder(LogRecord).decode
            return sum(record.duration_ns for record in map(decode, log.stdout) if record.type == "action") / 1e9

    def _log(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command("log", "--json"), cwd=REPOSITORY, stdout=subprocess.PIPE)

    def _tally(self) -> Tally:
        with self._log() as log:
            assert log.stdout is not None
            counted = tally(log.stdout, files=self.files)
        if log.returncode != 0:
            raise SubjectError(f"watchd log ended with status {log.returncode}")
        return counted


class WatchdFanotify(Watchd):
    """watchd on fanotify, its first choice."""

    backend = "fanotify"


class WatchdUnmuted(WatchdFanotify):
    """watchd that hears everything on the filesystem of its lowers, to show what muting is worth."""

    _WITHOUT = "from watchd.sources import mute; mute.HOT_EVENTS = 1 << 60; from watchd.cli import main; main()"
    program = (sys.executable, "-c", _WITHOUT)


class WatchdInotify(Watchd):
    """watchd on inotify."""

    backend = "inotify"
