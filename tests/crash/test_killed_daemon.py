"""kill -9 of the daemon at any moment costs no record and hides no change."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections import Counter

import pytest

from tests.kernel.running import Daemon, Json
from tests.kernel.sandbox import Sandbox
from tests.soak import rounds
from watchd.journal.reader import Follower, NumberedRecord, read
from watchd.records import Change, Desync, Resync, Via

FILES = 2000
KILLS = 6

PACE_S = 0.001
"""So that a daemon lives long enough to get anywhere in its journal."""


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


class Churn(threading.Thread):
    """Makes directories, each with the next number as its name and each once, and files that come and go."""

    def __init__(self, root: bytes) -> None:
        super().__init__()
        self._root = root
        self._progress = threading.Condition()
        self._end = threading.Event()
        self.made = 0
        self.start()

    def run(self) -> None:
        while not self._end.wait(PACE_S):
            directory = os.path.join(self._root, b"of-%d" % (self.made // 100))
            os.makedirs(os.path.join(directory, b"%d" % self.made))
            for name in (b"a", b"b"):
                with open(os.path.join(directory, name), "wb") as file:
                    file.write(b"x")
            os.replace(os.path.join(directory, b"a"), os.path.join(directory, b"c"))
            with self._progress:
                self.made += 1
                self._progress.notify_all()

    def wait_for(self, more: int) -> None:
        """Return when it has made so many more."""
        with self._progress:
            until = self.made + more
            self._progress.wait_for(lambda: self.made >= until)

    def end(self) -> None:
        self._end.set()
        self.join()


class Witness:
    """What was acknowledged to anybody: `sync` has returned, or a reader has seen it."""

    def __init__(self, sandbox: Sandbox, daemon: Daemon) -> None:
        self._sandbox, self._daemon = sandbox, daemon
        self._directory = daemon.home / "state" / "journal"
        self._promised: set[str] = set()
        self._seen: list[NumberedRecord] = []
        self._epoch = ""

    def syncs(self) -> None:
        """Whatever was done before is in the log now."""
        name = f"promised-{len(self._promised)}"
        with open(self._sandbox.path(os.fsencode(f"low/{name}")), "wb"):
            pass
        self._daemon.sync()
        self._promised.add(name)

    def looks(self) -> None:
        """As a reader does at any moment: what it has seen is as it was, and goes on."""
        with Follower(self._directory, len(self._seen)) as follower:
            assert follower.epoch == (self._epoch or follower.epoch)
            self._epoch = follower.epoch
            while records := follower.poll():
                self._seen += records

    def judges(self) -> list[NumberedRecord]:
        """After a crash: all of it is there, the same and once."""
        log = list(read(self._directory))
        assert log[: len(self._seen)] == self._seen
        self._seen = log
        assert [seq for seq, _ in log] == list(range(1, len(log) + 1))
        changes = [record for _, record in log if isinstance(record, Change)]
        assert self._promised <= {os.fsdecode(change.path) for change in changes}
        heard = Counter(path for change in changes if change.via == Via.EVENT and (path := number_of(change)))
        assert set(heard.values()) <= {1}, "a directory is made once"
        return log


def number_of(change: Change) -> bytes:
    """Of the directory that it tells of."""
    name = change.path.rpartition(b"/")[2]
    return name if name.isdigit() else b""


def test_a_daemon_that_is_killed_again_and_again_under_load_takes_back_nothing_and_tells_nothing_twice(
    sandbox: Sandbox, daemon: Daemon
) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.configure(journal={"segment_size": "64KiB"})
    witness = Witness(sandbox, daemon)
    daemon.start()
    witness.syncs()
    churn = Churn(sandbox.path(b"low"))
    try:
        for number in range(rounds(24)):
            if number % 2:
                mortal = [sys.executable, "-m", "tests.crash.mortal", str(chance.randrange(120))]
                assert daemon.fails(launcher=mortal)[0] == -signal.SIGKILL, f"seed {seed}"
            else:
                if number:
                    daemon.start()
                for _ in range(chance.randrange(4)):
                    chance.choice([witness.syncs, witness.looks])()
                    churn.wait_for(chance.randrange(1, 40))
                daemon.kill()
            witness.judges()
    finally:
        churn.end()
    daemon.start()
    assert daemon.sync(merged) == []
    log = witness.judges()
    told = {number_of(record) for _, record in log if isinstance(record, Change)}
    assert {b"%d" % number for number in range(churn.made)} <= told
    gaps = [seq for seq, record in log if isinstance(record, Desync)]
    assert gaps, f"seed {seed}"
    assert [record.closes for _, record in log if isinstance(record, Resync)][-1] == gaps[-1]
    for directory in {b"", *os.listdir(merged)}:
        seen, true = (os.path.join(path, directory) for path in (merged, sandbox.path(b"low")))
        if os.path.isdir(true):
            assert sorted(os.listdir(seen)) == sorted(os.listdir(true))


def test_a_daemon_whose_manager_keeps_its_groups_misses_nothing_either(sandbox: Sandbox, daemon: Daemon) -> None:
    daemon.manager.keeps = True
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    for number in range(KILLS):
        burst = Burst(sandbox.path(b"low"), range(number * FILES, (number + 1) * FILES))
        burst.wait_for_half()
        daemon.kill()
        daemon.start()
        burst.join()
        if number % 2:  # else it is killed while it makes good for the last time
            assert daemon.sync(merged) == []
            assert {str(file) for file in range((number + 1) * FILES)} <= daemon.changed()
    log = daemon.log()
    opened = [record["seq"] for record in log if record["type"] == "desync"]
    assert [record["closes"] for record in log if record["type"] == "resync"][-1:] == opened[-1:]


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
