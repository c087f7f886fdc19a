"""umount and losetup work while watchd runs, and what comes back is kept again."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.conftest import Require
from tests.kernel.accidents import replace, write
from tests.kernel.running import Daemon
from tests.kernel.sandbox import Sandbox
from tests.kernel.stacks import Image, is_makeable

ROUNDS = 300


def come_and_change(sandbox: Sandbox, *, first: bytes) -> bytes:
    """A lower and an overlay on it come up, are used and change; returns the merged mount."""
    sandbox.mount_tmpfs(b"low")
    write(sandbox.path(b"low/file"), first)
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    os.stat(merged + b"/file")
    replace(sandbox.path(b"low/file"), b"changed")
    return merged


@pytest.mark.parametrize("backend", ["fanotify", "inotify"])
def test_no_umount_finds_a_mount_busy(sandbox: Sandbox, daemon: Daemon, backend: str) -> None:
    daemon.configure(sources={"backend": backend})
    daemon.start()
    for number in range(ROUNDS):
        merged = come_and_change(sandbox, first=b"%d" % number)
        if number % 3 == 0:  # at different stages of its being noticed
            daemon.sync()
        elif number % 3 == 1:
            os.stat(merged + b"/file")
        sandbox.umount(b"merged")
        sandbox.umount(b"low")
        daemon.assert_calm()


@pytest.mark.parametrize("backend", ["fanotify", "inotify"])
def test_a_mount_that_comes_back_is_kept_again(sandbox: Sandbox, daemon: Daemon, backend: str) -> None:
    daemon.configure(sources={"backend": backend})
    daemon.start()
    devices = set()
    for number in range(20):
        sandbox.mount_tmpfs(b"low")
        write(sandbox.path(b"low/file"), b"%d" % number)
        merged = sandbox.overlay(b"merged", b"low", upper=b"up%d" % (number % 2))
        devices.add(os.stat(merged).st_dev)
        if number % 4:
            assert daemon.sync(merged) == []
        os.stat(merged + b"/file")
        replace(sandbox.path(b"low/file"), b"changed %d" % number)
        assert daemon.sync(merged) == []
        with open(merged + b"/file", "rb") as file:
            assert file.read() == b"changed %d" % number
        sandbox.umount(b"merged")
        sandbox.umount(b"low")
    assert len(devices) < 20, "no device number came back, so this tested nothing"


def test_every_desync_of_a_layer_that_comes_and_goes_is_closed_by_one_resync(sandbox: Sandbox, daemon: Daemon) -> None:
    daemon.start()
    sandbox.directory(b"low")
    for number in range(5):
        merged = sandbox.overlay(b"merged", b"low", upper=b"up")
        daemon.sync(merged)
        sandbox.umount(b"merged")
        daemon.sync()
        write(sandbox.path(b"low/%d" % number), b"while nobody looked")
    daemon.sync(sandbox.overlay(b"merged", b"low", upper=b"up"))
    log = daemon.log()
    desyncs = [record["seq"] for record in log if record["type"] == "desync"]
    assert len(desyncs) == 5
    assert [record["closes"] for record in log if record["type"] == "resync"] == desyncs
    assert {str(number) for number in range(5)} <= {record["path"] for record in log if record["type"] == "change"}


def test_a_mount_that_is_replaced_by_another_at_once_is_kept(sandbox: Sandbox, daemon: Daemon) -> None:
    for name in (b"one", b"two"):
        write(sandbox.directory(name) + b"/file", name)
    daemon.start()
    for number in range(40):
        lower = (b"one", b"two")[number % 2]
        merged = sandbox.overlay(b"merged", lower, upper=b"up")
        os.stat(merged + b"/file")
        replace(sandbox.path(lower + b"/file"), b"%d" % number)
        assert daemon.sync(merged) == []
        with open(merged + b"/file", "rb") as file:
            assert file.read() == b"%d" % number
        sandbox.umount(b"merged")


def test_a_loop_device_can_be_detached(
    sandbox: Sandbox, daemon: Daemon, tmp_path_factory: pytest.TempPathFactory, require: Require
) -> None:
    require(is_makeable("ext4"), "mkfs.ext4")
    daemon.start()
    for number in range(3):
        image = Image(Path(tmp_path_factory.mktemp("image")), "ext4")
        write(image.path + b"/file", b"old")
        merged = sandbox.mount_overlay(
            b"merged", [(b"lowerdir+", image.path), (b"lowerdir+", sandbox.directory(b"low"))]
        )
        os.stat(merged + b"/file")
        if number:
            assert daemon.sync(merged) == []
        replace(image.path + b"/file", b"new")
        if number == 2:
            assert daemon.sync(merged) == []
        sandbox.umount(b"merged")
        image.close()


def test_sync_of_everything_is_not_troubled_by_a_mount_that_vanishes_meanwhile(
    sandbox: Sandbox, daemon: Daemon
) -> None:
    sandbox.overlay(b"stays", b"low", upper=b"up")
    daemon.start()
    for _ in range(ROUNDS):
        sandbox.overlay(b"passes", b"other", b"third")
        leaving = threading.Thread(target=sandbox.umount, args=(b"passes",))
        leaving.start()
        assert daemon.sync() == []
        leaving.join()
