"""Whatever kept events from watchd: a desync, one record for every real difference and none else, a resync that counts them."""

from __future__ import annotations

import base64
import os
import random
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel import snapshot
from tests.kernel.running import Daemon, Json
from tests.kernel.sandbox import MS_BIND, Sandbox, mount, umount
from tests.kernel.snapshot import Snapshot, Wilderness, differences, only_tagged


class Watched:
    """A layer at `low` under a daemon that knows it, and something that disturbs its tree."""

    def __init__(self, sandbox: Sandbox, daemon: Daemon, *, seed: int = 0) -> None:
        self.sandbox, self.daemon = sandbox, daemon
        self.merged = sandbox.overlay(b"merged", b"low", upper=b"up")
        self.low = sandbox.path(b"low")
        self.wilderness = Wilderness(self.low, random.Random(seed))
        self.wilderness.grow(60)

    def start(self) -> None:
        self.daemon.start()
        self.settle()

    def settle(self) -> None:
        """Return when the layer is known and all that happened is recorded."""
        self.daemon.sync()
        while not all(layer["known"] for layer in self.daemon.status()["layers"]):
            os.sched_yield()
        self.daemon.sync()

    def churn_live(self, steps: int) -> None:
        """Churn while the daemon listens, until it has recorded all of that."""
        self.wilderness.churn(steps)
        self.daemon.sync()

    def look(self) -> Snapshot:
        return snapshot.snapshot(self.low)

    def assert_told(self, before: Snapshot, after: Snapshot, *, reason: str, since: int = 0) -> None:
        """The last desync of the journal was closed by exactly the differences between two looks."""
        log = self.daemon.log(is_whole=False)
        desync = [record for record in log if record["type"] == "desync" and record["seq"] > since][-1]
        [resync] = [record for record in log if record["type"] == "resync" and record["closes"] == desync["seq"]]
        told = [record for record in log if desync["seq"] < record["seq"] < resync["seq"] and is_news(record)]
        expected = differences(before, after)
        for path in only_tagged(before, after) - {path_of(record) for record in told}:
            del expected[path]
        assert desync["reason"] == reason
        assert {path_of(record): frozenset(record["kinds"]) for record in told} == expected
        assert len(told) == len(expected) == resync["differences"]
        assert {record["via"] for record in told} <= {"scan"}
        assert {path_of(record) for record in told if record["exists"]} == expected.keys() & after.keys()
        rest = [record for record in log if record["seq"] > resync["seq"] and is_news(record)]
        assert rest == [], "told behind the resync"

    @property
    def state(self) -> Path:
        return self.daemon.home / "state"


def is_news(record: Json) -> bool:
    """A change, but not of what `flood` makes."""
    return record["type"] == "change" and not path_of(record).startswith(b"flooded")


def path_of(record: Json) -> bytes:
    return base64.b64decode(record["path_b64"]) if "path_b64" in record else record["path"].encode()


@pytest.fixture(params=["fanotify", "inotify"])
def watched(request: pytest.FixtureRequest, sandbox: Sandbox, daemon: Daemon) -> Watched:
    daemon.configure(sources={"backend": request.param})
    return Watched(sandbox, daemon)


def test_a_daemon_that_was_killed_tells_exactly_what_happened_meanwhile(watched: Watched) -> None:
    watched.start()
    for _ in range(3):
        watched.churn_live(60)
        before = watched.look()
        watched.daemon.kill()
        watched.wilderness.churn(40)
        after = watched.look()
        watched.daemon.start()
        watched.daemon.sync()
        watched.assert_told(before, after, reason="restart")


def test_what_retention_removes_is_known_before(watched: Watched) -> None:
    watched.daemon.configure(journal={"segment_size": "4KiB", "retain_size": "16KiB", "max_delay": "1ms"})
    watched.start()
    for _ in range(3):
        first = first_seq = watched.daemon.status()["journal"]["first_seq"]
        while first_seq == first:
            watched.churn_live(20)
            first_seq = watched.daemon.status()["journal"]["first_seq"]
        before = watched.look()
        watched.daemon.kill()
        watched.wilderness.churn(40)
        after = watched.look()
        watched.daemon.start()
        watched.daemon.sync()
        watched.assert_told(before, after, reason="restart")


def test_an_overflow_is_closed_by_exactly_what_happened(watched: Watched) -> None:
    watched.daemon.configure(sources={**watched.daemon.settings["sources"], "queue": "default"})
    watched.start()
    os.mkdir(watched.low + b"/flooded")
    watched.churn_live(60)
    before = watched.look()
    watched.daemon.pause()
    flood(watched.low + b"/flooded")
    watched.wilderness.churn(40)
    after = watched.look()
    watched.daemon.resume()
    watched.daemon.sync()
    watched.assert_told(before, after, reason="overflow")


