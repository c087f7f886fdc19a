"""System tests boot a Debian of their own, once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.conftest import Require
from tests.system.booted import Booted
from tests.system.service import Service


@pytest.fixture(scope="session")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted | None]:
    """None where none can be booted."""
    if os.geteuid() != 0 or shutil.which("systemd-nspawn") is None:
        yield None
        return
    guest = Booted(tmp_path_factory.mktemp("booted"))
    try:
        guest.boot()
        yield guest
    finally:
        guest.close()


@pytest.fixture
def guest(booted: Booted | None, require: Require) -> Booted:
    """A Debian that has booted. What a test does to it, it takes back."""
    require(booted, "root, and systemd-nspawn of the Debian package systemd-container")
    assert booted is not None
    return booted


@pytest.fixture
def service(guest: Booted) -> Iterator[Service]:
    """watchd as a unit of the guest, not started yet."""
    service = Service(guest)
    yield service
    service.close()
