"""Kernel tests mount for real, in a mount namespace that ends with the test run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.running import Daemon
from tests.kernel.sandbox import MS_PRIVATE, MS_REC, Belongings, Sandbox, mount
from watchd.kernel.namespaces import CLONE_NEWNS, Courier, unshare


@pytest.fixture(scope="session", autouse=True)
def _own_mount_namespace() -> None:
    """Whatever is mounted from here on vanishes with this process, even if it is killed."""
    unshare(CLONE_NEWNS)
    mount(b"none", b"/", flags=MS_REC | MS_PRIVATE)


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    """A tmpfs to mount on; afterwards nothing of the test may be left."""
    before = Belongings()
    sandbox = Sandbox(tmp_path)
    yield sandbox
    sandbox.tidy_up()
    for thread in threading.enumerate():
        if thread.name not in before.threads:
            thread.join(timeout=10)
    assert vars(Belongings()) == vars(before)


@pytest.fixture
def courier(sandbox: Sandbox) -> Iterator[Courier]:
    """A courier that is closed before the sandbox is tidied up."""
    courier = Courier()
    yield courier
    courier.close()


@pytest.fixture
def daemon(sandbox: Sandbox) -> Iterator[Daemon]:
    """A daemon for the mounts of the sandbox, not started yet; afterwards it must have ended well and said nothing odd."""
    daemon = Daemon(sandbox.directory(b"daemon"), scope=sandbox.root)
    yield daemon
    daemon.close()
