"""Overlays that are not in the daemon's own mount namespace, and the command line as people use it."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.kernel.accidents import ACCIDENTS, STRANGERS_PROGRAM, populate
from tests.kernel.compare import look, names_below, open_root, open_twin
from tests.kernel.running import Daemon
from tests.kernel.sandbox import Sandbox

MOUNT = "mkdir -p {m} {up} {work} && mount -t overlay overlay -o lowerdir={low},upperdir={up},workdir={work}{more} {m}"
EVERYDAY = [
    "a new name that somebody looked for",
    "unlink",
    "replace by rename",
    "chmod 600",
    "rename of a directory",
    "recreated directory",
    "file turned directory",
    "swapped symlink",
    "a new name that is not UTF-8",
]


def test_a_shell_sees_the_new_file_after_sync(sandbox: Sandbox, daemon: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    assert not os.path.exists(merged + b"/x")
    with open(sandbox.path(b"low/x"), "w"):
        pass
    done = daemon.verb("sync", merged)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.path.exists(merged + b"/x")


def repopulate(layer: bytes) -> None:
    """Without the program: seen from another mount namespace, nothing runs setuid."""
    populate(layer)
    os.unlink(layer + b"/d/" + STRANGERS_PROGRAM)


@pytest.mark.parametrize("kind", ["mount namespace", "user namespace"])
def test_an_overlay_in_another_namespace_is_kept_true(sandbox: Sandbox, daemon: Daemon, kind: str) -> None:
    in_user_namespace = kind == "user namespace"
    low = sandbox.directory(b"low")
    repopulate(low)
    inmate = sandbox.inmate(*(("--user", "--map-root-user") if in_user_namespace else ()))
    names = {name: os.fsdecode(sandbox.path(name.encode())) for name in ("low", "m", "up", "work")}
    inmate.run(MOUNT.format(**names, more=",userxattr" if in_user_namespace else ""))
    merged, seen_as = sandbox.path(b"m"), b"/proc/%d/root%s" % (inmate.pid, sandbox.path(b"m"))
    daemon.start()
    assert daemon.mount(merged)["mount_points"][0]["namespace"] == inmate.view.namespace
    twin = sandbox.directory(b"m.twin")
    for accident in map(ACCIDENTS.__getitem__, EVERYDAY):
        with open_root(seen_as) as root:
            known = names_below(root) | {b"d/" + name for name in accident.missing}
            look(root, known)
        accident.happen(low + b"/d")
        assert daemon.verb("sync", merged).returncode == 0
        with (
            open_root(seen_as) as root,
            open_twin(twin, [sandbox.path(b"up"), low], userxattr=in_user_namespace) as true,
        ):
            asked = [*sorted(known), *sorted(names_below(true) - known)]
            assert look(root, asked) == look(true, asked)
        shutil.rmtree(low + b"/d")
        repopulate(low)
        assert daemon.sync(merged) == []


def test_a_namespace_goes_on_being_kept_when_the_process_it_was_found_by_ends(sandbox: Sandbox, daemon: Daemon) -> None:
    low = sandbox.directory(b"low")
    first = sandbox.inmate()
    names = {name: os.fsdecode(sandbox.path(name.encode())) for name in ("low", "m", "up", "work")}
    first.run(MOUNT.format(**names, more=""))
    second = subprocess.Popen(["nsenter", "--target", str(first.pid), "--mount", "cat"], stdin=subprocess.PIPE)
    try:
        merged = sandbox.path(b"m")
        daemon.start()
        assert daemon.mount(merged)["mount_points"][0]["pid"] == first.pid
        seen = b"/proc/%d/root%s/new" % (second.pid, merged)
        assert not os.path.exists(seen)
        first.end()
        with open(low + b"/new", "w"):
            pass
        assert daemon.sync(merged) == []
        assert os.path.exists(seen)
        assert "new" in daemon.changed()
    finally:
        second.communicate()


@pytest.mark.parametrize("how", ["made anew", "mounted over"])
def test_a_layer_whose_path_leads_elsewhere_is_not_called_coherent(sandbox: Sandbox, daemon: Daemon, how: str) -> None:
    low = sandbox.directory(b"low")
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    assert daemon.sync(merged) == []
    if how == "made anew":
        os.rmdir(low)
        os.mkdir(low)
    else:
        sandbox.mount_tmpfs(b"low")
    with open(low + b"/new", "w"):
        pass
    done = daemon.verb("sync", merged)
    assert (done.returncode, done.stderr) == (1, "")
    assert "layer" in done.stdout
    if how == "mounted over":
        sandbox.umount(b"low")
        assert daemon.verb("sync", merged).returncode == 0


def test_permissions_taken_away_through_one_name_of_a_file_hold_under_its_other_names(
    sandbox: Sandbox, daemon: Daemon
) -> None:
    low = sandbox.directory(b"low")
    with open(low + b"/one", "w"):
        pass
    os.chmod(low + b"/one", 0o644)
    os.link(low + b"/one", low + b"/other")
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    with open_root(merged) as root:
        before = look(root, [b"other"])
    os.chmod(low + b"/one", 0o600)
    assert daemon.sync(merged) == []
    with open_root(merged) as root:
        assert look(root, [b"other"]) != before


def test_a_tree_moved_into_a_bind_mounted_layer_through_another_mount_is_watched(
    sandbox: Sandbox, daemon: Daemon
) -> None:
    whole = sandbox.mount_tmpfs(b"whole")
    for name in (b"whole/shared/low", b"whole/outside/tree/deep"):
        sandbox.directory(name)
    low = sandbox.bind(b"whole/shared", b"bound") + b"/low"
    merged = sandbox.overlay(b"merged", b"bound/low", upper=b"up")
    daemon.start()
    os.close(os.open(whole + b"/outside/tree/deep/heard", os.O_CREAT | os.O_WRONLY))
    daemon.sync()
    os.rename(whole + b"/outside/tree", whole + b"/shared/low/tree")
    daemon.sync()
    assert not os.path.exists(merged + b"/tree/deep/new")
    os.close(os.open(low + b"/tree/deep/new", os.O_CREAT | os.O_WRONLY))
    assert daemon.sync(merged) == []
    assert os.path.exists(merged + b"/tree/deep/new")
    assert "tree/deep/new" in daemon.verb("log").stdout
