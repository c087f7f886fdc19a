"""coherence.pins: every way to hold an object is found, and nothing else is taken for one."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.kernel.accidents import write
from tests.kernel.running import REPOSITORY
from tests.kernel.sandbox import Sandbox
from watchd.coherence.pins import Holder, Wanted, find_holders
from watchd.overlay.discovery import discover
from watchd.overlay.model import device_number

WAYS = {
    "open": "file = open(path)",
    "cwd": "os.chdir(os.path.dirname(path))",
    "root": "os.chroot(os.path.dirname(path))",
    "mapped": "file = open(path, 'rb'); memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); file.close()",
    "watch": "import ctypes; libc = ctypes.CDLL(None); libc.inotify_add_watch(libc.inotify_init(), path.encode(), 2)",
}
"""How a process holds a file or, with cwd and root, the directory that it is in."""


@contextlib.contextmanager
def process(code: str, path: bytes) -> Iterator[int]:
    """A process that did something to `path` and goes on living."""
    program = f"import mmap, os, sys\npath = sys.argv[1]\n{code}\nprint(flush=True)\nsys.stdin.read()"
    command = [sys.executable, "-c", program, os.fsdecode(path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"\n"
        try:
            yield holder.pid
        finally:
            holder.stdin.close()


@pytest.fixture
def merged(sandbox: Sandbox) -> bytes:
    low = sandbox.directory(b"low")
    os.makedirs(low + b"/d/sub")
    write(low + b"/d/file", b"content")
    write(low + b"/d/other", b"content")
    return sandbox.overlay(b"merged", b"low", upper=b"up")


def holders(device: str, *paths: bytes, at: bytes) -> dict[bytes, tuple[Holder, ...]]:
    """Who holds these paths of the overlay `device`, as `at` shows them."""
    (overlay,) = (overlay for overlay in discover("all").overlays if overlay.device == device)
    objects = {}
    for path in paths:
        status = os.stat(os.path.join(at, path))
        objects[path] = (status.st_dev, status.st_ino)
    return find_holders(Wanted(device_number(device), overlay.mount_points, objects))


def device_of(merged: bytes) -> str:
    device = os.stat(merged).st_dev
    return f"{os.major(device)}:{os.minor(device)}"


def ways(merged: bytes, *paths: bytes) -> dict[bytes, set[tuple[int, str]]]:
    """Process and way by path."""
    found = holders(device_of(merged), *paths, at=merged)
    return {path: {(holder.pid, holder.how) for holder in held} for path, held in found.items()}


@pytest.mark.parametrize("way", ["open", "cwd", "root", "mapped", "watch"])
def test_a_process_that_holds_an_object_is_named_with_how(merged: bytes, way: str) -> None:
    with process(WAYS[way], merged + b"/d/file") as pid:
        found = ways(merged, b"d/file", b"d", b"d/other", b"d/sub")
    about = b"d" if way in ("cwd", "root") else b"d/file"
    assert (pid, way) in found.pop(about)
    above = {(pid, way)} if about == b"d/file" and way != "watch" else set()
    assert found.pop(b"d", set()) >= above, "what holds a file holds the directories above it"
    assert found == {}


def test_a_program_that_runs_is_named(sandbox: Sandbox, merged: bytes) -> None:
    shutil.copy(b"/bin/sleep", sandbox.path(b"low/d/program"))
    with subprocess.Popen([merged + b"/d/program", "1000"]) as running:
        try:
            assert ways(merged, b"d/program")[b"d/program"] == {(running.pid, "exe"), (running.pid, "mapped")}
        finally:
            running.kill()


@pytest.mark.parametrize(
    ("flags", "held"), [("fan.FAN_MARK_ADD", True), ("fan.FAN_MARK_ADD | 0x200", False)], ids=["plain", "evictable"]
)
def test_a_fanotify_mark_is_a_watch_unless_it_may_be_evicted(merged: bytes, flags: str, held: bool) -> None:
    code = (
        "import watchd.kernel.fanotify as fan\n"
        "group = fan.fanotify_init(0x200)\n"
        f"fan.fanotify_mark(group, {flags}, 0x2, dirfd=-100, path=os.fsencode(path))"
    )
    with process(code, merged + b"/d/file") as pid:
        assert ways(merged, b"d/file") == ({b"d/file": {(pid, "watch")}} if held else {})


def test_mounts_on_it_and_bind_mounts_of_it_are_named(sandbox: Sandbox, merged: bytes) -> None:
    bound = sandbox.bind(b"merged/d", b"elsewhere")
    sandbox.mount_tmpfs(b"merged/d/sub")
    found = holders(device_of(merged), b"d", b"d/file", at=merged)
    told = {(holder.command, holder.how) for holder in found.pop(b"d")}
    assert told == {(os.fsdecode(bound), "mount"), (os.fsdecode(merged) + "/d/sub", "mount")}
    assert found == {}


def test_an_overlay_with_a_layer_inside_is_named(sandbox: Sandbox, merged: bytes) -> None:
    layers = [(b"lowerdir+", merged + b"/d"), (b"lowerdir+", sandbox.directory(b"other"))]
    outer = sandbox.mount_overlay(b"outer", layers)
    found = holders(device_of(merged), b"d", b"d/file", at=merged)
    assert {(holder.command, holder.how) for holder in found.pop(b"d")} == {(os.fsdecode(outer), "mount")}
    assert found == {}


def test_what_is_held_by_way_of_a_bind_mount_is_found(sandbox: Sandbox, merged: bytes) -> None:
    bound = sandbox.bind(b"merged/d", b"elsewhere")
    with process(WAYS["open"], bound + b"/file") as pid:
        assert ways(merged, b"d/file") == {b"d/file": {(pid, "open")}}


def test_a_process_in_a_namespace_of_its_own_is_found(sandbox: Sandbox, merged: bytes) -> None:
    inmate = sandbox.inmate()
    inmate.run(f"exec 3<{os.fsdecode(merged)}/d/file")
    assert ways(merged, b"d/file") == {b"d/file": {(inmate.pid, "open")}}
    device = device_of(merged)
    sandbox.umount(b"merged")  # now nobody but the inmate shows it
    (overlay,) = (overlay for overlay in discover("all").overlays if overlay.device == device)
    wanted = Wanted(device_number(device), overlay.mount_points, {b"d/file": None})
    assert {(holder.pid, holder.how) for holder in find_holders(wanted)[b"d/file"]} == {(inmate.pid, "open")}


def test_the_same_path_in_another_namespace_is_no_holder(sandbox: Sandbox, merged: bytes) -> None:
    inmate, path = sandbox.inmate(), os.fsdecode(merged)
    inmate.run(f"umount {path} && mount -t tmpfs none {path} && mkdir {path}/d && echo >{path}/d/file && cd {path}/d")
    inmate.run(f"exec 3<{path}/d/file")
    assert ways(merged, b"d/file", b"d") == {}


def test_who_stands_in_a_mount_that_was_unmounted_lazily_is_found(sandbox: Sandbox, merged: bytes) -> None:
    inmate = sandbox.inmate()
    inmate.run(f"cd {os.fsdecode(merged)}/d && umount -l {os.fsdecode(merged)}")
    assert ways(merged, b"d", b"d/sub") == {b"d": {(inmate.pid, "cwd")}}


def test_a_name_that_looks_deleted_is_told_from_one_that_is(sandbox: Sandbox, merged: bytes) -> None:
    write(sandbox.path(b"low/d/file (deleted)"), b"content")
    with process(WAYS["open"], merged + b"/d/file (deleted)") as pid:
        found = ways(merged, b"d/file", b"d/file (deleted)")
    assert found == {b"d/file (deleted)": {(pid, "open")}}


def test_who_holds_what_was_removed_does_not_hold_what_came_in_its_place(merged: bytes) -> None:
    with process(WAYS["open"], merged + b"/d/file"), process(WAYS["mapped"], merged + b"/d/file"):
        os.unlink(merged + b"/d/file")
        write(merged + b"/d/file", b"another one")
        assert ways(merged, b"d/file") == {}


@pytest.mark.parametrize("way", ["open", "mapped"])
def test_a_name_with_any_character_is_found(sandbox: Sandbox, merged: bytes, way: str) -> None:
    name = b"d/ new\nline \\012\xff "
    write(sandbox.path(b"low/") + name, b"content")
    with process(WAYS[way], merged + b"/" + name) as pid:
        assert (pid, way) in ways(merged, name)[name]


def test_an_object_whose_path_is_too_long_to_be_told_is_found(sandbox: Sandbox, merged: bytes) -> None:
    step = b"x" * 250
    descend = f"os.chdir(path)\nfor _ in range(20): os.makedirs({step!r}, exist_ok=True), os.chdir({step!r})"
    with process(descend, merged) as pid:
        status = os.stat(b"/proc/%d/cwd" % pid)
        path = b"/".join([step] * 20)
        (overlay,) = (one for one in discover("all").overlays if one.device == device_of(merged))
        wanted = Wanted(
            device_number(overlay.device), overlay.mount_points, {path: (status.st_dev, status.st_ino), b"d": None}
        )
        found = find_holders(wanted)
    assert {path: {(holder.pid, holder.how) for holder in held} for path, held in found.items()} == {
        path: {(pid, "cwd")}
    }
