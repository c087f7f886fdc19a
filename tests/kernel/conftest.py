"""Tests on real mounts: the whole test process moves into a mount namespace of its own, and every test gets a tmpfs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

CLONE_NEWNS = 0x20000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def mount_tmpfs(path: Path) -> None:
    _check(_libc.mount(b"watchd-test", os.fsencode(path), b"tmpfs", 0, b"mode=0755"))


def umount(path: Path) -> None:
    """umount(2); raises OSError (EBUSY: something is open there)."""
    _check(_libc.umount2(os.fsencode(path), 0))


@pytest.fixture(scope="session")
def mount_namespace() -> None:
    _check(_libc.unshare(CLONE_NEWNS))
    _check(_libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))


@pytest.fixture
def workspace(mount_namespace: None, tmp_path: Path) -> Iterator[Path]:
    """A fresh tmpfs. Unmounting it at the end fails, and with it the test, if anything on it was left open."""
    descriptors = sorted(os.listdir("/proc/self/fd"))
    path = tmp_path / "workspace"
    path.mkdir()
    mount_tmpfs(path)
    yield path
    if path.is_mount():
        umount(path)
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
