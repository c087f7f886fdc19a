"""coherence.drop_caches on the kernel that runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernel.sandbox import MS_BIND, MS_RDONLY, MS_REMOUNT, Sandbox, mount, umount
from watchd.coherence.drop_caches import DropCaches
from watchd.errors import NotPermittedError


def test_a_negative_entry_is_forgotten(sandbox: Sandbox) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    name = Path(merged.decode()) / "new"
    assert not name.exists()
    (Path(sandbox.path(b"low").decode()) / "new").touch()
    assert not name.exists(), "nothing to heal"
    drops = DropCaches(0)
    drops.drop()
    assert name.exists()
    assert drops.count == 1


def test_read_only_proc_sys_is_told_with_its_remedy(sandbox: Sandbox) -> None:
    mount(b"/proc/sys", b"/proc/sys", flags=MS_BIND)
    try:
        mount(b"none", b"/proc/sys", flags=MS_REMOUNT | MS_BIND | MS_RDONLY)
        with pytest.raises(NotPermittedError, match=r"Read-only file system; .*ProtectKernelTunables=no"):
            DropCaches(0).drop()
    finally:
        umount(b"/proc/sys")