def flood(directory: bytes) -> None:
    """More events than a queue holds that leave nothing behind but a directory that was written to."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for number in range(max(limit, 16_384)):
        path = directory + b"/%d" % number
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
        os.unlink(path)


def test_a_daemon_that_was_stopped_for_a_while_misses_nothing_and_tells_nothing_twice(watched: Watched) -> None:
    watched.start()
    at_first = watched.daemon.status()["journal"]["last_seq"]
    before = watched.look()
    watched.daemon.pause()
    watched.wilderness.churn(60)
    watched.daemon.resume()
    after = watched.look()
    watched.daemon.sync()
    log = watched.daemon.log()[at_first:]
    assert {record["via"] for record in log if record["type"] == "change"} <= {"event"}
    told = {path_of(record) for record in log if record["type"] == "change"}
    missing = differences(before, after).keys() - told
    assert all(any(above in told for above in ancestors(path)) for path in missing), "renamed with a directory above"
    watched.daemon.kill()
    watched.daemon.start()
    watched.daemon.sync()
    watched.assert_told(after, after, reason="restart")


def ancestors(path: bytes) -> list[bytes]:
    parts = path.split(b"/")
    return [b"/".join(parts[:count]) for count in range(1, len(parts))]


class Restless(threading.Thread):
    """Churns from the moment it is made until it is told to end."""

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self._watched, self._ends = watched, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ends.is_set():
            self._watched.wilderness.churn(5)

    def end(self) -> None:
        self._ends.set()
        self.join()


def test_what_happens_while_a_layer_is_walked_or_scanned_is_neither_missed_nor_invented(watched: Watched) -> None:
    watched.wilderness.grow(300)
    restless = Restless(watched)
    watched.daemon.start()
    watched.daemon.sync()
    restless.end()
    watched.settle()
    for _ in range(3):
        looked = watched.look()
        watched.daemon.kill()
        watched.daemon.start()
        watched.daemon.sync()
        watched.assert_told(looked, looked, reason="restart")
        watched.daemon.kill()
        watched.wilderness.churn(20)
        restless = Restless(watched)
        watched.daemon.start()
        watched.daemon.sync()
        restless.end()
        watched.daemon.sync()


def test_a_restart_tells_nothing_where_nothing_happened(watched: Watched) -> None:
    watched.start()
    watched.churn_live(100)
    looked = watched.look()
    for end in (watched.daemon.stop, watched.daemon.kill):
        end()
        watched.daemon.start()
        watched.daemon.sync()
        watched.assert_told(looked, looked, reason="restart")


@pytest.mark.parametrize("is_other", [False, True], ids=["the same", "another"])
def test_a_layer_that_was_unmounted_and_is_back_is_compared_with_what_it_was(
    sandbox: Sandbox, daemon: Daemon, is_other: bool
) -> None:
    held, low = sandbox.mount_tmpfs(b"held"), sandbox.directory(b"low")
    other = sandbox.mount_tmpfs(b"other")
    Wilderness(other, random.Random(9)).grow(40)
    sandbox.bind(b"held", b"low")
    watched = Watched(sandbox, daemon)
    watched.start()
    watched.churn_live(60)
    before = watched.look()
    sandbox.umount(b"merged")
    sandbox.umount(b"low")
    while daemon.status()["layers"]:
        os.sched_yield()
    Wilderness(held, random.Random(5)).churn(40)
    sandbox.bind(b"other" if is_other else b"held", b"low")
    after = watched.look()
    sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.sync()
    watched.assert_told(before, after, reason="source-lost")
    assert low == watched.low


def test_a_reboot_is_a_restart_at_another_boot(sandbox: Sandbox, daemon: Daemon) -> None:
    watched = Watched(sandbox, daemon)
    watched.start()
    watched.churn_live(60)
    before = watched.look()
    daemon.kill()
    boot_id = sandbox.path(b"boot_id")
    with open(boot_id, "wb") as file:
        file.write(b"11111111-2222-3333-4444-555555555555\n")
    with open(sandbox.path(b"daemon/run/left-behind"), "wb"):
        pass
    shutil.rmtree(sandbox.path(b"daemon/run"))  # it is a tmpfs and gone after a reboot
    watched.wilderness.churn(40)
    after = watched.look()
    mount(boot_id, b"/proc/sys/kernel/random/boot_id", flags=MS_BIND)
    try:
        daemon.start()
        daemon.sync()
    finally:
        umount(b"/proc/sys/kernel/random/boot_id")
    watched.assert_told(before, after, reason="restart")
    first, second = (record["boot_id"] for record in daemon.log() if record["type"] == "start")
    assert first != second == "11111111-2222-3333-4444-555555555555"


def test_a_journal_that_was_lost_is_begun_with_what_differs_from_what_was_known(watched: Watched) -> None:
    watched.start()
    watched.churn_live(60)
    watched.daemon.stop()
    before = watched.look()
    shutil.rmtree(watched.state / "journal")
    watched.wilderness.churn(40)
    after = watched.look()
    watched.daemon.start()
    watched.daemon.sync()
    watched.assert_told(before, after, reason="restart")
    assert [record["type"] for record in watched.daemon.log()][:2] == ["start", "desync"]
    watched.daemon.kill()
    watched.daemon.start()
    watched.daemon.sync()
    watched.assert_told(after, after, reason="restart", since=3)


def damage(path: Path) -> None:
    """What is in the file is garbage, where SQLite finds out at once."""
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    path.write_bytes(b"garbage" * 1000)


def damage_within(path: Path) -> None:
    """A directory is not what it was."""
    with sqlite3.connect(path) as db:
        db.execute("UPDATE directories SET states = x'00'")
    db.close()


def lose(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("harm", [damage, damage_within, lose])
def test_without_what_was_known_nothing_is_missed_and_it_is_learned_anew(
    watched: Watched, harm: Callable[[Path], None]
) -> None:
    watched.start()
    watched.churn_live(60)
    watched.daemon.stop()
    before = watched.look()
    harm(watched.state / "known.db")
    watched.wilderness.churn(40)
    after = watched.look()
    watched.daemon.start()
    watched.settle()
    log = watched.daemon.log()
    desync, resync = (max(record["seq"] for record in log if record["type"] == kind) for kind in ("desync", "resync"))
    assert desync < resync
    told = {path_of(record) for record in log[desync:resync] if record["type"] == "change"}
    expected = differences(before, after)
    assert {path for path in expected if path in after} <= told, "by their times"
    if harm is damage:
        assert "set aside" in watched.daemon.errors()
    watched.daemon.kill()
    watched.wilderness.churn(20)
    finally_ = watched.look()
    watched.daemon.start()
    watched.daemon.sync()
    watched.assert_told(after, finally_, reason="restart")
