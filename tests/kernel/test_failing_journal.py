"""A journal that cannot be written: mounts are repaired all the same, and when it can be again nothing is missing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable

import pytest

from tests.kernel.running import PATIENCE_S, Daemon, Json
from tests.kernel.sandbox import MS_REMOUNT, Sandbox, mount
from watchd.errors import WatchdError


def until(condition: Callable[[], object]) -> None:
    """Returns when it holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def state(daemon: Daemon) -> tuple[str, str]:
    journal = daemon.status()["journal"]
    return journal["state"], journal["reason"]


def write(path: bytes) -> None:
    with open(path, "wb"):
        pass


def fill(path: bytes) -> None:
    """Leaves no room on the filesystem."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def of_type(log: list[Json], kind: str) -> list[Json]:
    return [record for record in log if record["type"] == kind]


@pytest.fixture
def small_disk(sandbox: Sandbox, daemon: Daemon) -> bytes:
    """Where the daemon's state lies, on a filesystem of its own."""
    place = sandbox.mount_tmpfs(b"small")
    mount(b"small", place, flags=MS_REMOUNT, data=b"size=8m")
    daemon.configure(state_directory=os.fsdecode(place + b"/state"))
    return place


def test_mounts_are_kept_while_the_disk_is_full_and_what_was_missed_is_recorded_once_there_is_room(
    sandbox: Sandbox, daemon: Daemon, small_disk: bytes
) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    sandbox.overlay(b"another", b"another-low", upper=b"another-up")
    daemon.start()
    write(sandbox.path(b"low/before"))
    assert daemon.sync() == []
    names = {layer["path"]: layer["name"] for layer in daemon.status()["layers"]}
    name, another = (names[os.fsdecode(sandbox.path(path))] for path in (b"low", b"another-low"))
    fill(small_disk + b"/ballast")
    number = 0
    while state(daemon)[0] == "ok":  # what the last page has room for still fits
        number += 1
        write(sandbox.path(b"low/%d" % number))
    assert "No space left" in state(daemon)[1]
    with pytest.raises(WatchdError, match=r"changes cannot be recorded: .*No space left on device; make room"):
        daemon.sync(merged)
    last = daemon.status()["journal"]["last_seq"]
    assert not os.path.exists(merged + b"/unseen")
    write(sandbox.path(b"low/unseen"))
    until(lambda: os.path.exists(merged + b"/unseen"))
    assert daemon.status()["journal"]["last_seq"] == last, "no number goes to what is not recorded"
    assert daemon.mount(merged)["state"] == "coherent"
    sandbox.umount(b"another")
    until(lambda: len(daemon.status()["layers"]) == 1)
    os.unlink(small_disk + b"/ballast")
    until(lambda: state(daemon) == ("ok", ""))
    assert daemon.sync(merged) == []
    log = daemon.log()
    [desync] = [record for record in of_type(log, "desync") if record["layer"] == name]
    [resync] = of_type(log, "resync")
    assert [record["layer"] for record in of_type(log, "desync")] == [name, another]
    assert (desync["reason"], resync["closes"]) == ("limit", desync["seq"])
    assert desync["seq"] > last >= next(record["seq"] for record in log if record.get("path") == "before")
    missed = {record["path"] for record in log[desync["seq"] : resync["seq"]] if record.get("via") == "scan"}
    assert "unseen" in missed
    assert {*map(str, range(1, number + 1))} <= daemon.changed()
    assert len([line for line in daemon.errors().splitlines() if "ERROR" in line]) == 1


def test_a_daemon_stops_in_good_order_while_its_disk_is_full_and_the_next_one_finds_what_it_missed(
    sandbox: Sandbox, daemon: Daemon, small_disk: bytes
) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    assert daemon.sync(merged) == []
    fill(small_disk + b"/ballast")
    number = 0
    while state(daemon)[0] == "ok":
        number += 1
        write(sandbox.path(b"low/%d" % number))
    daemon.stop()
    os.unlink(small_disk + b"/ballast")
    daemon.start()
    assert daemon.sync(merged) == []
    assert {*map(str, range(1, number + 1))} <= daemon.changed()


def test_a_journal_that_somebody_removes_is_begun_anew_with_another_epoch(sandbox: Sandbox, daemon: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    write(sandbox.path(b"low/before"))
    assert daemon.sync(merged) == []
    epoch = daemon.status()["journal"]["epoch"]
    shutil.rmtree(daemon.home / "state" / "journal")
    write(sandbox.path(b"low/meanwhile"))
    until(lambda: daemon.status()["journal"]["epoch"] != epoch)
    write(sandbox.path(b"low/after"))
    assert daemon.sync(merged) == []
    log = daemon.log()
    assert log[0]["type"] == "start"
    assert [record["reason"] for record in of_type(log, "desync")] == ["limit"]
    assert len(of_type(log, "resync")) == 1
    assert "after" in daemon.changed()


def test_numbers_of_a_journal_that_was_removed_mean_nothing_in_the_new_one(sandbox: Sandbox, daemon: Daemon) -> None:
    sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    for action in (write, os.unlink):
        for number in range(100):
            action(sandbox.path(b"low/%d" % number))
        assert daemon.sync() == []
    late = os.fsdecode(sandbox.directory(b"late"))
    sandbox.overlay(b"another", b"late", upper=b"another.up")
    assert daemon.sync() == []
    before = daemon.status()["journal"]
    shutil.rmtree(daemon.home / "state" / "journal")
    until(lambda: daemon.status()["journal"]["epoch"] != before["epoch"])
    assert daemon.sync() == []
    assert daemon.status()["journal"]["last_seq"] < before["last_seq"] - 10
    [name] = [layer["name"] for layer in daemon.status()["layers"] if layer["path"] == late]
    for since, fresh in (("beginning", True), ("now", False)):
        done = daemon.verb("changes", "--since", since, "--layer", name, "--json")
        assert json.loads(done.stdout)["fresh"] is fresh, since


def test_a_daemon_does_not_start_without_a_journal(sandbox: Sandbox, daemon: Daemon, small_disk: bytes) -> None:
    fill(small_disk + b"/ballast")
    status, said = daemon.fails()
    assert status == 1
    assert "No space left on device" in said


def test_whoever_is_killed_while_nothing_is_recorded_is_not_taken_for_one_who_missed_nothing(
    sandbox: Sandbox, daemon: Daemon, small_disk: bytes
) -> None:
    daemon.manager.keeps = True
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    assert daemon.sync(merged) == []
    fill(small_disk + b"/ballast")
    number = 0
    while state(daemon)[0] == "ok":
        number += 1
        write(sandbox.path(b"low/%d" % number))
    daemon.kill()
    daemon.manager.forget()
    os.unlink(small_disk + b"/ballast")
    daemon.start()
    assert daemon.sync(merged) == []
    assert {str(one) for one in range(1, number + 1)} <= daemon.changed()
    # None if it was killed before it had noticed itself: then what it had read is still to be had.
    assert {record["reason"] for record in of_type(daemon.log(), "desync")} <= {"restart"}
