"""Every accident, in every stack of layers, on every filesystem."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.conftest import Require
from tests.kernel.images import Images
from tests.kernel.matrix import SHAPES, Shape, play, populate_others, set_scene
from tests.kernel.running import Daemon
from tests.kernel.sandbox import Sandbox
from tests.kernel.stacks import is_makeable

SOME_SHAPES = [Shape(1, 0, has_upper=True), Shape(2, 1, has_upper=False), Shape(3, 1, has_upper=True)]
TWO = Shape(2, 0, has_upper=True)


@pytest.mark.parametrize("filesystem", ["tmpfs"], indirect=True)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_accident_in_every_stack(running: Daemon, sandbox: Sandbox, place: bytes, shape: Shape) -> None:
    play(set_scene(sandbox, shape, place), running)


@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs"], indirect=True)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_every_accident_on_every_filesystem(running: Daemon, sandbox: Sandbox, place: bytes, shape: Shape) -> None:
    play(set_scene(sandbox, shape, place), running)


@pytest.mark.parametrize("filesystem", ["btrfs"], indirect=True)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_every_accident_on_a_btrfs_subvolume_which_takes_no_filesystem_mark(
    running: Daemon, sandbox: Sandbox, place: bytes, shape: Shape
) -> None:
    subprocess.run(["btrfs", "-q", "subvolume", "create", place], check=True)
    changing = place + b"/low"
    play(set_scene(sandbox, shape, changing), running)
    [layer] = [layer for layer in running.status()["layers"] if layer["path"] == os.fsdecode(changing)]
    assert layer["backend"] == "inotify"


@pytest.fixture(scope="module")
def squashfs(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes | None]:
    """A lower that cannot change, with something for every accident."""
    content = tmp_path_factory.mktemp("content")
    if not is_makeable("squashfs"):
        yield None
        return
    content.chmod(0o755)  # the root of the merged mount, if it is the first layer
    populate_others(os.fsencode(content), TWO)
    with images.mounted("squashfs", tmp_path_factory.mktemp("squashfs"), content=content) as path:
        yield os.fsencode(path)


def test_every_accident_in_a_lower_over_a_squashfs(
    running: Daemon, sandbox: Sandbox, squashfs: bytes | None, require: Require
) -> None:
    require(squashfs is not None, "mksquashfs")
    assert squashfs is not None
    play(set_scene(sandbox, TWO, sandbox.path(b"low"), other=squashfs), running)


@pytest.mark.parametrize("filesystem", ["ext4"], indirect=True)
def test_every_accident_below_a_squashfs(
    running: Daemon, sandbox: Sandbox, place: bytes, squashfs: bytes | None, require: Require
) -> None:
    require(squashfs is not None, "mksquashfs")
    assert squashfs is not None
    play(set_scene(sandbox, Shape(2, 1, has_upper=False), place, other=squashfs), running)
