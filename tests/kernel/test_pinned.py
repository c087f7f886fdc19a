"""What somebody holds open cannot be repaired; it is named, and repaired when it is let go."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.kernel.accidents import populate, replace
from tests.kernel.running import Daemon
from tests.kernel.sandbox import Sandbox


@contextlib.contextmanager
def held(path: bytes) -> Iterator[int]:
    """A process that has the file open."""
    command = ["sh", "-c", 'exec 3<"$0"; echo; read -r line', path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        try:
            yield holder.pid
        finally:
            holder.communicate(b"\n")


@pytest.mark.parametrize("kind", ["replaced", "ghost"])
def test_a_pinned_file_is_not_called_coherent(sandbox: Sandbox, daemon: Daemon, kind: str) -> None:
    low = sandbox.directory(b"low")
    populate(low)
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    with held(merged + b"/d/file") as holder:
        if kind == "replaced":
            replace(low + b"/d/file", b"new")
        else:
            os.unlink(low + b"/d/file")
        done = daemon.verb("sync", merged)
        assert done.returncode == 1
        assert f"{os.fsdecode(merged)}/d/file: {kind}" in done.stdout
        mount = daemon.mount(merged)
        assert mount["state"] == "pinned"
        [stale] = mount["stale"]
        assert (stale["path"], stale["kind"]) == ("d/file", kind)
        assert {"pid": holder, "command": "sh", "how": "open"} in stale["pinned_by"]
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
    [hidden] = daemon.sync()
    assert hidden["state"] == "failed"
    sandbox.umount(b"merged")
    assert daemon.sync(merged) == []
    with open(merged + b"/d/file", "rb") as file:
        assert file.read() == b"new"
    assert {record["type"] for record in daemon.log()} == {"start", "change", "action"}, (
        "its layers were watched all along"
    )


def test_a_pinned_name_does_not_make_every_other_change_flush_the_mount(sandbox: Sandbox, daemon: Daemon) -> None:
    low = sandbox.directory(b"low")
    populate(low)
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    with held(merged + b"/d/file"):
        os.unlink(low + b"/d/file")
        daemon.sync()
        before = daemon.mount(merged)["actions"]["invalidate"]
        for number in range(100):
            replace(low + b"/d/other%d" % number, b"nobody looked for it")
            assert [stale["path"] for mount in daemon.sync() for stale in mount["stale"]] == ["d/file"]
        assert daemon.mount(merged)["actions"]["invalidate"] < before + 50
    assert daemon.sync() == []


def test_changes_told_while_the_layer_was_out_of_reach_are_not_forgotten(sandbox: Sandbox, daemon: Daemon) -> None:
    low = sandbox.directory(b"low")
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    assert not os.path.exists(merged + b"/new")
    os.rename(low, low + b".away")
    replace(low + b".away/new", b"new")
    daemon.sync()
    os.rename(low + b".away", low)
    assert daemon.verb("sync", merged).returncode == 0
    assert os.path.exists(merged + b"/new")


def test_a_listing_that_somebody_has_read_and_holds_is_not_called_coherent(sandbox: Sandbox, daemon: Daemon) -> None:
    low = sandbox.directory(b"low")
    populate(low)
    os.makedirs(sandbox.path(b"up/d"))
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    reader = os.open(merged + b"/d", os.O_RDONLY)
    os.listdir(reader)
    replace(low + b"/d/new", b"nobody looked for it")
    done = daemon.verb("sync", merged)
    assert done.returncode == 1
    assert f"{os.fsdecode(merged)}/d: listing" in done.stdout
    [stale] = daemon.mount(merged)["stale"]
    assert {"pid": os.getpid(), "how": "open"}.items() <= stale["pinned_by"][0].items()
    os.close(reader)
    assert daemon.verb("sync", merged).returncode == 0
    assert b"new" in os.listdir(merged + b"/d")
