"""What somebody holds open cannot be repaired; it is named, and repaired when it is let go."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.kernel.accidents import populate, replace
from tests.kernel.running import Daemon
from tests.kernel.sandbox import Sandbox


def hold(path: bytes) -> subprocess.Popen[bytes]:
    """A process that has the file open and says so."""
    command = ["sh", "-c", 'exec 3<"$0"; echo; read -r line', path]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"\n"
    return holder


def let_go(holder: subprocess.Popen[bytes]) -> None:
    """End it."""
    holder.communicate(b"\n")
    assert holder.returncode == 0


@pytest.mark.parametrize("kind", ["replaced", "ghost"])
def test_a_pinned_file_is_not_called_coherent(sandbox: Sandbox, daemon: Daemon, kind: str) -> None:
    low = sandbox.directory(b"low")
    populate(low)
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    holder = hold(merged + b"/d/file")
    if kind == "replaced":
        replace(low + b"/d/file", b"new")
    else:
        os.unlink(low + b"/d/file")
    done = daemon.verb("sync", merged)
    assert done.returncode == 1
    assert f"{os.fsdecode(merged)}/d/file: {kind}" in done.stdout
    mount = daemon.mount(merged)
    assert mount["state"] == "stale"
    assert [(stale["path"], stale["kind"]) for stale in mount["stale"]] == [("d/file", kind)]
    let_go(holder)
    assert daemon.verb("sync", merged).returncode == 0
    assert os.path.exists(merged + b"/d/file") == (kind == "replaced")
    assert daemon.mount(merged)["state"] == "coherent"


def test_a_mount_that_is_hidden_while_its_lower_changes_is_repaired_when_it_shows_again(
    sandbox: Sandbox, daemon: Daemon
) -> None:
    low = sandbox.directory(b"low")
    populate(low)
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    os.stat(merged + b"/d/file")
    sandbox.mount_tmpfs(b"merged")
    replace(low + b"/d/file", b"new")
    daemon.sync()
    sandbox.umount(b"merged")
    assert daemon.sync(merged) == []
    with open(merged + b"/d/file", "rb") as file:
        assert file.read() == b"new"
