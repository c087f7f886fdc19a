"""What somebody uses cannot be healed; it is told, with who uses it and how, and healed when that ends."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.kernel.accidents import populate, replace, write
from tests.kernel.matrix import Overlay, Scene, Shape, assert_reported, path_of, remember, set_scene, told_of, untruths
from tests.kernel.running import Daemon
from tests.kernel.sandbox import MS_BIND, Sandbox, mount, umount

_HOLD = """
import mmap, os, sys
how, path = sys.argv[1:]
if how == "cwd":
    os.chdir(path)
elif how == "root":
    os.chroot(path)
else:
    held = os.open(path, os.O_RDONLY)
    if how == "mapped":
        mapping = mmap.mmap(held, 0, prot=mmap.PROT_READ)
        os.close(held)
print(flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def used(how: str, path: bytes) -> Iterator[int]:
    """A process that uses the object in this way; its pid."""
    command = [path] if how == "exe" else [sys.executable, "-I", "-S", "-c", _HOLD, how, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdin is not None
        assert user.stdout is not None
        if how == "exe":
            user.stdin.write(b"\n")  # it is cat, so it runs when it gives back the line
            user.stdin.flush()
        assert user.stdout.readline() == b"\n"
        try:
            yield user.pid
        finally:
            user.stdin.close()


def recreate(directory: bytes) -> None:
    shutil.rmtree(directory)
    os.mkdir(directory)
    write(directory + b"/fresh", b"fresh")


@pytest.mark.parametrize("how", ["open", "mapped", "exe", "cwd", "root"])
def test_who_keeps_it_stale_is_named_and_how(sandbox: Sandbox, running: Daemon, how: str) -> None:
    low = sandbox.directory(b"low")
    populate(low)
    shutil.copy(os.fsencode(shutil.which("cat") or "/bin/cat"), low + b"/d/cat")
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    running.sync(merged)
    name = {"exe": b"d/cat", "cwd": b"d/dir", "root": b"d/dir"}.get(how, b"d/file")
    with used(how, merged + b"/" + name) as pid:
        if how in ("cwd", "root"):
            recreate(low + b"/" + name)
        else:
            replace(low + b"/" + name, b"new content")
        done = running.verb("sync", merged)
        assert done.returncode == 1
        assert str(pid) in done.stdout
        told = running.mount(merged)
        assert told["state"] == "pinned"
        [entry] = [entry for entry in told["stale"] if path_of(entry) == name]
        assert (pid, how) in [(holder["pid"], holder["how"]) for holder in entry["pinned_by"]]
    assert running.sync(merged) == []
    assert untruths(Overlay(merged, [sandbox.path(b"up"), low]), {name}) == {}


@pytest.mark.parametrize("through", ["overlay around it", "mount of a directory of it"])
def test_who_keeps_it_stale_through_another_mount_is_named(sandbox: Sandbox, running: Daemon, through: str) -> None:
    low = sandbox.directory(b"low")
    populate(low)
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    with contextlib.ExitStack() as stack:
        if through == "overlay around it":
            file = sandbox.overlay(b"outer", b"merged", upper=b"outer-up") + b"/d/file"
        else:
            mount(merged + b"/d", sandbox.directory(b"part"), flags=MS_BIND)
            stack.callback(umount, sandbox.path(b"part"))
            file = sandbox.path(b"part") + b"/file"
        running.sync()
        with used("open", file) as pid:
            replace(low + b"/d/file", b"new content")
            [told] = running.sync(merged)
            assert told["state"] == "pinned"
            assert [(path_of(entry), entry["kind"]) for entry in told["stale"]] == [(b"d/file", "replaced")]
            assert pid in [holder["pid"] for holder in told["stale"][0]["pinned_by"]]
        assert running.sync() == []
        with open(file, "rb") as now:
            assert now.read() == b"new content"


@contextlib.contextmanager
def all_open(overlay: Overlay, names: set[bytes], *, listed: bool) -> Iterator[None]:
    """Everything that there is; `listed`: directories were read, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    descriptors = []
    try:
        for name in sorted(names):
            with contextlib.suppress(FileNotFoundError):
                path = overlay.merged + b"/" + name
                flags = os.O_PATH | os.O_NOFOLLOW if os.path.islink(path) else os.O_RDONLY
                descriptors.append(os.open(path, flags | os.O_CLOEXEC))
                if listed and os.path.isdir(path):
                    os.listdir(descriptors[-1])
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("listed", [False, True], ids=["open", "open and read"])
@pytest.mark.parametrize("shape", [Shape(1, 0, has_upper=True), Shape(2, 1, has_upper=True)], ids=str)
def test_every_accident_to_what_somebody_has_open_is_told(
    running: Daemon, sandbox: Sandbox, shape: Shape, listed: bool
) -> None:
    scene: Scene = set_scene(sandbox, shape, sandbox.path(b"low"))
    [overlay] = scene.repaired
    running.sync(overlay.merged)
    names = remember(overlay, scene.missing())
    with all_open(overlay, names, listed=listed):
        scene.happen()
        told = told_of(running.sync(overlay.merged), overlay)
        assert_reported(told, untruths(overlay, names))
        assert told["state"] == "pinned", [path_of(entry) for entry in told["stale"] if not entry["pinned_by"]]
        assert all(os.getpid() in {holder["pid"] for holder in entry["pinned_by"]} for entry in told["stale"])
    assert running.sync(overlay.merged) == []
    assert untruths(overlay, names) == {}
