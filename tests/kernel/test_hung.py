"""A filesystem whose server hangs or died delays its own mounts only."""

from __future__ import annotations

import os
import socket
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from tests.kernel.accidents import replace, write
from tests.kernel.running import PATIENCE_S, Daemon
from tests.kernel.sandbox import Sandbox

SHORT = "1"
"""Seconds that `sync` is given where it cannot succeed."""


class Bed:
    """A mount that is well, and one over a server."""

    def __init__(self, sandbox: Sandbox, daemon: Daemon) -> None:
        self.sandbox, self.daemon = sandbox, daemon
        self.low = sandbox.directory(b"low")
        self.well = sandbox.overlay(b"well", b"low", upper=b"well.up")
        self.source = sandbox.directory(b"source")
        write(self.source + b"/file", b"old")
        self.server = sandbox.serve(b"served", b"source")
        self._changes = 0

    def mount(self, *lowers: bytes) -> bytes:
        """The overlay over the server, and over these as well."""
        self.merged = self.sandbox.overlay(b"ill", *lowers, b"served", upper=b"ill.up")
        return self.merged

    def assert_the_other_is_kept(self) -> None:
        """A name that was missing is healed, and `sync` of that mount is not delayed."""
        self._changes += 1
        name = b"/new%d" % self._changes
        assert not os.path.exists(self.well + name)
        write(self.low + name, b"new")
        assert self.daemon.sync(self.well) == []
        assert os.path.exists(self.well + name)
        assert self.daemon.mount(self.well)["state"] == "coherent"

    def assert_named(self) -> None:
        """What is waited for is said in the status, and by `sync`, which does not claim anything."""
        done = self.daemon.verb("sync", "--timeout", SHORT)
        assert done.returncode == 3, done.stdout + done.stderr
        assert f"waiting for {os.fsdecode(self.sandbox.path(b'served'))} (fuse" in done.stderr
        until(self.daemon, lambda: self.daemon.mount(self.merged)["state"] == "failed")
        mount = self.daemon.mount(self.merged)
        assert f"waiting for {os.fsdecode(self.sandbox.path(b'served'))} (fuse" in mount["reason"]

    def assert_recovers(self) -> None:
        """By itself, once its server goes on."""
        self.server.go_on()
        until(self.daemon, lambda: self.daemon.mount(self.merged)["state"] == "coherent")
        assert self.daemon.sync() == []
        with open(self.merged + b"/file", "rb") as file:
            assert file.read() == b"new"


def until(daemon: Daemon, condition: Callable[[], bool]) -> None:
    """Poll for what comes by itself; the daemon's own watch over its answers ends a wait that is too long."""
    while not condition():
        daemon.assert_calm()
        os.sched_yield()


@pytest.fixture
def bed(sandbox: Sandbox, daemon: Daemon) -> Iterator[Bed]:
    bed = Bed(sandbox, daemon)
    yield bed
    bed.server.go_on()  # a process with a request that the server has read cannot even be killed


def test_a_server_that_hangs_before_the_daemon_starts_keeps_it_from_nothing_else(bed: Bed, daemon: Daemon) -> None:
    bed.mount()
    assert os.path.exists(bed.merged + b"/file")
    replace(bed.source + b"/file", b"new")
    bed.server.stop()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    daemon.configure(metrics={"listen": f"127.0.0.1:{port}"})
    daemon.start()
    bed.assert_the_other_is_kept()
    bed.assert_named()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
        assert 'watchd_mounts{state="failed"} 1.0' in answer.read().decode()
    bed.assert_the_other_is_kept()
    bed.assert_recovers()


def test_a_mount_over_a_server_that_hangs_is_found_when_it_answers(bed: Bed, daemon: Daemon) -> None:
    daemon.start()
    bed.mount()
    assert os.path.exists(bed.merged + b"/file")
    replace(bed.source + b"/file", b"new")
    bed.server.stop()
    bed.assert_the_other_is_kept()
    bed.assert_named()
    another = bed.sandbox.overlay(b"another", b"low", upper=b"another.up")
    assert daemon.sync(another) == []
    assert daemon.mount(another)["state"] == "coherent"
    bed.assert_recovers()


