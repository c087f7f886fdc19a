"""The daemon sees what is written through a name while it is stale, and says so."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.kernel.accidents import populate, replace
from tests.kernel.running import Daemon
from tests.kernel.sandbox import Sandbox
from tests.kernel.test_pinned import held
from watchd.coherence.damage import REPLACED, RETURNED, WRITTEN


def append(path: bytes) -> None:
    with open(path, "ab") as file:
        file.write(b" and more")


def damage(daemon: Daemon, merged: bytes) -> list[dict[str, Any]]:
    return [entry for entry in daemon.mount(merged)["stale"] if entry["kind"] == "damage"]


@pytest.mark.parametrize("mode", ["repair", "observe"])
@pytest.mark.parametrize("kind", ["replaced", "ghost"])
def test_old_content_that_was_copied_up_over_the_new_file_is_told(
    sandbox: Sandbox, daemon: Daemon, mode: str, kind: str
) -> None:
    low = sandbox.directory(b"low")
    populate(low)
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.configure(coherence={"mode": mode})
    daemon.start()
    daemon.sync()
    with held(merged + b"/d/file"):
        if kind == "replaced":
            replace(low + b"/d/file", b"new")
        else:
            os.unlink(low + b"/d/file")
        assert daemon.verb("sync", merged).returncode == 1
        append(merged + b"/d/file")
        done = daemon.verb("sync", merged)
        reason = WRITTEN if kind == "replaced" else RETURNED
        assert f"/d/file: damage: {reason}" in done.stdout
        assert [(entry["path"], entry["reason"]) for entry in damage(daemon, merged)] == [("d/file", reason)]
    assert daemon.verb("sync", merged).returncode == 0, "a mount made anew would show it too"
    assert damage(daemon, merged) != []
    [record] = [record for record in daemon.log() if record["type"] == "damage"]
    assert (record["mount_point"], record["path"], record["reason"]) == (os.fsdecode(merged), "d/file", reason)
    with open(merged + b"/d/file", "rb") as file:
        assert file.read() == b"old file and more", "nothing is repaired silently"
    os.unlink(sandbox.path(b"up/d/file"))
    assert daemon.verb("invalidate", merged).returncode == 0
    assert daemon.verb("sync", merged).returncode == 0
    assert damage(daemon, merged) == []
    assert os.path.exists(merged + b"/d/file") == (kind == "replaced")


def test_what_is_written_after_the_repair_is_no_damage(sandbox: Sandbox, daemon: Daemon) -> None:
    low = sandbox.directory(b"low")
    populate(low)
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    with open(merged + b"/d/file", "rb") as file:
        file.read()
    replace(low + b"/d/file", b"new")
    assert daemon.sync(merged) == []
    append(merged + b"/d/file")
    replace(merged + b"/d/second", b"made on purpose")
    os.unlink(merged + b"/d/dir/a")
    assert daemon.sync(merged) == []
    assert daemon.mount(merged)["stale"] == []


def test_what_evicting_puts_in_the_upper_for_a_moment_is_no_damage(sandbox: Sandbox, daemon: Daemon) -> None:
    low = sandbox.directory(b"low")
    populate(low)
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.configure(coherence={"actions": ["invalidate", "evict"]})
    daemon.start()
    daemon.sync()
    with held(merged + b"/d/file"), held(merged + b"/d/second"):
        replace(low + b"/d/file", b"new")
        os.unlink(low + b"/d/second")
        assert daemon.sync(merged) == []
        with open(merged + b"/d/file", "rb") as file:
            assert file.read() == b"new"
        assert daemon.sync(merged) == []
    assert daemon.sync(merged) == []
    assert "damage" not in {record["type"] for record in daemon.log()}


def test_a_copy_of_attributes_whose_content_was_replaced_is_told_as_it_happens(
    sandbox: Sandbox, daemon: Daemon
) -> None:
    low = sandbox.directory(b"low")
    populate(low)
    layers = [(b"lowerdir+", low), (b"upperdir", sandbox.directory(b"up")), (b"workdir", sandbox.directory(b"work"))]
    merged = sandbox.mount_overlay(b"merged", [*layers, (b"redirect_dir", b"on"), (b"metacopy", b"on")])
    daemon.start()
    os.chmod(merged + b"/d/file", 0o600)
    replace(low + b"/d/file", b"new content that is longer")
    daemon.sync(merged)
    assert [(entry["path"], entry["reason"]) for entry in damage(daemon, merged)] == [("d/file", REPLACED)]
