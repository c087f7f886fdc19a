"""Kernel tests mount for real, in a mount namespace that ends with the test run."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Require
from tests.kernel.images import Images
from tests.kernel.matrix import OBSERVED
from tests.kernel.running import Daemon
from tests.kernel.sandbox import MS_PRIVATE, MS_REC, Belongings, Sandbox, mount
from tests.kernel.sandbox import umount as sandbox_umount
from tests.kernel.stacks import Image, is_makeable
from watchd.kernel import namespaces
from watchd.kernel.namespaces import CLONE_NEWNS, Courier, unshare


@pytest.fixture(scope="session")
def own_mount_namespace() -> None:
    """Whatever is mounted from here on vanishes with this process, even if it is killed."""
    unshare(CLONE_NEWNS)
    namespaces._own_namespace.cache_clear()  # a test that ran before may have asked for it
    mount(b"none", b"/", flags=MS_REC | MS_PRIVATE)


@pytest.fixture(scope="session", autouse=True)
def _always_own_mount_namespace(own_mount_namespace: None) -> None:
    """All tests here, whether they say that they mount or not."""


@pytest.fixture
def sandbox(own_mount_namespace: None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A tmpfs to mount on; afterwards nothing of the test may be left."""
    home = tmp_path_factory.getbasetemp()
    before = Belongings(home)
    sandbox = Sandbox(tmp_path)
    yield sandbox
    sandbox.tidy_up()
    for thread in threading.enumerate():
        if thread.name not in before.threads:
            thread.join(timeout=10)
    assert vars(Belongings(home)) == vars(before)


@pytest.fixture
def workspace(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh tmpfs. Unmounting it at the end fails, and with it the test, if anything on it was left open."""
    home = tmp_path_factory.getbasetemp()
    before = Belongings(home)
    path = tmp_path / "workspace"
    path.mkdir()
    mount_tmpfs(path)
    yield path
    if path.is_mount():
        umount(path)
    assert vars(Belongings(home)) == vars(before)


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


@pytest.fixture
def daemon(sandbox: Sandbox) -> Iterator[Daemon]:
    """A daemon for the mounts of the sandbox, not started yet; afterwards it must have ended well and said nothing odd."""
    daemon = Daemon(sandbox.directory(b"daemon"), scope=sandbox.root)
    yield daemon
    daemon.close()


@pytest.fixture(scope="session")
def filesystem(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes | None]:
    """Where a filesystem of the wanted type is mounted; the sandbox itself is a tmpfs. None: there is no such filesystem."""
    fstype = request.param
    if fstype == "tmpfs" or not is_makeable(fstype):
        yield b"" if fstype == "tmpfs" else None
        return
    image = Image(tmp_path_factory.mktemp(fstype), fstype)
    yield image.path
    image.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all of these tests: their mounts come and go under it."""
    home = Sandbox(tmp_path_factory.mktemp("daemon"))
    daemon = Daemon(
        home.directory(b"home"),
        scope=bytes(tmp_path_factory.getbasetemp()),
        settings={"mounts": [{"match": f"*/{OBSERVED.decode()}", "mode": "observe"}]},
    )
    daemon.start()
    yield daemon
    daemon.close()
    home.tidy_up()


@pytest.fixture
def place(sandbox: Sandbox, filesystem: bytes | None, require: Require) -> bytes:
    """Where the layer that changes may be made, on the wanted filesystem."""
    require(filesystem is not None, "a filesystem to mount")
    assert filesystem is not None
    return (filesystem or sandbox.root) + b"/" + sandbox.root.rpartition(b"/")[2]