def test_a_kept_mount_whose_server_hangs_holds_up_no_other(bed: Bed, daemon: Daemon) -> None:
    bed.mount()
    daemon.start()
    assert os.path.exists(bed.merged + b"/file")
    assert daemon.sync() == []
    served = bed.sandbox.path(b"served")
    replace(served + b"/file", b"new")
    bed.server.stop()
    bed.assert_the_other_is_kept()
    bed.assert_named()
    bed.assert_the_other_is_kept()
    bed.assert_recovers()


def test_a_server_that_died_fails_its_mount_only(bed: Bed, daemon: Daemon) -> None:
    bed.mount()
    daemon.start()
    assert os.path.exists(bed.merged + b"/file")
    bed.server.die()
    bed.assert_the_other_is_kept()
    [ill] = daemon.sync()
    assert ill["state"] != "coherent"
    assert "not connected" in ill["reason"]
    bed.assert_the_other_is_kept()


def test_a_mount_point_that_nobody_can_get_to_holds_up_no_other_of_the_same_filesystem(
    bed: Bed, sandbox: Sandbox, daemon: Daemon
) -> None:
    bed.merged = sandbox.overlay(b"served/merged", b"low", upper=b"ill.up")
    daemon.start()
    assert daemon.sync() == []
    assert not os.path.exists(bed.merged + b"/file")
    bed.server.stop()
    write(bed.low + b"/file", b"new")
    bed.assert_the_other_is_kept()
    bed.assert_named()
    bed.assert_the_other_is_kept()
    bed.assert_recovers()


def test_many_mounts_that_hang_leave_threads_for_the_others(bed: Bed, sandbox: Sandbox, daemon: Daemon) -> None:
    served = sandbox.path(b"served")
    merged = [sandbox.overlay(b"ill%d" % number, b"served", upper=b"up%d" % number) for number in range(20)]
    bed.merged = merged[7]
    daemon.start()
    assert daemon.sync() == []
    for path in merged:
        assert not os.path.exists(path + b"/new")
    write(served + b"/new", b"new")
    write(served + b"/file", b"new")
    bed.server.stop()
    for _ in range(3):
        bed.assert_the_other_is_kept()
    bed.assert_named()
    bed.assert_the_other_is_kept()
    bed.assert_recovers()
    assert all(os.path.exists(path + b"/new") for path in merged)


def test_a_container_whose_server_hangs_holds_up_no_other_container(bed: Bed, sandbox: Sandbox, daemon: Daemon) -> None:
    merged = os.fsdecode(bed.mount())
    well = os.fsdecode(sandbox.directory(b"container"))
    other = os.fsdecode(sandbox.directory(b"other"))
    sandbox.inmate()  # sees all that we see, the mount that hangs included
    inmate = sandbox.inmate()
    inmate.run(f"mount -t overlay none -o lowerdir={os.fsdecode(bed.low)}:{other} {well}")
    sandbox.umount(b"ill")
    bed.server.stop()
    daemon.start()
    assert daemon.sync(os.fsencode(well)) == []
    assert daemon.mount(os.fsencode(well))["state"] == "coherent"
    assert daemon.mount(os.fsencode(merged))["state"] == "failed"
    inmate.run(f"! test -e {well}/new")
    write(bed.low + b"/new", b"new")
    assert daemon.sync(os.fsencode(well)) == []
    inmate.run(f"test -e {well}/new")


def test_a_server_that_hangs_is_noticed_though_nothing_changes(bed: Bed, daemon: Daemon) -> None:
    bed.mount()
    daemon.start()
    assert daemon.sync() == []
    bed.server.stop()
    done = daemon.verb("sync")
    assert done.returncode == 1
    assert f"waiting for {os.fsdecode(bed.sandbox.path(b'served'))} (fuse" in done.stdout
    bed.assert_the_other_is_kept()
    bed.server.go_on()
    until(daemon, lambda: daemon.sync() == [])


@pytest.mark.parametrize("known", [False, True], ids=["new", "kept"])
def test_a_daemon_that_waits_for_a_server_reloads_and_stops(bed: Bed, daemon: Daemon, known: bool) -> None:
    bed.mount(b"low")  # what changes there concerns it too
    if known:
        daemon.start()
        assert daemon.sync() == []
    bed.server.stop()  # at rest: a request that it has read and not answered keeps the process that asks from ending
    if not known:
        daemon.start()
    daemon.configure(coherence={"budget": "20%"}, sources={"content": False})
    assert daemon.verb("reload").returncode == 0
    bed.assert_the_other_is_kept()
    daemon.stop()
