"""kill -9 of the daemon at any moment costs no record and hides no change."""

from __future__ import annotations

import os
import threading

import pytest

from tests.kernel.running import Daemon, Json
from tests.kernel.sandbox import Sandbox

FILES = 2000


class Burst(threading.Thread):
    """So many files, created one after the other, each the next number."""

    def __init__(self, directory: bytes, numbers: range) -> None:
        super().__init__()
        self._directory, self._numbers = directory, numbers
        self._progress = threading.Condition()
        self._created = 0
        self.start()

    def run(self) -> None:
        for number in self._numbers:
            with open(os.path.join(self._directory, b"%d" % number), "wb"):
                pass
            with self._progress:
                self._created += 1
                self._progress.notify_all()

    def wait_for_half(self) -> None:
        """Return in its midst."""
        with self._progress:
            self._progress.wait_for(lambda: self._created >= len(self._numbers) // 2)


def positions(log: list[Json], kind: str, layer: str = "") -> list[int]:
    """The sequence numbers of the records of this type, and of this layer if one is given."""
    return [record["seq"] for record in log if record["type"] == kind and layer in ("", record["layer"])]


@pytest.mark.parametrize("backend", ["fanotify", "inotify"])
def test_a_daemon_that_was_killed_in_a_burst_tells_what_it_missed(
    sandbox: Sandbox, daemon: Daemon, backend: str
) -> None:
    daemon.configure(sources={"backend": backend})
    merged = sandbox.overlay(b"merged", b"first", b"second", upper=b"up")
    daemon.start()
    assert daemon.sync(merged) == []
    os.makedirs(sandbox.path(b"first/before"))
    assert daemon.sync(merged) == []
    burst = Burst(sandbox.path(b"first"), range(FILES))
    burst.wait_for_half()
    daemon.kill()
    burst.join()
    known = {record["path"] for record in daemon.log() if record["type"] == "change"}
    assert "before" in known, "a record that a sync had promised"
    assert not os.path.exists(merged + b"/after-death")
    for name in (b"first/after-death", b"second/after-death-too"):
        with open(sandbox.path(name), "wb"):
            pass
    daemon.start()
    assert daemon.sync(merged) == []
    assert os.path.exists(merged + b"/after-death")
    log = daemon.log()
    [restart] = positions(log, "start")[1:]
    layers = {layer["name"] for layer in daemon.status()["layers"]}
    assert len(layers) == 2
    for layer in layers:
        [desync] = positions(log, "desync", layer)
        [resync] = positions(log, "resync", layer)
        assert restart < desync < resync
        assert (log[desync - 1]["reason"], log[resync - 1]["closes"]) == ("restart", desync)
    told = {record["path"]: record["seq"] for record in log if record["type"] == "change" and record["seq"] > restart}
    last_resync = max(positions(log, "resync"))
    missing = {*map(str, range(FILES)), "after-death", "after-death-too"} - known - told.keys()
    assert not missing
    assert all(told[name] < last_resync for name in ("after-death", "after-death-too"))


def test_a_daemon_that_is_killed_again_and_again_leaves_a_journal_without_holes(
    sandbox: Sandbox, daemon: Daemon
) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    for number in range(5):
        burst = Burst(sandbox.path(b"low"), range(number * FILES, (number + 1) * FILES))
        burst.wait_for_half()
        daemon.kill()
        daemon.log()
        daemon.start()
        burst.join()
    assert daemon.sync(merged) == []
    assert {str(number) for number in range(5 * FILES)} <= daemon.changed()
    log = daemon.log()
    opened = [record["seq"] for record in log if record["type"] == "desync"]
    assert [record["closes"] for record in log if record["type"] == "resync"][-1] == opened[-1]


def test_a_daemon_that_was_stopped_says_so_and_finds_what_happened_meanwhile(sandbox: Sandbox, daemon: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    daemon.stop()
    assert daemon.log()[-1]["type"] == "stop"
    assert not os.path.exists(merged + b"/new")
    with open(sandbox.path(b"low/new"), "wb"):
        pass
    daemon.start()
    assert daemon.sync(merged) == []
    assert os.path.exists(merged + b"/new")
    assert "new" in daemon.changed()
