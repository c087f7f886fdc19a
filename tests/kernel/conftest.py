"""Kernel tests mount for real, in a mount namespace that ends with the test run."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.images import Images
from tests.kernel.sandbox import MS_PRIVATE, MS_REC, Belongings, Sandbox, mount
from tests.kernel.sandbox import umount as sandbox_umount
from watchd.kernel.namespaces import CLONE_NEWNS, Courier, unshare


@pytest.fixture(scope="session", autouse=True)
def _own_mount_namespace() -> None:
    """Whatever is mounted from here on vanishes with this process, even if it is killed."""
    unshare(CLONE_NEWNS)
    mount(b"none", b"/", flags=MS_REC | MS_PRIVATE)


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    """A tmpfs to mount on; afterwards nothing of the test may be left."""
    before = Belongings(tmp_path.parent)
    sandbox = Sandbox(tmp_path)
    yield sandbox
    sandbox.tidy_up()
    for thread in threading.enumerate():
        if thread.name not in before.threads:
            thread.join(timeout=10)
    assert vars(Belongings(tmp_path.parent)) == vars(before)


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Path]:
    """A fresh tmpfs. Unmounting it at the end fails, and with it the test, if anything on it was left open."""
    before = Belongings(tmp_path.parent)
    path = tmp_path / "workspace"
    path.mkdir()
    mount_tmpfs(path)
    yield path
    if path.is_mount():
        umount(path)
    assert vars(Belongings(tmp_path.parent)) == vars(before)


def mount_tmpfs(path: Path) -> None:
    """A tmpfs at `path`."""
    mount(b"watchd-test", os.fsencode(path), b"tmpfs", data=b"mode=0755")


def umount(path: Path) -> None:
    """umount(2); raises OSError (EBUSY: something is open there)."""
    sandbox_umount(os.fsencode(path))


@pytest.fixture
def courier(sandbox: Sandbox) -> Iterator[Courier]:
    """A courier that is closed before the sandbox is tidied up."""
    courier = Courier()
    yield courier
    courier.close()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Filesystems on loop devices."""
    return Images(tmp_path_factory.mktemp("images"))
