"""A real watchd, as it runs on a host, that looks after the stages of the demo and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from watchd.errors import WatchdError

LADDER = ("invalidate", "evict", "replace")
"""What it may do about a mount below `ladders`, in this order."""

START_TIMEOUT_S = 10.0
END_TIMEOUT_S = 5.0


class Daemon:
    """`watchd run`, from `with` to its end."""

    def __init__(self, directory: Path, *, mounts: Path, ladders: Path) -> None:
        """What it keeps goes into `directory`; the overlays below `mounts` are its own, and those below `ladders`, on which
        it may do more than to invalidate."""
        directory.mkdir()
        self._directory = directory
        self._config = directory / "watchd.yaml"
        settings = {
            "state_directory": str(directory / "state"),
            "runtime_directory": str(directory / "run"),
            "discovery": {"namespaces": "host", "include": [f"{mounts}/*", f"{ladders}/*"]},
            "mounts": [{"match": f"{ladders}/*", "actions": list(LADDER)}],
            "metrics": {"listen": "off"},
        }
        self._config.write_text(json.dumps(settings, indent=2))  # JSON is YAML

    def __enter__(self) -> Daemon:
        """Returns when it keeps all mounts true. Raises WatchdError."""
        ready = self._directory / "notify"  # it tells when it is ready, as it does under systemd
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, (self._directory / "log").open("wb") as log:
            told.bind(os.fspath(ready))
            told.settimeout(0.1)
            environment = {**os.environ, "NOTIFY_SOCKET": os.fspath(ready)}
            self._process = subprocess.Popen(
                self._command("run"), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            try:
                self._await(told)
            except BaseException:
                self._end()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _await(self, told: socket.socket) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                told.recv(4096)
                status, words = self.sync()  # each mount is invalidated once at the start: not in the middle of a case
                if status == 0:
                    return
                raise WatchdError(f"watchd does not find the mounts coherent: {words or 'it said nothing'}")
        self.check()
        raise WatchdError(f"watchd was not ready after {START_TIMEOUT_S:g} s")

    def check(self) -> None:
        """Raises WatchdError if the daemon has ended."""
        if self._process.poll() is not None:
            words = (self._directory / "log").read_text(errors="replace").splitlines()
            raise WatchdError(f"watchd ended: {words[-1] if words else 'it said nothing'}")

    def sync(self, *mounts: Path) -> tuple[int, str]:
        """`watchd sync`: its exit status and what it printed."""
        done = subprocess.run(
            self._command("sync", *map(str, mounts)),
            capture_output=True, text=True, errors="surrogateescape", check=False,
        )  # fmt: skip
        return done.returncode, (done.stdout + done.stderr).strip()

    def healings(self, mount: Path) -> list[str]:
        """The actions after which a mount was coherent, in order, as `watchd log` tells. Raises WatchdError."""
        done = subprocess.run(
            self._command("log", "--json"), capture_output=True, encoding="utf-8", errors="replace", check=False
        )
        if done.returncode:
            raise WatchdError(f"watchd log: {done.stderr.strip()}")
        records = map(json.loads, done.stdout.splitlines())
        actions = (record for record in records if record["type"] == "action" and record["mount_point"] == str(mount))
        return [record["method"] for record in actions if record["result"] == "coherent"]

    def _command(self, verb: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "watchd", verb, "--config", str(self._config), *arguments]

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
