"""overlay.discovery against real mounts and namespaces."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.kernel.sandbox import Sandbox
from watchd.kernel.namespaces import mount_namespace
from watchd.overlay.discovery import Discovery, discover, find_namespaces, read_overlays
from watchd.overlay.model import MountPoint, Overlay

ODD_NAMES = [
    b"a b",
    b"a\tb",
    b"a\nb",
    b"a,b",
    b"a:b",
    b"a\\b",
    b"a\\",
    b"a\xff\xfe",
    b"a#b",
    b"a=b",
    b"\\054",
    b"\\:",
    b"a - overlay b",
]


def found_at(discovery: Discovery, path: bytes) -> Overlay:
    (overlay,) = (o for o in discovery.overlays if any(point.path == path for point in o.mount_points))
    return overlay


def escaped(path: bytes) -> bytes:
    for special in (b"\\", b":", b","):
        path = path.replace(special, b"\\" + special)
    return path


@pytest.mark.parametrize("name", ODD_NAMES)
def test_no_name_is_odd_enough_to_lose_a_layer(sandbox: Sandbox, name: bytes) -> None:
    odd, plain = sandbox.directory(b"l/" + name), sandbox.directory(b"plain")
    upper, work = sandbox.directory(b"u/" + name), sandbox.directory(b"w/" + name)
    both = [(b"upperdir", escaped(upper)), (b"workdir", escaped(work))]
    colons = sandbox.mount_overlay(b"m1/" + name, [(b"lowerdir", escaped(odd) + b":" + plain), *both])
    single = sandbox.mount_overlay(b"m2/" + name, [(b"lowerdir+", odd), (b"lowerdir+", plain)])
    discovery = discover("host")
    assert found_at(discovery, colons).lowerdir == (odd, plain)
    assert (found_at(discovery, colons).upperdir, found_at(discovery, colons).workdir) == (upper, work)
    assert found_at(discovery, single).lowerdir == (odd, plain)
    assert discovery.problems == ()


@pytest.mark.parametrize(
    "syntax",
    [[(b"lowerdir+", b"/l"), (b"datadir+", b"/d:1")], [(b"lowerdir", b"/l::/d\\:1")]],
    ids=["single", "colons"],
)
def test_data_only_layers_are_not_taken_for_lowers(sandbox: Sandbox, syntax: list[tuple[bytes, bytes]]) -> None:
    lower, data = sandbox.directory(b"l"), sandbox.directory(b"d:1")
    layers = [(key, value.replace(b"/", sandbox.root + b"/")) for key, value in syntax]
    merged = sandbox.mount_overlay(b"m", [*layers, (b"metacopy", b"on")])
    overlay = found_at(discover("host"), merged)
    assert (overlay.lowerdir, overlay.data_only) == ((lower,), (data,))
    assert overlay.options["metacopy"] == "on"


def test_a_bind_mount_of_a_part_is_no_second_overlay(sandbox: Sandbox) -> None:
    sandbox.directory(b"l/sub")
    merged = sandbox.overlay(b"m", b"l", upper=b"u")
    part = sandbox.bind(b"m/sub", b"part")
    overlay = found_at(discover("host"), part)
    own = (mount_namespace(), os.getpid())
    assert overlay.mount_points == (MountPoint(merged, *own), MountPoint(part, *own, b"/sub"))
    assert not overlay.read_only


def test_an_overlay_that_only_a_container_shows_is_found(sandbox: Sandbox) -> None:
    lower = sandbox.directory(b"l")
    inmate = sandbox.inmate()
    merged = sandbox.directory(b"m")
    inmate.run(f"mount -t overlay -o lowerdir={os.fsdecode(lower)}:/usr none {os.fsdecode(merged)}")
    everything = discover("all")
    assert found_at(everything, merged).mount_points == (MountPoint(merged, inmate.view.namespace, inmate.pid),)
    assert found_at(everything, merged).read_only
    assert everything.namespaces[inmate.view.namespace] == inmate.pid
    assert merged not in {point.path for overlay in discover("host").overlays for point in overlay.mount_points}


def test_an_overlay_of_an_unprivileged_user_is_found(sandbox: Sandbox) -> None:
    lower = sandbox.directory(b"l")
    inmate = sandbox.inmate("--user", "--map-root-user")
    root = os.fsdecode(sandbox.root)
    inmate.run(f"mount -t tmpfs none {root} && mkdir {root}/u {root}/w {root}/l {root}/m")
    inmate.run(f"mount -t overlay -o userxattr,lowerdir={root}/l,upperdir={root}/u,workdir={root}/w none {root}/m")
    overlay = found_at(discover("all"), sandbox.path(b"m"))
    assert overlay.lowerdir == (lower,)
    assert overlay.options["userxattr"] == ""


def test_one_overlay_in_two_namespaces_is_one_and_our_own_view_of_it_comes_first(sandbox: Sandbox) -> None:
    merged = sandbox.overlay(b"m", b"l1", b"l2")
    inmate = sandbox.inmate()
    assert found_at(discover("all"), merged).mount_points == (
        MountPoint(merged, mount_namespace(), os.getpid()),
        MountPoint(merged, inmate.view.namespace, inmate.pid),
    )


def test_a_chrooted_process_does_not_hide_the_mounts_of_its_namespace(sandbox: Sandbox) -> None:
    jail, merged = sandbox.mount_tmpfs(b"jail"), sandbox.overlay(b"m", b"l1", b"l2")
    program = (
        "import os, sys, signal; from watchd.kernel.namespaces import unshare, CLONE_NEWNS; unshare(CLONE_NEWNS)\n"
        "r, w = os.pipe(); child = os.fork()\n"
        "if child == 0: os.close(w); os.read(r, 1); os._exit(0)\n"
        "os.chroot(sys.argv[1]); print(child, flush=True); sys.stdin.read(); os.close(w); os.wait()"
    )
    command = [sys.executable, "-c", program, jail]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as confined:
        assert confined.stdout is not None
        free = int(confined.stdout.readline())
        namespace = mount_namespace(confined.pid)
        assert confined.pid < free, "this test needs the chrooted process to be met first"
        assert MountPoint(merged, namespace, free) in found_at(discover("all"), merged).mount_points


def test_a_namespace_that_ends_between_look_and_read_is_no_problem(sandbox: Sandbox) -> None:
    inmate = sandbox.inmate()
    namespaces = find_namespaces("all")
    assert namespaces.pids[inmate.view.namespace] == inmate.pid
    inmate.end()
    assert read_overlays(namespaces).problems == namespaces.problems
    assert find_namespaces("all").pids != namespaces.pids


def test_a_new_container_with_the_number_of_the_last_one_is_seen_as_new(sandbox: Sandbox) -> None:
    seen = find_namespaces("all").pids
    assert find_namespaces("all").pids == seen
    first = sandbox.inmate()
    with_first = find_namespaces("all").pids
    first.end()
    sandbox.inmate()
    assert len({frozenset(look.items()) for look in (seen, with_first, find_namespaces("all").pids)}) == 3


def test_looking_keeps_no_namespace_and_no_descriptor(sandbox: Sandbox) -> None:
    inmate = sandbox.inmate()
    sandbox.directory(b"m")
    before = sorted(os.listdir("/proc/self/fd"))
    discover("all")
    assert sorted(os.listdir("/proc/self/fd")) == before
    inmate.end()


def test_a_process_that_is_a_zombie_is_passed_over(sandbox: Sandbox) -> None:
    before = find_namespaces("all").problems
    with subprocess.Popen(["sleep", "600"]) as process:
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process.pid not in find_namespaces("all").pids.values()
        assert discover("all").problems == before
