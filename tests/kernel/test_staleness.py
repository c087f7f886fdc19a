"""Whatever happens to a lower layer: after `sync` the merged mount is what a freshly mounted one would be."""

from __future__ import annotations

import os

import pytest

from tests.conftest import Require
from tests.kernel.accidents import ACCIDENTS, Accident, populate
from tests.kernel.matrix import remember, untruths
from tests.kernel.running import Daemon
from tests.kernel.sandbox import Sandbox
from tests.kernel.stacks import LAYOUTS, Stack, two_lowers


@pytest.fixture
def changing(sandbox: Sandbox, filesystem: bytes | None, require: Require) -> bytes:
    """The layer that changes, on the wanted filesystem."""
    require(filesystem is not None, "a filesystem to mount")
    assert filesystem is not None
    layer = (filesystem or sandbox.root) + b"/" + sandbox.root.rpartition(b"/")[2]
    populate(layer)
    return layer


def put_to(accident: Accident, stack: Stack, daemon: Daemon) -> None:
    """Cache, change, sync, compare."""
    outermost = stack.overlays[-1]
    daemon.sync(outermost.merged)
    missing = {b"d/" + name for name in accident.missing}
    names = set().union(*(remember(overlay, missing) for overlay in stack.overlays))
    acted_before = daemon.actions(outermost.merged)
    accident.happen(stack.changing + b"/d")
    assert daemon.sync(*(overlay.merged for overlay in stack.overlays)) == []
    for overlay in stack.overlays:
        assert untruths(overlay, names) == {}
    if not accident.makes_stale:
        assert daemon.actions(outermost.merged) == acted_before, "it was flushed though nothing was stale"
    daemon.assert_calm()


@pytest.mark.parametrize("filesystem", ["tmpfs"], indirect=True)
@pytest.mark.parametrize("accident", ACCIDENTS.values(), ids=ACCIDENTS)
def test_without_watchd_the_merged_mount_is_wrong(sandbox: Sandbox, changing: bytes, accident: Accident) -> None:
    stack = LAYOUTS["lower only"](sandbox, changing)
    [overlay] = stack.overlays
    names = remember(overlay, {b"d/" + name for name in accident.missing})
    accident.happen(changing + b"/d")
    assert bool(untruths(overlay, names)) == accident.makes_stale


@pytest.mark.parametrize("filesystem", ["tmpfs", "ext4"], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("accident", ACCIDENTS.values(), ids=ACCIDENTS)
def test_the_merged_mount_is_true_after(
    running: Daemon, sandbox: Sandbox, changing: bytes, layout: str, accident: Accident
) -> None:
    put_to(accident, LAYOUTS[layout](sandbox, changing), running)


@pytest.mark.parametrize("filesystem", ["xfs", "btrfs"], indirect=True)
@pytest.mark.parametrize("accident", ACCIDENTS.values(), ids=ACCIDENTS)
def test_other_filesystems_are_no_different(
    running: Daemon, sandbox: Sandbox, changing: bytes, accident: Accident
) -> None:
    put_to(accident, LAYOUTS["merged with upper"](sandbox, changing), running)


@pytest.mark.parametrize("filesystem", ["squashfs"], indirect=True)
@pytest.mark.parametrize("accident", ACCIDENTS.values(), ids=ACCIDENTS)
def test_a_lower_over_a_squashfs_is_no_different(
    running: Daemon, sandbox: Sandbox, filesystem: bytes | None, accident: Accident, require: Require
) -> None:
    require(filesystem is not None, "mksquashfs")
    assert filesystem is not None
    low = sandbox.directory(b"low")
    populate(low)
    put_to(accident, two_lowers(sandbox, low, filesystem), running)


def test_a_path_longer_than_the_kernel_takes_does_not_hide_other_changes(sandbox: Sandbox, daemon: Daemon) -> None:
    low = sandbox.directory(b"low")
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    below = os.open(low, os.O_RDONLY)
    for _ in range(20):
        os.mkdir(b"x" * 250, dir_fd=below)
        below, above = os.open(b"x" * 250, os.O_RDONLY, dir_fd=below), below
        os.close(above)
    deepest = os.open(merged, os.O_RDONLY)
    for _ in range(20):
        deepest, above = os.open(b"x" * 250, os.O_RDONLY, dir_fd=deepest), deepest
        os.close(above)
    daemon.start()
    os.close(deepest)
    assert not os.path.exists(merged + b"/new")
    os.close(os.open(b"deep", os.O_CREAT | os.O_WRONLY, dir_fd=below))
    os.close(os.open(low + b"/new", os.O_CREAT | os.O_WRONLY))
    assert daemon.verb("sync", merged).returncode == 0
    assert os.path.exists(merged + b"/new")
    os.close(below)
