"""coherence.evict on real overlays: what somebody holds is healed under its name, nobody notices, and nothing is left."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.conftest import Require
from tests.kernel.accidents import NOT_UTF8, populate, write
from tests.kernel.accidents import replace as swap
from tests.kernel.images import WRITABLE, Images, has_tools_for
from tests.kernel.running import Daemon
from tests.kernel.sandbox import MS_BIND, MS_RDONLY, MS_REMOUNT, Sandbox, mount
from tests.kernel.views import open_view
from watchd.coherence import husk, standin
from watchd.coherence.actions import Tools
from watchd.coherence.damage import Window, find_damage
from watchd.coherence.drop_caches import DropCaches
from watchd.coherence.evict import evict, tidy
from watchd.coherence.handles import Handles
from watchd.coherence.invalidate import invalidate
from watchd.coherence.replace import replace as replace_mount
from watchd.coherence.round import Task, work
from watchd.coherence.target import Target
from watchd.coherence.targets import build_target
from watchd.coherence.view import Stale, View
from watchd.errors import RefusedError
from watchd.kernel.libc import function
from watchd.kernel.namespaces import Courier
from watchd.overlay.discovery import Scope, discover
from watchd.overlay.layers import resolve
from watchd.overlay.upper import Note, Upper
from watchd.records import Kind

ANYTHING = int(sum(Kind))
STRUCTURE, ATTRIB = int(Kind.CREATE), int(Kind.ATTRIB)

Listing = dict[bytes, Any]


@dataclass
class Mounted:
    """An overlay over the sandbox's `low` with `up` above, and what watchd does to it."""

    merged: bytes
    low: bytes
    up: bytes
    target: Target

    def view(self) -> AbstractContextManager[View]:
        return open_view(self.target)

    def stale(self, *paths: bytes, kinds: int = STRUCTURE) -> list[Stale]:
        """What an invalidation does not heal."""
        with self.view() as view:
            invalidate(view.merged, read_only=False)
            return list(view.stale(dict.fromkeys(paths, kinds), acted=True))

    def evict(self, *paths: bytes, kinds: int = STRUCTURE) -> dict[bytes, str]:
        stale = self.stale(*paths, kinds=kinds)
        assert [entry.path for entry in stale] == sorted(paths), "a test that evicts what is not stale shows nothing"
        with self.view() as view:
            return evict(view, stale)

    def tidy(self) -> dict[bytes, str]:
        with self.view() as view:
            invalidate(view.merged, read_only=False)
            return tidy(view)

    def upper(self) -> Listing:
        """All of it, and all that is in the workdir except for what the kernel keeps in its own directory there.

        Without the one trace that cannot be avoided: a directory in which something was copied up is called impure.
        """
        work = listing(self.up + b".work")
        return {**listing(self.up), b"work": {path: what for path, what in work.items() if b"/" not in path}}


def listing(root: bytes) -> Listing:
    """Everything below a directory, with attributes and xattrs, but for the times of directories."""
    found: Listing = {}
    for directory, directories, files in os.walk(root):
        for name in [b".", *directories, *files]:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            xattrs = {
                key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
            }
            xattrs.pop("trusted.overlay.impure", None)
            times = None if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns
            found[os.path.relpath(path, root)] = (status.st_mode, status.st_uid, status.st_gid, times, xattrs)
    return found


def mounted(merged: bytes, low: bytes, up: bytes, *, scope: Scope = "host") -> Iterator[Mounted]:
    courier = Courier()
    try:
        [overlay] = [
            overlay
            for overlay in discover(scope).overlays
            if any(point.path == merged for point in overlay.mount_points)
        ]
        yield Mounted(merged, low, up, build_target(overlay, resolve(overlay, courier), courier))
    finally:
        courier.close()


def populated(sandbox: Sandbox, name: bytes = b"") -> Iterator[Mounted]:
    """`d` is in the upper too, `only/lower` is not. All of it below `name`."""
    at = name + b"/" if name else b""
    low, up = sandbox.directory(at + b"low"), sandbox.directory(at + b"up")
    os.makedirs(low + b"/d")
    os.makedirs(low + b"/only/lower")
    for path in (b"/d/file", b"/d/beside", b"/only/lower/file", b"/top"):
        write(low + path, b"old")
    merged = sandbox.overlay(b"merged", at + b"low", upper=at + b"up")
    os.chown(merged + b"/d", -1, -1)
    try:
        yield from mounted(merged, low, up)
    finally:
        sandbox.umount(b"merged")


@pytest.fixture
def m(sandbox: Sandbox) -> Iterator[Mounted]:
    """On tmpfs."""
    yield from populated(sandbox)


@pytest.fixture(params=WRITABLE)
def on_filesystem(
    request: pytest.FixtureRequest, sandbox: Sandbox, images: Images, require: Require
) -> Iterator[Mounted]:
    """Upper and lower on a filesystem of each kind."""
    require(has_tools_for(request.param), f"the tools to make {request.param}")
    with images.mounted(request.param, Path(os.fsdecode(sandbox.directory(b"fs")))):
        yield from populated(sandbox, b"fs")


@contextlib.contextmanager
def held(path: bytes, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open, and read from."""
    descriptor = os.open(path, flags)
    try:
        if stat.S_ISDIR(os.stat(descriptor).st_mode):
            os.listdir(descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


_inotify_init1 = function("inotify_init1", ctypes.c_int)
_inotify_add_watch = function("inotify_add_watch", ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


def inotify_watch(path: bytes) -> int:
    """A watch that keeps an inode; ends with its descriptor."""
    descriptor = _inotify_init1(os.O_CLOEXEC)
    _inotify_add_watch(descriptor, path, 0xFFF)
    return descriptor


def read(path: bytes) -> bytes:
    with open(path, "rb") as file:
        return file.read()


# ---- what is healed, and what is left -------------------------------------------------------------------------------


def test_a_file_that_somebody_holds_is_the_new_one_for_everybody_else(on_filesystem: Mounted) -> None:
    m = on_filesystem
    before = m.upper()
    with held(m.merged + b"/d/file") as old:
        swap(m.low + b"/d/file", b"new content")
        assert m.evict(b"d/file") == {}
        assert read(m.merged + b"/d/file") == b"new content"
        assert os.read(old, 100) == b"old"
        assert m.stale(b"d/file") == []
        assert m.upper() == before
    swap(m.low + b"/d/file", b"newer")
    assert m.stale(b"d/file") == []
    assert read(m.merged + b"/d/file") == b"newer", "the upper does not hide it"


def test_what_is_held_in_a_directory_that_only_the_lower_has_is_healed_and_the_directory_goes_when_it_can(
    on_filesystem: Mounted,
) -> None:
    """A merged directory that is in use must not lose its upper one: it would list nothing."""
    m = on_filesystem
    before = m.upper()
    with held(m.merged + b"/only/lower/file"):
        swap(m.low + b"/only/lower/file", b"new")
        assert m.evict(b"only/lower/file") == {}
        assert read(m.merged + b"/only/lower/file") == b"new"
        assert os.listdir(m.merged + b"/only/lower") == [b"file"]
        assert m.tidy() == {b"only": husk.IN_USE}
        assert set(m.upper()) - set(before) == {b"only", b"only/lower"}
        write(m.merged + b"/only/lower/made", b"")
        os.unlink(m.merged + b"/only/lower/made")
    assert m.tidy() == {}
    assert m.upper() == before
    assert os.listdir(m.merged + b"/only/lower") == [b"file"]
    write(m.merged + b"/only/lower/made", b"")


@pytest.mark.parametrize("path", [b"d/file", b"only/lower/file", b"top"])
def test_a_file_that_went_is_gone_though_somebody_holds_it(m: Mounted, path: bytes) -> None:
    before = m.upper()
    with held(m.merged + b"/" + path) as old:
        os.unlink(m.low + b"/" + path)
        assert m.evict(path) == {}
        assert not os.path.exists(m.merged + b"/" + path)
        assert os.read(old, 100) == b"old"
    assert m.tidy() == {}
    assert m.upper() == before
    write(m.low + b"/" + path, b"again")
    m.stale()
    assert read(m.merged + b"/" + path) == b"again", "no whiteout hides it"


def test_the_only_trace_is_that_a_directory_in_which_something_was_copied_up_is_called_impure(m: Mounted) -> None:
    before = m.upper()
    assert "trusted.overlay.impure" not in os.listxattr(m.up + b"/d")
    with held(m.merged + b"/d/file"):
        swap(m.low + b"/d/file", b"new")
        assert m.evict(b"d/file") == {}
    assert os.getxattr(m.up + b"/d", "trusted.overlay.impure") == b"y"
    assert m.upper() == before


CONTENT = os.urandom(1 << 20)


@pytest.mark.parametrize("mode", [0o644, 0o4755, 0o6711, 0o600, 0o444])
def test_the_copy_has_every_attribute_of_the_file_while_it_is_seen(
    m: Mounted, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    seen: list[tuple[Any, ...]] = []

    def attributes(path: bytes) -> tuple[Any, ...]:
        status = os.lstat(path)
        xattrs = {key: os.getxattr(path, key) for key in os.listxattr(path) if key != "trusted.watchd.copy"}
        times = status.st_atime_ns, status.st_mtime_ns
        return status.st_mode, status.st_uid, status.st_gid, status.st_size, times, xattrs, read(path)

    def look(view: View, **_: Any) -> None:
        seen.append(attributes(m.merged + b"/d/file"))
        invalidate(view.merged, read_only=False)

    with held(m.merged + b"/d/file"):
        new = m.low + b"/d/new"
        write(new, CONTENT)
        os.chown(new, 1234, 4321)
        acl = bytes.fromhex(
            "0200000001000600ffffffff0200040039300000040004 00ffffffff10000400ffffffff20000000ffffffff".replace(" ", "")
        )
        os.setxattr(new, "system.posix_acl_access", acl)
        os.setxattr(new, "user.note", b"of the user")
        os.setxattr(new, "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
        os.chmod(new, mode)
        os.utime(new, ns=(10**18 + 1, 10**18 + 2))
        os.rename(new, m.low + b"/d/file")
        wanted = attributes(m.low + b"/d/file")
        os.utime(m.low + b"/d/file", ns=(10**18 + 1, 10**18 + 2))
        monkeypatch.setattr(standin.StandIn, "_drop", lambda self: look(self._view))
        assert m.evict(b"d/file") == {}
    assert seen[0] == wanted
    assert "security.capability" in seen[0][5]


def test_a_symlink_is_replaced(on_filesystem: Mounted) -> None:
    m = on_filesystem
    os.symlink(b"nowhere", m.low + b"/d/link")
    before = m.upper()
    descriptor = os.open(m.merged + b"/d/link", os.O_PATH | os.O_NOFOLLOW)
    os.symlink(b"elsewhere", m.low + b"/d/new")
    os.rename(m.low + b"/d/new", m.low + b"/d/link")
    assert m.evict(b"d/link") == {}
    assert os.readlink(m.merged + b"/d/link") == b"elsewhere"
    assert os.readlink(b"", dir_fd=descriptor) == b"nowhere"
    os.close(descriptor)
    assert m.upper() == before


def test_a_name_that_is_not_utf8(m: Mounted) -> None:
    name = m.low + b"/d/" + NOT_UTF8
    write(name, b"old")
    before = m.upper()
    with held(m.merged + b"/d/" + NOT_UTF8):
        swap(name, b"new")
        assert m.evict(b"d/" + NOT_UTF8) == {}
        assert read(m.merged + b"/d/" + NOT_UTF8) == b"new"
    assert m.upper() == before


def test_a_file_becomes_a_symlink_and_a_symlink_a_file(m: Mounted) -> None:
    with held(m.merged + b"/d/file"):
        os.unlink(m.low + b"/d/file")
        os.symlink(b"beside", m.low + b"/d/file")
        assert m.evict(b"d/file") == {}
        assert os.readlink(m.merged + b"/d/file") == b"beside"
    descriptor = os.open(m.merged + b"/d/file", os.O_PATH | os.O_NOFOLLOW)
    swap(m.low + b"/d/file", b"a file again")
    assert m.evict(b"d/file") == {}
    assert read(m.merged + b"/d/file") == b"a file again"
    os.close(descriptor)


def test_a_file_that_became_a_directory_is_one(m: Mounted) -> None:
    before = m.upper()
    with held(m.merged + b"/d/file"):
        os.unlink(m.low + b"/d/file")
        os.mkdir(m.low + b"/d/file")
        write(m.low + b"/d/file/inside", b"inside")
        assert m.evict(b"d/file") == {}
        assert read(m.merged + b"/d/file/inside") == b"inside"
    assert m.upper() == before


def test_a_listing_that_somebody_holds_is_renewed(m: Mounted) -> None:
    before = m.upper()
    with held(m.merged + b"/d"):
        write(m.low + b"/d/new", b"")
        assert b"new" not in os.listdir(m.merged + b"/d")
        assert m.evict(b"d") == {}
        assert sorted(os.listdir(m.merged + b"/d")) == [b"beside", b"file", b"new"]
    assert m.upper() == before


@pytest.fixture
def two_lowers(sandbox: Sandbox) -> Iterator[Mounted]:
    """`d` is in both."""
    for layer in (b"low", b"other"):
        os.makedirs(sandbox.path(layer) + b"/d")
        write(sandbox.path(layer) + b"/d/" + layer, b"")
    merged = sandbox.overlay(b"merged", b"low", b"other", upper=b"up")
    yield from mounted(merged, sandbox.path(b"other"), sandbox.path(b"up"))


def test_a_listing_of_lowers_only_is_renewed_and_the_upper_directory_goes_when_it_is_let_go(
    two_lowers: Mounted,
) -> None:
    m = two_lowers
    before = m.upper()
    with held(m.merged + b"/d"):
        write(m.low + b"/d/new", b"")
        assert m.evict(b"d") == {}
        assert sorted(os.listdir(m.merged + b"/d")) == [b"low", b"new", b"other"]
    assert m.tidy() == {}
    assert m.upper() == before
    assert sorted(os.listdir(m.merged + b"/d")) == [b"low", b"new", b"other"]


def test_a_directory_that_somebody_holds_grants_what_it_should(m: Mounted) -> None:
    before = m.upper()
    with held(m.merged + b"/only/lower"):
        os.chmod(m.low + b"/only/lower", 0o700)
        assert m.evict(b"only/lower", kinds=ATTRIB) == {}
        assert m.stale(b"only/lower", kinds=ATTRIB) == []
    assert m.tidy() == {}
    assert m.upper() == before


# ---- other overlays -------------------------------------------------------------------------------------------------


def test_with_userxattr(sandbox: Sandbox) -> None:
    low, up, work = (sandbox.directory(name) for name in (b"low", b"up", b"up.work"))
    write(low + b"/file", b"old")
    layers = [(b"lowerdir+", low), (b"upperdir", up), (b"workdir", work)]
    merged = sandbox.mount_overlay(b"merged", [*layers, (b"userxattr", None)])
    for m in mounted(merged, low, up):
        before = m.upper()
        with held(merged + b"/file"):
            swap(low + b"/file", b"new")
            assert m.evict(b"file") == {}
            assert read(merged + b"/file") == b"new"
        assert {path: what for path, what in m.upper().items() if path != b"."}.keys() == before.keys() - {b"."}


def test_with_an_upper_on_another_kind_of_filesystem(sandbox: Sandbox, images: Images, require: Require) -> None:
    require(has_tools_for("ext4"), "the tools to make ext4")
    with images.mounted("ext4", Path(os.fsdecode(sandbox.directory(b"low")))):
        low = sandbox.path(b"low")
        write(low + b"/file", b"old")
        merged = sandbox.overlay(b"merged", b"low", upper=b"up")
        for m in mounted(merged, low, sandbox.path(b"up")):
            before = m.upper()
            with held(merged + b"/file"):
                swap(low + b"/file", CONTENT)
                assert m.evict(b"file") == {}
                assert read(merged + b"/file") == CONTENT
            assert m.upper() == before
        sandbox.umount(b"merged")


def test_in_a_directory_that_was_renamed(sandbox: Sandbox) -> None:
    """The upper says under which name the lower has it."""
    low, up, work = (sandbox.directory(name) for name in (b"low", b"up", b"up.work"))
    os.mkdir(low + b"/d")
    write(low + b"/d/file", b"old")
    layers = [(b"lowerdir+", low), (b"upperdir", up), (b"workdir", work)]
    merged = sandbox.mount_overlay(b"merged", [*layers, (b"redirect_dir", b"on")])
    os.rename(merged + b"/d", merged + b"/renamed")
    for m in mounted(merged, low, up):
        before = m.upper()
        with held(merged + b"/renamed/file"):
            swap(low + b"/d/file", b"new")
            assert m.evict(b"renamed/file") == {}
            assert read(merged + b"/renamed/file") == b"new"
        assert m.upper() == before


def test_in_another_mount_namespace(sandbox: Sandbox) -> None:
    low, up, work = (sandbox.directory(name) for name in (b"low", b"up", b"up.work"))
    merged = os.fsdecode(sandbox.directory(b"merged"))
    write(low + b"/file", b"old")
    inmate = sandbox.inmate()
    options = f"lowerdir={os.fsdecode(low)},upperdir={os.fsdecode(up)},workdir={os.fsdecode(work)}"
    inmate.run(f"mount -t overlay overlay -o {options} {merged}")
    inmate.run(f"exec 3<{merged}/file")
    swap(low + b"/file", b"new")
    for m in mounted(os.fsencode(merged), low, up, scope="all"):
        assert m.evict(b"file") == {}
        assert inmate.run(f"cat {merged}/file") == "new"
        assert inmate.run("cat <&3") == "old"
        assert os.listdir(up) == []


# ---- what cannot be healed is said ----------------------------------------------------------------------------------


def refused(m: Mounted, path: bytes, reason: str, *, kinds: int = STRUCTURE) -> None:
    before = m.upper()
    reasons = m.evict(path, kinds=kinds)
    assert list(reasons) == [path]
    assert reason in reasons[path]
    assert m.upper() == before
    assert m.stale(path, kinds=kinds) != [], "healed though it was refused"


def test_the_permissions_of_a_file_in_use_are_refused(m: Mounted) -> None:
    """The inode is found again by whoever looks the name up anew."""
    with held(m.merged + b"/d/file"):
        os.chmod(m.low + b"/d/file", 0o600)
        refused(m, b"d/file", "old permissions", kinds=ATTRIB)


def test_the_permissions_of_a_file_with_other_links_are_renewed(m: Mounted) -> None:
    """Of such files an overlay makes an inode for each lookup."""
    os.link(m.low + b"/d/file", m.low + b"/d/other")
    before = m.upper()
    with held(m.merged + b"/d/file"):
        os.chmod(m.low + b"/d/file", 0o600)
        assert m.evict(b"d/file", kinds=ATTRIB) == {}
        assert m.stale(b"d/file", kinds=ATTRIB) == []
    assert m.upper() == before


@pytest.mark.parametrize("again", [False, True])
def test_a_directory_in_use_is_refused(m: Mounted, again: bool) -> None:
    with held(m.merged + b"/only/lower"):
        os.unlink(m.low + b"/only/lower/file")
        os.rename(m.low + b"/only/lower", m.low + b"/away")
        if again:
            os.mkdir(m.low + b"/only/lower")
        refused(m, b"only/lower", "cannot be replaced in place")


def test_what_lies_in_a_directory_that_is_stale_itself_is_refused(m: Mounted) -> None:
    with held(m.merged + b"/only/lower"), held(m.merged + b"/only/lower/file"):
        os.rename(m.low + b"/only/lower", m.low + b"/away")
        os.mkdir(m.low + b"/only/lower")
        write(m.low + b"/only/lower/file", b"new")
        refused(m, b"only/lower/file", "is stale itself")


@pytest.mark.parametrize("path", [b"d/file", b"only/lower/file"])
@pytest.mark.parametrize(("old", "new"), [(1001, 1000), (1000, 1001)])
def test_a_file_beyond_the_limit_is_refused(m: Mounted, path: bytes, old: int, new: int) -> None:
    write(m.low + b"/" + path, bytes(old))
    with held(m.merged + b"/" + path):
        swap(m.low + b"/" + path, bytes(new))
        m.target = replace(m.target, evict_limit_bytes=1000)
        refused(m, path, "1001 bytes are more than the limit of 1000")
        m.target = replace(m.target, evict_limit_bytes=1001)
        assert m.evict(path) == {}


def test_a_pipe_is_refused(m: Mounted) -> None:
    with held(m.merged + b"/d/file"):
        os.unlink(m.low + b"/d/file")
        os.mkfifo(m.low + b"/d/file")
        refused(m, b"d/file", "neither a regular file nor a symlink")


def test_without_an_upper_it_is_refused(sandbox: Sandbox) -> None:
    low = sandbox.directory(b"low")
    write(low + b"/file", b"old")
    for m in mounted(sandbox.overlay(b"merged", b"low", b"other"), low, b""):
        with m.view() as view:
            assert evict(view, [Stale(b"file", "replaced")]) == {b"file": "the overlay has no upper"}
            assert tidy(view) == {}


@pytest.mark.parametrize("option", [b"index", b"nfs_export"])
def test_where_copies_would_leave_traces_in_an_index_it_is_refused(sandbox: Sandbox, option: bytes) -> None:
    low, up, work = (sandbox.directory(name) for name in (b"low", b"up", b"up.work"))
    write(low + b"/file", b"old")
    layers = [(b"lowerdir+", low), (b"upperdir", up), (b"workdir", work), (b"index", b"on")]
    merged = sandbox.mount_overlay(b"merged", [*layers, (option, b"on")])
    for m in mounted(merged, low, up):
        with held(merged + b"/file"):
            swap(low + b"/file", b"new")
            refused(m, b"file", "=on a copy leaves traces in the index")


def test_a_full_filesystem_is_refused_and_nothing_left(sandbox: Sandbox) -> None:
    sandbox.directory(b"fs")
    mount(b"tmpfs", sandbox.path(b"fs"), b"tmpfs", data=b"size=1m")
    sandbox._mounts.append(sandbox.path(b"fs"))
    low = sandbox.directory(b"low")
    write(low + b"/file", b"old")
    merged = sandbox.mount_overlay(
        b"merged",
        [
            (b"lowerdir+", low),
            (b"upperdir", sandbox.directory(b"fs/up")),
            (b"workdir", sandbox.directory(b"fs/up.work")),
        ],
    )
    for m in mounted(merged, low, sandbox.path(b"fs/up")):
        with held(merged + b"/file"):
            swap(low + b"/file", bytes(2 << 20))
            refused(m, b"file", "No space left on device")


def test_a_mount_that_is_read_only_for_others_stays_so_and_is_healed(m: Mounted) -> None:
    mount(b"", m.merged, flags=MS_REMOUNT | MS_RDONLY | MS_BIND)
    with held(m.merged + b"/d/file"):
        swap(m.low + b"/d/file", b"new")
        assert m.evict(b"d/file") == {}
        assert read(m.merged + b"/d/file") == b"new"
    with pytest.raises(OSError, match="Read-only"):
        os.chown(m.merged + b"/d/file", -1, -1)


# ---- nobody notices -------------------------------------------------------------------------------------------------

_READER = """
import os, sys
path, versions, size = os.fsencode(sys.argv[1]), set(sys.argv[2]), int(sys.argv[3])
reads = errors = torn = 0
sys.stdout.write("ready\\n")
sys.stdout.flush()
os.set_blocking(0, False)
while not os.read(0, 1) if select_ready() else True:
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError:
        errors += 1
        continue
    reads += 1
    torn += len(content) != size or len(set(content)) != 1 or chr(content[0]) not in versions
print(reads, errors, torn)
"""


class Readers:
    """Processes that read a file in a loop, and count what is wrong: each version of it is `size` times one letter."""

    def __init__(self, path: bytes, *, size: int, number: int = 4) -> None:
        program = _READER.replace("select_ready()", "select.select([0], [], [], 0)[0]").replace(
            "import os", "import os, select"
        )
        command = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            program,
            os.fsdecode(path),
            "abcdefghijklmnopqrstuvwxyz",
            str(size),
        ]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(number)
        ]
        for process in self._processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"

    def end(self) -> tuple[int, int, int]:
        """Reads, errors, torn reads."""
        told = []
        for process in self._processes:
            output, _ = process.communicate("x")
            told.append([int(word) for word in output.split()])
        reads, errors, torn = (sum(column) for column in zip(*told, strict=True))
        return reads, errors, torn


def evict_until_done(m: Mounted, path: bytes) -> None:
    """As the daemon does it: again, until nothing is stale and nothing stands in."""
    for _ in range(1000):
        with m.view() as view:
            invalidate(view.merged, read_only=False)
            stale = list(view.stale({path: STRUCTURE}, acted=True))
            if stale:
                evict(view, stale)
            elif not tidy(view):
                return
        os.sched_yield()
    raise AssertionError("never done")


@pytest.mark.parametrize("size", [100, 1 << 20])
def test_those_who_read_it_all_the_time_see_no_error_and_no_mixture(m: Mounted, size: int) -> None:
    write(m.low + b"/d/file", b"a" * size)
    m.stale()
    before = m.upper()
    with contextlib.ExitStack() as holders:
        readers = Readers(m.merged + b"/d/file", size=size)
        for letter in b"bcdefgh":
            holders.enter_context(held(m.merged + b"/d/file"))
            swap(m.low + b"/d/file", bytes([letter]) * size)
            evict_until_done(m, b"d/file")
            assert read(m.merged + b"/d/file")[:1] == bytes([letter])
        reads, errors, torn = readers.end()
    assert reads > 0
    assert (errors, torn) == (0, 0)
    assert m.upper() == before


def test_a_library_that_a_process_maps_is_the_new_one_for_the_next_process(m: Mounted) -> None:
    page = mmap.PAGESIZE
    write(m.low + b"/d/lib.so", b"a" * page)
    with held(m.merged + b"/d/lib.so") as descriptor:
        mapping = mmap.mmap(descriptor, page, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
    readers = Readers(m.merged + b"/d/lib.so", size=page)
    swap(m.low + b"/d/lib.so", b"b" * page)
    assert read(m.merged + b"/d/lib.so") == b"a" * page
    before = m.upper()
    evict_until_done(m, b"d/lib.so")
    assert subprocess.run(["cat", m.merged + b"/d/lib.so"], capture_output=True, check=True).stdout == b"b" * page
    assert mapping[:page] == b"a" * page
    reads, errors, torn = readers.end()
    assert reads > 0
    assert (errors, torn) == (0, 0)
    mapping.close()
    assert m.upper() == before


def test_a_program_that_runs_is_replaced_and_goes_on(m: Mounted) -> None:
    program = m.low + b"/d/program"
    subprocess.run(["cp", "/bin/cat", program], check=True)
    with subprocess.Popen([m.merged + b"/d/program"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        subprocess.run(["cp", "/bin/echo", program + b".new"], check=True)
        os.chmod(program + b".new", 0o4755)
        os.rename(program + b".new", program)
        assert m.evict(b"d/program") == {}
        said = subprocess.run([m.merged + b"/d/program", "new"], capture_output=True, check=True).stdout
        assert said == b"new\n"
        assert running.communicate(b"still there")[0] == b"still there"


Meddle = Callable[[Mounted], None]


def meddling(monkeypatch: pytest.MonkeyPatch, m: Mounted, meddle: Meddle) -> None:
    """Have something happen at the worst moment: the copy is out of the upper, and the mount has it under the name still."""
    drop = standin.StandIn._drop
    happened: list[bool] = []

    def interfere(self: standin.StandIn) -> None:
        if not happened:
            happened.append(True)
            meddle(m)
        drop(self)

    monkeypatch.setattr(standin.StandIn, "_drop", interfere)


def chmod(m: Mounted) -> None:
    os.chmod(m.merged + b"/d/file", 0o640)


def set_xattr(m: Mounted) -> None:
    os.setxattr(m.merged + b"/d/file", "user.mine", b"1")


def truncate(m: Mounted) -> None:
    os.truncate(m.merged + b"/d/file", 1)


@pytest.mark.parametrize("meddle", [chmod, set_xattr, truncate])
def test_what_is_done_to_the_copy_in_the_moment_that_it_is_there_is_kept(
    m: Mounted, monkeypatch: pytest.MonkeyPatch, meddle: Meddle
) -> None:
    with held(m.merged + b"/d/file"):
        swap(m.low + b"/d/file", b"new")
        meddling(monkeypatch, m, meddle)
        assert m.evict(b"d/file") == {}
        file = m.merged + b"/d/file"
        m.stale()
        told = stat.S_IMODE(os.stat(file).st_mode) == 0o640, os.listxattr(file) == ["user.mine"], read(file) == b"n"
        assert told == (meddle is chmod, meddle is set_xattr, meddle is truncate)
        assert os.listxattr(m.up + b"/d/file") == os.listxattr(file), "it is a file like any other"
    assert os.listdir(m.up + b".work") == [b"work"]


@pytest.mark.parametrize("mapped", [False, True])
def test_a_writer_that_comes_in_the_moment_that_the_copy_is_there_loses_nothing(
    m: Mounted, monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    def work() -> None:
        with open(m.merged + b"/d/file", "r+b") as file:
            if mapped:
                with mmap.mmap(file.fileno(), 3) as mapping:
                    mapping[1:2] = b"E"
                    mapping.flush()
            else:
                file.seek(0, os.SEEK_END)
                file.write(b" and more")

    writer = threading.Thread(target=work)
    waiting = standin.Replica.writer_waits

    def come(m: Mounted) -> None:
        writer.start()
        replica = shown[-1]
        while not waiting(replica):
            os.sched_yield()

    shown: list[standin.Replica] = []
    make = standin.make_replica

    def note(*arguments: Any, **named: Any) -> standin.Replica:
        shown.append(make(*arguments, **named))
        return shown[-1]

    monkeypatch.setattr(standin, "make_replica", note)
    meddling(monkeypatch, m, come)
    with held(m.merged + b"/d/file"):
        swap(m.low + b"/d/file", b"new")
        assert m.evict(b"d/file") == {}
    writer.join()
    m.stale()
    assert read(m.merged + b"/d/file") == (b"nEw" if mapped else b"new and more")
    assert read(m.up + b"/d/file") == read(m.merged + b"/d/file")
    assert m.tidy() == {}


def test_writers_that_come_all_the_time_lose_nothing(m: Mounted) -> None:
    """Whoever appends finds what he appended, in the upper by then."""
    counts: list[int] = []

    def append(number: int) -> None:
        for count in range(50):
            with open(m.merged + b"/d/file%d" % number, "ab") as file:
                file.write(b"+%d" % count)
        counts.append(number)

    names = range(20)
    with contextlib.ExitStack() as stack:
        for number in names:
            write(m.low + b"/d/file%d" % number, b"old")
            stack.enter_context(held(m.merged + b"/d/file%d" % number))
            swap(m.low + b"/d/file%d" % number, b"new")
        paths = [b"d/file%d" % number for number in names]
        stale = m.stale(*paths)
        writers = [threading.Thread(target=append, args=(number,)) for number in names]
        for writer in writers:
            writer.start()
        with m.view() as view:
            evict(view, stale)
        for writer in writers:
            writer.join()
    assert sorted(counts) == list(names)
    m.tidy()
    m.stale()
    appended = b"".join(b"+%d" % count for count in range(50))
    for number in names:
        content = read(m.merged + b"/d/file%d" % number)
        assert content[:3] in (b"old", b"new"), "who was quicker than the eviction appended to the old one"
        assert content[3:] == appended


def test_names_beside_it_and_the_name_itself_are_renamed_all_the_time(m: Mounted) -> None:
    """Neither what users rename through the mount nor what happens in the lower is undone or lost."""
    ended = threading.Event()
    made: list[int] = []

    def storm() -> None:
        count = 0
        while not ended.is_set():
            write(m.merged + b"/d/mine.new", b"%d" % count)
            os.rename(m.merged + b"/d/mine.new", m.merged + b"/d/mine")
            swap(m.low + b"/d/theirs", b"%d" % count)
            count += 1
        made.append(count - 1)

    storms = threading.Thread(target=storm)
    with contextlib.ExitStack() as holders:
        storms.start()
        for count in range(50):
            holders.enter_context(held(m.merged + b"/d/file"))
            swap(m.low + b"/d/file", b"version %d" % count)
            evict_until_done(m, b"d/file")
            assert read(m.merged + b"/d/file") == b"version %d" % count
        ended.set()
        storms.join()
    m.stale()
    assert read(m.merged + b"/d/mine") == read(m.merged + b"/d/theirs") == b"%d" % made[0]
    assert sorted(os.listdir(m.up + b"/d")) == [b"mine"]


@pytest.mark.parametrize("happen", [lambda path: swap(path, b"new"), os.unlink], ids=["replaced", "ghost"])
def test_a_file_of_the_user_that_comes_at_the_last_moment_is_put_back(
    m: Mounted, monkeypatch: pytest.MonkeyPatch, happen: Callable[[bytes], None]
) -> None:
    """Between the look at the name and what is done to it."""
    note = Upper.note

    def come_first(self: Upper, kind: str, path: bytes, *, old: bytes = b"") -> Note:
        swap(m.merged + b"/" + path, b"the user's")
        return note(self, kind, path, old=old)

    with held(m.merged + b"/d/file"):
        happen(m.low + b"/d/file")
        monkeypatch.setattr(Upper, "note", come_first)
        assert m.evict(b"d/file") == {}
        assert read(m.merged + b"/d/file") == b"the user's"
        assert m.stale(b"d/file") == []
    assert read(m.merged + b"/d/file") == b"the user's"
    assert os.listdir(m.up + b"/d") == [b"file"]
    assert os.listdir(m.up + b".work") == [b"work"]


def test_what_the_holder_does_to_the_old_file_does_not_bring_it_back(m: Mounted) -> None:
    """An overlay copies up what somebody chmods by descriptor, under the name that it once had."""
    before = m.upper()
    for path, happen in ((b"d/file", lambda path: swap(path, b"new")), (b"top", os.unlink)):
        with held(m.merged + b"/" + path) as old:
            happen(m.low + b"/" + path)
            assert m.evict(path) == {}
            os.fchmod(old, 0o640)
            os.utime(old)
            assert os.read(old, 10) == b"old"
            assert m.stale(path) == []
    assert read(m.merged + b"/d/file") == b"new"
    assert not os.path.exists(m.merged + b"/top")
    assert m.upper() == before


def test_a_file_of_the_user_renamed_over_the_name_all_the_time_is_never_taken_away(m: Mounted) -> None:
    ended = threading.Event()
    last: list[bytes] = []

    def storm() -> None:
        count = 0
        while not ended.is_set():
            write(m.merged + b"/d/mine.new", b"%d" % count)
            with contextlib.suppress(OSError):  # ESTALE in the moment that the copy is out of the upper
                os.rename(m.merged + b"/d/mine.new", m.merged + b"/d/file")
                last[:] = [b"%d" % count]
                break
            count += 1

    for count in range(100):
        with contextlib.ExitStack() as stack:
            stack.enter_context(held(m.merged + b"/d/file"))
            swap(m.low + b"/d/file", b"version %d" % count)
            stale = m.stale(b"d/file")
            ended.clear()
            user = threading.Thread(target=storm)
            user.start()
            with m.view() as view:
                evict(view, stale)
            user.join()
        m.tidy()
        m.stale()
        assert read(m.merged + b"/d/file") == last[0]
        assert os.listdir(m.up + b"/d") == [b"file"]
        os.unlink(m.up + b"/d/file")
        m.stale()


# ---- killed at any step ---------------------------------------------------------------------------------------------

_OURS = ("evict.py", "standin.py", "occupant.py", "husk.py", "upper.py", "replica.py")


def killed_at_line(number: int, errand: Callable[[], object]) -> bool:
    """Run the errand in a process that is killed before it runs that line of ours; whether it came so far."""
    child = os.fork()
    if child == 0:
        count = 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal count
            if not frame.f_code.co_filename.endswith(_OURS):
                return None
            if event == "line":
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            errand()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@dataclass(frozen=True)
class Case:
    """Something to evict, and what the merged mount shows before and after."""

    path: bytes
    happen: Callable[[bytes], None]
    """Is told the path in the lower."""
    kind: str
    look: Callable[[bytes], object]
    old: object
    new: object


def _content(path: bytes) -> object:
    return read(path) if os.path.exists(path) else None


def _new_name(path: bytes) -> None:
    write(path + b"/new", b"")


CASES = {
    "replaced": Case(b"d/file", lambda path: swap(path, b"new"), "replaced", _content, b"old", b"new"),
    "replaced in a directory of the lower only": Case(
        b"only/lower/file", lambda path: swap(path, b"new"), "replaced", _content, b"old", b"new"
    ),
    "ghost": Case(b"d/file", os.unlink, "ghost", _content, b"old", None),
    "listing": Case(b"d", _new_name, "listing", lambda path: b"new" in os.listdir(path), old=False, new=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_whoever_is_killed_at_any_step_leaves_nothing_that_tidying_does_not_take_back(
    sandbox: Sandbox, case: Case
) -> None:
    number, came_so_far = 0, True
    step = 5
    while came_so_far:
        number += step
        for m in populated(sandbox, b"%d" % number):
            path, before = m.merged + b"/" + case.path, m.upper()
            with held(path):
                case.happen(m.low + b"/" + case.path)
                [stale] = m.stale(case.path)
                assert stale.kind == case.kind

                def errand(m: Mounted = m, stale: Stale = stale) -> None:
                    with m.view() as view:
                        evict(view, [stale])

                came_so_far = killed_at_line(number, errand)
                assert case.look(path) in (case.old, case.new), f"line {number}: worse than before"
                m.tidy()
                assert case.look(path) in (case.old, case.new), f"line {number}: worse than before"
                assert [name for name in os.listdir(os.path.dirname(path)) if name.startswith(b".watchd")] == []
                for _ in m.stale(case.path):
                    assert m.evict(case.path) == {}
                assert case.look(path) == case.new, f"line {number}"
            assert m.tidy() == {}
            assert m.upper() == before, f"line {number}: a trace is left"
    assert number > 100, "it was hardly killed"


def test_what_was_written_to_a_copy_that_a_crash_left_aside_is_put_back(m: Mounted) -> None:
    with held(m.merged + b"/d/file"):
        swap(m.low + b"/d/file", b"new")
        [stale] = m.stale(b"d/file")
        with pytest.MonkeyPatch.context() as patch, m.view() as view:
            patch.setattr(standin.StandIn, "_drop", lambda self: os._exit(0))
            child = os.fork()
            if child == 0:
                try:
                    evict(view, [stale])
                finally:  # whatever happens, it must not go on as a second run of the tests
                    os._exit(1)
            assert os.waitpid(child, 0)[1] == 0, "it did not come as far as it should"
        with open(m.merged + b"/d/file", "ab") as file:
            file.write(b" and more")
            assert m.tidy() == {}
            file.write(b" and yet more")
    m.stale()
    assert read(m.merged + b"/d/file") == b"new and more and yet more"
    assert m.tidy() == {}
    assert os.listdir(m.up + b".work") == [b"work"]


def test_two_at_once_do_not_take_each_others_work_for_leftovers(m: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(m: Mounted) -> None:
        with m.view() as view, pytest.raises(RefusedError, match="another watchd"):
            tidy(view)

    with held(m.merged + b"/d/file"):
        swap(m.low + b"/d/file", b"new")
        meddling(monkeypatch, m, other)
        assert m.evict(b"d/file") == {}
        assert read(m.merged + b"/d/file") == b"new"


def test_a_copy_that_is_read_without_end_stands_in_until_it_is_let_go(
    m: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later changes of the lower come through, and writers are not lost."""
    before = m.upper()
    readers: list[int] = []
    exchange = standin.StandIn._exchange

    def read_at_once(self: standin.StandIn, note: Any, occupant: Any) -> Any:
        note = exchange(self, note, occupant)
        readers.append(os.open(m.merged + b"/d/file", os.O_RDONLY))
        return note

    with held(m.merged + b"/d/file"):
        swap(m.low + b"/d/file", b"new")
        monkeypatch.setattr(standin.StandIn, "_exchange", read_at_once)
        assert m.evict(b"d/file") == {b"d/file": standin.READ_ALL_THE_TIME}
        assert read(m.merged + b"/d/file") == b"new"
        assert m.stale(b"d/file") == []
        swap(m.low + b"/d/file", b"newer")
        assert m.tidy() == {b"d/file": standin.READ_ALL_THE_TIME}
        assert read(m.merged + b"/d/file") == b"newer"
        monkeypatch.undo()
        assert m.tidy() == {}, "nobody comes to the next copy"
    assert {os.read(reader, 10) for reader in readers} == {b"new", b"newer"}
    for reader in readers:
        os.close(reader)
    assert m.tidy() == {}
    assert m.upper() == before


def test_what_somebody_looks_up_between_two_copies_and_holds_is_replaced_too(
    m: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The overlay has forgotten the first copy, so there is nothing of the upper that the second could take the place of."""
    before = m.upper()
    drop = standin.StandIn._drop
    holders: list[int] = []

    def change_again(self: standin.StandIn) -> None:
        drop(self)
        if not holders:
            holders.append(os.open(m.merged + b"/d/file", os.O_RDONLY))
            swap(m.low + b"/d/file", b"newer")

    monkeypatch.setattr(standin.StandIn, "_drop", change_again)
    with held(m.merged + b"/d/file"):
        swap(m.low + b"/d/file", b"new")
        assert m.evict(b"d/file") == {}
        assert read(m.merged + b"/d/file") == b"newer"
    assert os.read(holders[0], 10) == b"new"
    os.close(holders[0])
    assert m.upper() == before


def test_a_copy_that_has_to_stand_in_is_known_to_be_one(m: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise nobody would come back for it, and it would be called damage."""
    before = m.upper()
    exchange = standin.StandIn._exchange
    readers: list[int] = []

    def read_at_once(self: standin.StandIn, note: Any, occupant: Any) -> Any:
        note = exchange(self, note, occupant)
        readers.append(os.open(m.merged + b"/d/file", os.O_RDONLY))
        return note

    target = replace(m.target, actions=("invalidate", "evict"))
    tools = Tools(Handles(), Courier(), DropCaches(0))
    with held(m.merged + b"/d/file"):
        swap(m.low + b"/d/file", b"new")
        monkeypatch.setattr(standin.StandIn, "_exchange", read_at_once)
        outcome = work(target, Task({b"d/file": STRUCTURE}), tools, thorough=True)
        assert outcome.round.untidy == (b"d/file",)
        monkeypatch.undo()
    with m.view() as view:
        assert find_damage(view, [], windows={b"d/file": Window(0)}) == []
    for reader in readers:
        os.close(reader)
    outcome = work(target, Task({}, untidy=outcome.round.untidy, recheck=True), tools, thorough=True)
    assert outcome.round.untidy == ()
    assert m.upper() == before
    tools.handles.expire()
    tools.courier.close()


def test_who_works_in_a_mount_that_was_replaced_keeps_the_upper_directory(m: Mounted, courier: Courier) -> None:
    """The new mount knows nothing of him, and without it he could make nothing any more."""
    directory = os.open(m.merged + b"/only/lower", os.O_RDONLY)
    with held(m.merged + b"/only/lower/file"):
        swap(m.low + b"/only/lower/file", b"new")
        assert m.evict(b"only/lower/file") == {}
    new = Mounted(m.merged, m.low, m.up, replace_mount(m.target, courier))
    assert new.tidy() != {}
    os.close(os.open("mine", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
    os.close(directory)
    assert os.path.exists(m.merged + b"/only/lower/mine")


def test_a_watch_that_remembers_the_upper_directory_keeps_it(m: Mounted) -> None:
    """Without it a lookup would say ESTALE for as long as the watch is there."""
    before = m.upper()
    watch = inotify_watch(m.merged + b"/only/lower")
    with held(m.merged + b"/only/lower/file"):
        swap(m.low + b"/only/lower/file", b"new")
        assert m.evict(b"only/lower/file") == {}
    m.tidy()
    assert os.listdir(m.merged + b"/only/lower") == [b"file"]
    write(m.merged + b"/only/lower/made", b"")
    os.unlink(m.merged + b"/only/lower/made")
    os.close(watch)
    assert m.tidy() == {}
    assert m.upper() == before


# ---- by the daemon --------------------------------------------------------------------------------------------------


def test_a_directory_that_everybody_looks_into_and_nobody_holds_does_not_stay_in_the_upper(
    sandbox: Sandbox, daemon: Daemon
) -> None:
    """It would hide what becomes of the lower one's permissions."""
    low = sandbox.directory(b"low")
    os.mkdir(low + b"/d")
    write(low + b"/d/file", b"old")
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.configure(coherence={"actions": ["invalidate", "evict"]})
    daemon.start()
    with held(merged + b"/d/file"):
        swap(low + b"/d/file", b"new")
        assert daemon.sync() == []
        actions = daemon.actions(merged)
        assert daemon.sync() == []
        assert os.listdir(sandbox.path(b"up")) == [b"d"], "a file in it is held"
        assert daemon.actions(merged) == actions
    assert read(merged + b"/d/file") == b"new"
    assert daemon.sync() == []
    assert os.listdir(sandbox.path(b"up")) == []
    os.chmod(low + b"/d", 0o700)
    assert daemon.sync() == []
    assert stat.S_IMODE(os.stat(merged + b"/d").st_mode) == 0o700


def test_the_daemon_heals_a_library_that_is_mapped_and_nobody_who_reads_it_notices(
    sandbox: Sandbox, daemon: Daemon
) -> None:
    page = mmap.PAGESIZE
    low = sandbox.directory(b"low")
    os.mkdir(low + b"/lib")
    write(low + b"/lib/c.so", b"a" * page)
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.configure(coherence={"actions": ["invalidate", "evict"]})
    daemon.start()
    with held(merged + b"/lib/c.so") as descriptor:
        mapping = mmap.mmap(descriptor, page, prot=mmap.PROT_READ)
    readers = Readers(merged + b"/lib/c.so", size=page)
    for letter in b"bcd":
        swap(low + b"/lib/c.so", bytes([letter]) * page)
        while daemon.verb("sync", merged).returncode != 0:
            os.sched_yield()
        assert subprocess.run(["cat", merged + b"/lib/c.so"], capture_output=True, check=True).stdout[:1] == bytes(
            [letter]
        )
    reads, errors, torn = readers.end()
    assert reads > 0
    assert (errors, torn) == (0, 0)
    assert mapping[:page] == b"a" * page
    mapping.close()
    changed = {record["path"] for record in daemon.log() if record["type"] == "change"}
    assert changed <= {"lib/c.so", "lib/c.so.tmp", "lib"}, "its own doing is no change"


def test_a_directory_that_an_eviction_needed_goes_though_somebody_looked_at_it(
    sandbox: Sandbox, daemon: Daemon
) -> None:
    low = sandbox.directory(b"low")
    populate(low)
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.configure(coherence={"actions": ["invalidate", "evict"]})
    daemon.start()
    with held(merged + b"/d/dir/a"):
        swap(low + b"/d/dir/a", b"new")
        assert daemon.sync(merged) == []
        assert os.listdir(sandbox.path(b"up")) == [b"d"], "it has to stay while what is below is in use"
    os.stat(merged + b"/d/dir/b")
    assert daemon.sync(merged) == []
    assert os.listdir(sandbox.path(b"up")) == []
