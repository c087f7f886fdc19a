"""coherence.replace: a new mount in the place of the old one, and nobody notices but those who looked at what was stale."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel.running import Daemon
from tests.kernel.sandbox import MS_BIND, MS_PRIVATE, MS_RDONLY, MS_REMOUNT, MS_SHARED, MS_SLAVE, Sandbox, mount, umount
from watchd.coherence import replace as replacing
from watchd.coherence.replace import clear_up, replace
from watchd.coherence.target import Target
from watchd.coherence.targets import build_target
from watchd.errors import MountError, RefusedError
from watchd.kernel.mounts import MNT_DETACH, umount2
from watchd.kernel.namespaces import Courier, mount_namespace
from watchd.overlay import swap as swapping
from watchd.overlay.capture import Capture, Mount, Place, capture, read_mounts
from watchd.overlay.discovery import discover
from watchd.overlay.layers import resolve
from watchd.overlay.model import device_name

READERS = 4
REPLACEMENTS = 50

_READER = """
import os, sys
paths, stop, last, rounds = [os.fsencode(path) for path in sys.argv[2:]], sys.argv[1], 0, 0
print("ready", flush=True)
while not os.path.exists(stop):
    for path in paths:
        os.stat(path)
        with open(path) as file:
            now = int(file.read())
        assert now >= last, (now, last)
        last = now
    rounds += 1
print(rounds)
"""
_WRITER = """
import errno, os, sys
def rename(old, new):
    try:
        os.rename(old, new)
    except OSError as error:  # of two paths one may lead into the old mount and the other one into the new
        assert error.errno == errno.EXDEV, error
        os.rename(old, new)
stop, merged = sys.argv[1], os.fsencode(sys.argv[2])
print("ready", flush=True)
rounds = 0
while not os.path.exists(stop):
    new, other = merged + b"/dir/new%d" % rounds, merged + b"/dir/other%d" % rounds
    with open(new, "x") as file:
        file.write("written")
    rename(new, other)
    rename(merged + b"/dir/gone%d" % (rounds % 500), merged + b"/moved") if rounds < 500 else None
    os.mkdir(merged + b"/made%d" % rounds)
    os.rmdir(merged + b"/made%d" % rounds)
    os.unlink(merged + b"/dir/away%d" % rounds) if rounds < 500 else None
    rounds += 1
print(rounds)
"""


@pytest.fixture(params=["beneath", "without beneath"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With MOVE_MOUNT_BENEATH, and as on a kernel that does not have it."""
    if request.param == "without beneath":
        monkeypatch.setattr(replacing, "has_move_mount_beneath", lambda: False)
    return str(request.param)


class Crowd:
    """Processes that use a mount in a loop until they are stopped; one that saw an error fails the test."""

    def __init__(self, sandbox: Sandbox, program: str, *paths: bytes, count: int = READERS) -> None:
        self._stop = Path(os.fsdecode(sandbox.path(b"stop")))
        command = [sys.executable, "-I", "-S", "-c", program, self._stop, *map(os.fsdecode, paths)]
        self._processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(count)
        ]
        for process in self._processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"

    def stop(self) -> int:
        """How many rounds they made together."""
        self._stop.touch()
        told = [process.communicate() for process in self._processes]
        self._stop.unlink()
        assert [errors for _, errors in told] == [""] * len(told)
        return sum(int(rounds) for rounds, _ in told)


def write(path: bytes, content: str = "") -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(os.fsdecode(path)).write_text(content)


def read(path: bytes) -> str:
    return Path(os.fsdecode(path)).read_text()


def device_of(path: bytes) -> str:
    return device_name(os.stat(path).st_dev)


def target_at(path: bytes, courier: Courier) -> Target:
    return target_of(device_of(path), courier)


def target_of(device: str, courier: Courier) -> Target:
    overlay = next(found for found in discover("all").overlays if found.device == device)
    return build_target(overlay, resolve(overlay, courier), courier, actions=("replace",), budget=0.5)


def captured(path: bytes) -> Capture:
    found = capture(device_of(path), read_mounts())
    assert found is not None
    return found


def overlays(sandbox: Sandbox) -> list[tuple[str, bytes]]:
    """Every overlay mount of the sandbox, covered ones included."""
    return [
        (found.device, point.path)
        for found in discover("host").overlays
        for point in found.mount_points
        if point.path.startswith(sandbox.root)
    ]


def recreate(layer: bytes, content: str, *, like: bytes = b"file") -> None:
    """The layer's root is a new directory, with a new file; put in place in one step."""
    new = layer + b".new"
    write(new + b"/" + like, content)
    if os.path.exists(layer + b".before"):
        subprocess.run(["rm", "-r", layer + b".before"], check=True)
    os.rename(layer, layer + b".before")
    os.rename(new, layer)


def leaves_no_trace(target: Target, courier: Courier, workdir: bytes) -> None:
    """What a replacement leaves because somebody else got the device number of the old one goes with a later one."""
    deadline = time.monotonic() + 20
    while os.listdir(workdir) != [b"work"]:
        assert time.monotonic() < deadline, os.listdir(workdir)
        target = replace(target, courier)


@pytest.fixture
def merged(sandbox: Sandbox) -> bytes:
    """An overlay with an upper; the file of its lower holds a number."""
    write(sandbox.path(b"low/file"), "1")
    return sandbox.overlay(b"merged", b"low", upper=b"up")


@pytest.mark.parametrize("upper", [b"up", None])
def test_a_recreated_layer_root_is_seen_again(
    sandbox: Sandbox, courier: Courier, upper: bytes | None, either_way: str
) -> None:
    write(sandbox.path(b"low/file"), "old")
    merged = sandbox.overlay(b"merged", b"low", b"other", upper=upper)
    assert read(merged + b"/file") == "old"
    target = target_at(merged, courier)
    recreate(sandbox.path(b"low"), "new")
    new = replace(target, courier)
    assert read(merged + b"/file") == "new"
    assert new.device == device_of(merged) != target.device
    assert (new.actions, new.budget) == (("replace",), 0.5)
    assert overlays(sandbox) == [(new.device, merged)]
    if upper:
        leaves_no_trace(new, courier, sandbox.path(b"up.work"))


def test_a_swapped_image_is_seen_again_without_having_known_the_old_one(sandbox: Sandbox, courier: Courier) -> None:
    sandbox.mount_tmpfs(b"image")
    write(sandbox.path(b"image/file"), "old")
    merged = sandbox.overlay(b"merged", b"image", b"other")
    sandbox.umount(b"image")
    sandbox.mount_tmpfs(b"image")
    write(sandbox.path(b"image/file"), "new")
    replace(target_at(merged, courier), courier)  # its first layer fits in no view any more
    assert read(merged + b"/file") == "new"


def test_nobody_ever_finds_no_mount(sandbox: Sandbox, courier: Courier, merged: bytes, either_way: str) -> None:
    target = target_at(merged, courier)
    readers = Crowd(sandbox, _READER, merged + b"/file")
    for number in range(2, REPLACEMENTS + 2):
        recreate(sandbox.path(b"low"), str(number))
        target = replace(target, courier)
        assert read(merged + b"/file") == str(number)
    assert readers.stop() > REPLACEMENTS
    assert overlays(sandbox) == [(target.device, merged)]


def test_who_writes_meanwhile_sees_no_error_and_loses_nothing(
    sandbox: Sandbox, courier: Courier, either_way: str
) -> None:
    for number in range(500):
        write(sandbox.path(b"low/dir/gone%d" % number))
        write(sandbox.path(b"low/dir/away%d" % number))
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    target = target_at(merged, courier)
    writer = Crowd(sandbox, _WRITER, merged, count=1)
    for _ in range(REPLACEMENTS):
        target = replace(target, courier)
    rounds = writer.stop()
    names = os.listdir(merged + b"/dir")
    assert {b"other%d" % number for number in range(rounds)} <= {*names}
    assert not {b"away%d" % number for number in range(min(rounds, 500))} & {*names}
    assert all(read(merged + b"/dir/other%d" % number) == "written" for number in range(rounds))


def test_who_stays_in_the_old_mount_can_go_on_to_work_there(sandbox: Sandbox, courier: Courier, merged: bytes) -> None:
    for name in (b"one", b"two", b"three"):
        write(sandbox.path(b"low/dir/" + name), "content")
    inside = os.open(merged + b"/dir", os.O_RDONLY)
    try:
        again = replace(target_at(merged, courier), courier)
        os.unlink(b"one", dir_fd=inside)
        os.rename(b"two", b"renamed", src_dir_fd=inside, dst_dir_fd=inside)
        os.mkdir(b"made", dir_fd=inside)
        assert sorted(os.listdir(merged + b"/dir")) == [b"made", b"renamed", b"three"]
        os.unlink(merged + b"/dir/renamed")
        assert len(os.listdir(sandbox.path(b"up.work"))) == 2
    finally:
        os.close(inside)
    leaves_no_trace(again, courier, sandbox.path(b"up.work"))


def test_what_its_caller_held_is_cleared_up_later(sandbox: Sandbox, courier: Courier, merged: bytes) -> None:
    target = target_at(merged, courier)
    held = target.open()
    try:
        new = replace(target, courier)
        clear_up(new, courier)
        assert len(os.listdir(sandbox.path(b"up.work"))) == 2
    finally:
        os.close(held)
    deadline = time.monotonic() + 20  # for the number to be nobody's, which may be somebody else's for a moment
    while len(os.listdir(sandbox.path(b"up.work"))) == 2:
        assert time.monotonic() < deadline
        clear_up(new, courier)


def test_everything_about_the_mount_is_kept(sandbox: Sandbox, courier: Courier, either_way: str) -> None:
    write(sandbox.path(b"low/sub/dir/file"))
    write(sandbox.path(b"low/bound"))
    write(sandbox.path(b"source"), "of the bound file")
    options = [
        (b"source", b"a name"),
        (b"lowerdir", b":".join([sandbox.path(b"low"), sandbox.directory(rb"lo,w2").replace(b",", rb"\,")])),
        (b"upperdir", sandbox.directory(b"up, two").replace(b",", rb"\,")),
        (b"workdir", sandbox.directory(b"work")),
        *((b"redirect_dir", b"on"), (b"metacopy", b"on"), (b"xino", b"on"), (b"uuid", b"null")),
    ]
    merged = sandbox.mount_overlay(b"merged", options)
    mount(
        b"none", merged, flags=MS_REMOUNT | MS_BIND | MS_RDONLY | 0x2 | 0x4 | 0x8 | 0x400
    )  # nosuid nodev noexec noatime
    mount(b"none", merged, flags=MS_SHARED)
    mount(b"inner", merged + b"/sub", b"tmpfs", data=b"size=64k")
    os.mkdir(merged + b"/sub/deep")
    mount(b"deep", merged + b"/sub/deep", b"tmpfs", flags=0x2)
    mount(sandbox.path(b"source"), merged + b"/bound", flags=MS_BIND)
    before = captured(merged)
    try:
        replace(target_at(merged, courier), courier)
        after = captured(merged)
    finally:
        for name in (b"/bound", b"/sub/deep", b"/sub"):
            umount(merged + name)
    assert (after.source, after.options) == (before.source, before.options)
    (old,), (new,) = before.places, after.places
    assert (new.mount.path, new.mount.attributes) == (old.mount.path, old.mount.attributes)
    assert bool(new.mount.propagation.shared)
    assert not new.mount.propagation.master
    assert (new.parent, new.view) == (old.parent, old.view)

    def told(place: Place) -> list[tuple[str, bytes, tuple[str, ...]]]:
        return sorted((below.device, below.path, below.attributes) for below in place.submounts)

    assert told(new) == told(old)
    assert len(told(new)) == 3


def test_submounts_are_there_all_the_time(sandbox: Sandbox, courier: Courier, either_way: str) -> None:
    os.makedirs(sandbox.path(b"low/sub"))
    write(sandbox.path(b"low/file"), "1")
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    mount(b"inner", merged + b"/sub", b"tmpfs")
    write(merged + b"/sub/file", "1")
    target = target_at(merged, courier)
    try:
        readers = Crowd(sandbox, _READER, merged + b"/sub/file", count=2)
        for _ in range(REPLACEMENTS // 2):
            target = replace(target, courier)
        readers.stop()
    finally:
        umount(merged + b"/sub")
    assert overlays(sandbox) == [(target.device, merged)]


def test_many_and_long_and_relative_layers(sandbox: Sandbox, courier: Courier) -> None:
    long = b"/".join([b"x" * 100] * 3)
    lowers = [sandbox.directory(b"l%d" % number) for number in range(60)] + [sandbox.directory(long)]
    write(sandbox.path(long) + b"/file", "long")
    for name in (b"rel1/a", b"rel2/b"):
        write(sandbox.path(name))
    os.makedirs(sandbox.path(b"rel-up"))
    os.makedirs(sandbox.path(b"rel-work"))
    many = _mount_long(sandbox, lowers)
    here = os.getcwd()
    os.chdir(sandbox.root)
    try:
        options = [(b"lowerdir", b"rel1:rel2"), (b"upperdir", b"rel-up"), (b"workdir", b"rel-work")]
        relative = sandbox.mount_overlay(b"merged", options)
    finally:
        os.chdir(here)
    replace(target_at(many, courier), courier)
    assert read(many + b"/file") == "long"
    shown = captured(many)
    assert [value for name, value in shown.options if name == b"lowerdir+"] == lowers
    replace(target_at(relative, courier), courier)
    assert sorted(os.listdir(relative)) == [b"a", b"b"]
    replace(target_at(relative, courier), courier)
    assert captured(relative).option(b"upperdir") == sandbox.path(b"rel-up")


def _mount_long(sandbox: Sandbox, lowers: list[bytes]) -> bytes:
    from watchd.overlay.build import Recipe, Setting, make

    detached = make(Recipe(tuple(Setting(b"lowerdir+", path, path) for path in lowers))).mount
    try:
        return sandbox.attach(detached, b"many")
    finally:
        os.close(detached)


def test_data_only_layers_are_kept(sandbox: Sandbox, courier: Courier) -> None:
    options = [(b"lowerdir", b"%b::%b" % (sandbox.directory(b"low"), sandbox.directory(b"data"))), (b"metacopy", b"on")]
    merged = sandbox.mount_overlay(b"merged", options)
    before = captured(merged).options
    replace(target_at(merged, courier), courier)
    assert captured(merged).options == before


def test_all_mounts_of_it_are_replaced_in_all_namespaces(
    sandbox: Sandbox, courier: Courier, merged: bytes, either_way: str
) -> None:
    write(sandbox.path(b"low/sub/file"), "1")
    bound = sandbox.bind(b"merged/sub", b"bound")
    inmate = sandbox.inmate()
    old = device_of(merged)
    target = target_at(merged, courier)
    recreate(sandbox.path(b"low"), "2", like=b"sub/file")
    new = replace(target, courier)
    assert read(merged + b"/sub/file") == read(bound + b"/file") == "2"
    for path in (merged + b"/sub/file", bound + b"/file"):
        assert inmate.run(f"cat {os.fsdecode(path)}") == "2"
    assert capture(old, read_mounts()) is None
    assert len(captured(merged).places) == 4
    assert new.overlay is not None
    assert len(new.overlay.mount_points) == 4


def test_below_a_shared_mount_slaves_and_peers_get_the_new_one_once(
    sandbox: Sandbox, courier: Courier, either_way: str
) -> None:
    parent = sandbox.mount_tmpfs(b"parent")
    mount(b"none", parent, flags=MS_SHARED)
    write(sandbox.path(b"low/file"), "1")
    merged = sandbox.overlay(b"parent/merged", b"low", upper=b"up")
    slave = sandbox.inmate(propagation="slave")
    peer = sandbox.inmate(propagation="unchanged")
    target = target_at(merged, courier)
    readers = Crowd(sandbox, _READER, merged + b"/file", b"/proc/%d/root%b/file" % (slave.pid, merged), count=2)
    for number in range(2, REPLACEMENTS // 2):
        recreate(sandbox.path(b"low"), str(number))
        target = replace(target, courier)
        for place in (slave, peer):
            assert place.run(f"cat {os.fsdecode(merged)}/file") == str(number)
            assert place.run(f"grep -c ' {os.fsdecode(merged)} ' /proc/self/mountinfo") == "1"
    readers.stop()
    assert overlays(sandbox) == [(target.device, merged)]
    assert captured(merged).places[0].mount.propagation.shared
    mount(b"none", merged, flags=MS_PRIVATE)
    replace(target, courier)
    assert not captured(merged).places[0].mount.propagation.shared, "private below a shared mount"


def test_below_a_shared_mount_submounts_are_kept_with_their_propagation(
    sandbox: Sandbox, courier: Courier, either_way: str
) -> None:
    for name in (b"sub", b"alone", b"slave"):
        os.makedirs(sandbox.path(b"low/" + name))
    mount(b"none", sandbox.mount_tmpfs(b"parent"), flags=MS_SHARED)
    mount(b"none", sandbox.mount_tmpfs(b"master"), flags=MS_SHARED)
    merged = sandbox.overlay(b"parent/merged", b"low", upper=b"up")
    mount(b"inner", merged + b"/sub", b"tmpfs")
    os.mkdir(merged + b"/sub/deep")
    mount(b"deep", merged + b"/sub/deep", b"tmpfs")
    mount(b"alone", merged + b"/alone", b"tmpfs")
    mount(b"none", merged + b"/alone", flags=MS_PRIVATE)
    mount(sandbox.path(b"master"), merged + b"/slave", flags=MS_BIND)
    mount(b"none", merged + b"/slave", flags=MS_SLAVE)
    slave = sandbox.inmate(propagation="slave")
    count = f"grep -c ' {os.fsdecode(merged)}' /proc/self/mountinfo"
    try:
        before = kinds(captured(merged)), slave.run(count)
        for _ in range(2):
            replace(target_at(merged, courier), courier)
            assert (kinds(captured(merged)), slave.run(count)) == before
    finally:
        for name in (b"/slave", b"/alone", b"/sub/deep", b"/sub"):
            umount(merged + name)


def kinds(found: Capture) -> dict[bytes, tuple[str, bool, int]]:
    """Each mount that there is at and below the places: what it is, whether it is shared, in whose slavery."""
    return {
        below.path: (
            "" if below is place.mount else below.device,
            bool(below.propagation.shared),
            below.propagation.master,
        )
        for place in found.places
        if place.view.namespace == mount_namespace()
        for below in (place.mount, *place.submounts)
    }


def test_what_else_is_mounted_there_in_a_slave_is_not_unmounted(sandbox: Sandbox, courier: Courier) -> None:
    parent = sandbox.mount_tmpfs(b"parent")
    mount(b"none", parent, flags=MS_SHARED)
    merged = sandbox.overlay(b"parent/merged", b"low", upper=b"up")
    slave = sandbox.inmate(propagation="slave")
    there = os.fsdecode(merged)
    slave.run(f"umount {there} && mount -t tmpfs mine {there} && touch {there}/precious")
    with pytest.raises(RefusedError, match="another mount, would be unmounted"):
        replace(target_at(merged, courier), courier)
    slave.run(f"test -e {there}/precious")


def test_a_slave_that_had_unmounted_it_does_not_get_it_back(
    sandbox: Sandbox, courier: Courier, either_way: str
) -> None:
    parent = sandbox.mount_tmpfs(b"parent")
    mount(b"none", parent, flags=MS_SHARED)
    merged = sandbox.overlay(b"parent/merged", b"low", upper=b"up")
    slave = sandbox.inmate(propagation="slave")
    slave.run(f"umount {os.fsdecode(merged)}")
    replace(target_at(merged, courier), courier)
    assert slave.run(f"grep -c ' {os.fsdecode(merged)} ' /proc/self/mountinfo || true") == "0"


def test_peers_do_not_lose_their_submounts(sandbox: Sandbox, courier: Courier) -> None:
    os.makedirs(sandbox.path(b"low/sub"))
    mount(b"none", sandbox.mount_tmpfs(b"parent"), flags=MS_SHARED)
    merged = sandbox.overlay(b"parent/merged", b"low", upper=b"up")
    sandbox.bind(b"parent/merged", b"parent/bound")
    mount(b"inner", merged + b"/sub", b"tmpfs")
    before = Untouched(merged)
    try:
        with pytest.raises(RefusedError, match="bound, its peer, would lose what is mounted below it"):
            replace(target_at(merged, courier), courier)
        before.check()
    finally:
        umount(merged + b"/sub")


def test_peers_of_a_shared_mount_stay_peers(sandbox: Sandbox, courier: Courier, merged: bytes) -> None:
    os.makedirs(sandbox.path(b"low/sub"))
    mount(b"none", merged, flags=MS_SHARED)
    bound = sandbox.bind(b"merged", b"bound")
    replace(target_at(merged, courier), courier)
    mount(b"inner", merged + b"/sub", b"tmpfs")
    try:
        assert device_of(bound + b"/sub") == device_of(merged + b"/sub")
    finally:
        umount(merged + b"/sub")


def test_an_overlay_of_a_container_is_built_where_its_layers_are(
    sandbox: Sandbox, courier: Courier, either_way: str
) -> None:
    there = os.fsdecode(sandbox.directory(b"there"))
    inmate = sandbox.inmate()
    inmate.run(f"mount -t tmpfs none {there} && cd {there} && mkdir low up work merged && echo 1 > low/file")
    inmate.run("mount -t overlay overlay -o lowerdir=$PWD/low,upperdir=$PWD/up,workdir=$PWD/work $PWD/merged")
    device = inmate.run("stat -c %Hd:%Ld merged")
    target = target_of(device, courier)
    inmate.run("mv low before && mkdir low && echo 2 > low/file")
    new = replace(target, courier)
    assert inmate.run(f"cat {there}/merged/file") == "2"
    assert inmate.run(f"stat -c %Hd:%Ld {there}/merged") == new.device
    assert inmate.run(f"umount {there}/merged && grep -c ' {there}/merged ' /proc/self/mountinfo || true") == "0"
    inmate.run("cd /")


def test_the_inner_of_two_overlays_then_the_outer(sandbox: Sandbox, courier: Courier, merged: bytes) -> None:
    outer = sandbox.mount_overlay(b"outer", [(b"lowerdir+", merged), (b"lowerdir+", sandbox.directory(b"other"))])
    assert read(outer + b"/file") == "1"
    inner_target, outer_target = target_at(merged, courier), target_at(outer, courier)
    recreate(sandbox.path(b"low"), "2")
    replace(inner_target, courier)
    assert (read(merged + b"/file"), read(outer + b"/file")) == ("2", "1")
    replace(outer_target, courier)
    assert read(outer + b"/file") == "2"


class Untouched:
    """Holds a mount against what it was."""

    def __init__(self, merged: bytes, workdir: bytes | None = None) -> None:
        self._merged, self._workdir = merged, workdir
        self.capture = captured(merged)
        self._before = self.capture, self._work()

    def check(self) -> None:
        """It is the same mount, and still works."""
        assert (captured(self._merged), self._work()) == self._before
        if self._workdir:
            os.mkdir(self._merged + b"/works")
            os.rmdir(self._merged + b"/works")

    def _work(self) -> list[tuple[bytes, int]]:
        names = os.listdir(self._workdir) if self._workdir else []
        return [(name, os.stat(os.path.join(self._workdir or b"", name)).st_ino) for name in names]


@pytest.mark.parametrize(
    ("option", "reason"),
    [((b"index", b"on"), "index=on"), ((b"volatile", None), "volatile")],
    ids=["index", "volatile"],
)
def test_where_a_second_mount_would_harm_it_is_refused(
    sandbox: Sandbox, courier: Courier, option: tuple[bytes, bytes | None], reason: str
) -> None:
    options = [(b"lowerdir", sandbox.directory(b"low")), (b"upperdir", sandbox.directory(b"up"))]
    merged = sandbox.mount_overlay(b"merged", [*options, (b"workdir", sandbox.directory(b"work")), option])
    before = Untouched(merged, sandbox.path(b"work"))
    with pytest.raises(RefusedError, match=reason):
        replace(target_at(merged, courier), courier)
    before.check()


def test_a_layer_that_is_not_there_is_named(sandbox: Sandbox, courier: Courier, merged: bytes) -> None:
    target, before = target_at(merged, courier), Untouched(merged)
    os.rename(sandbox.path(b"low"), sandbox.path(b"away"))
    with pytest.raises(RefusedError, match="low: No such file or directory"):
        replace(target, courier)
    before.check()


def test_what_the_kernel_refuses_is_taken_back(sandbox: Sandbox, courier: Courier, merged: bytes) -> None:
    target, before = target_at(merged, courier), Untouched(merged, sandbox.path(b"up.work"))
    os.rmdir(sandbox.path(b"low") + b".x") if os.path.exists(sandbox.path(b"low") + b".x") else None
    mount(sandbox.path(b"up"), sandbox.path(b"low"), flags=MS_BIND)  # overlapping layers: ELOOP
    try:
        with pytest.raises(RefusedError, match="the kernel refuses"):
            replace(target, courier)
    finally:
        umount(sandbox.path(b"low"))
    before.check()


def test_a_submount_without_a_place_in_the_new_one_is_refused(sandbox: Sandbox, courier: Courier) -> None:
    os.makedirs(sandbox.path(b"low/sub"))
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    mount(b"inner", merged + b"/sub", b"tmpfs")
    try:
        target, before = target_at(merged, courier), Untouched(merged, sandbox.path(b"up.work"))
        recreate(sandbox.path(b"low"), "new")
        with pytest.raises(RefusedError, match="no place for sub"):
            replace(target, courier)
        before.check()
    finally:
        umount(merged + b"/sub")


def test_a_root_directory_of_a_process_is_refused(sandbox: Sandbox, courier: Courier, merged: bytes) -> None:
    program = f"import os, sys; os.chroot({os.fsdecode(merged)!r}); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as confined:
        assert confined.stdout is not None
        confined.stdout.readline()
        before = Untouched(merged, sandbox.path(b"up.work"))
        with pytest.raises(RefusedError, match=f"process {confined.pid}"):
            replace(target_at(merged, courier), courier)
        before.check()


def test_a_locked_mount_is_refused_before_anything_is_done(sandbox: Sandbox, courier: Courier, merged: bytes) -> None:
    sandbox.inmate("--user", "--map-root-user")  # its copies of our mounts are locked
    before = Untouched(merged, sandbox.path(b"up.work"))
    with pytest.raises(RefusedError, match="locked"):
        replace(target_at(merged, courier), courier)
    before.check()


def test_a_covered_mount_is_refused(sandbox: Sandbox, courier: Courier, merged: bytes) -> None:
    target = target_at(merged, courier)
    sandbox.mount_tmpfs(b"merged")
    with pytest.raises(RefusedError, match="covered"):
        replace(target, courier)


@pytest.mark.parametrize("propagation", [MS_PRIVATE, MS_SHARED], ids=["private", "shared"])
def test_if_the_second_cannot_be_replaced_the_first_is_put_back(
    sandbox: Sandbox, courier: Courier, monkeypatch: pytest.MonkeyPatch, propagation: int
) -> None:
    os.makedirs(sandbox.path(b"low/sub"))
    mount(b"none", sandbox.mount_tmpfs(b"parent"), flags=propagation)
    merged = sandbox.overlay(b"parent/merged", b"low", upper=b"up")
    mount(b"none", merged, flags=MS_REMOUNT | MS_BIND | 0x2)
    bound = sandbox.bind(b"parent/merged", b"parent/bound")
    mount(b"none", bound, flags=MS_PRIVATE)
    mount(b"inner", merged + b"/sub", b"tmpfs")
    os.mkdir(merged + b"/sub/deep")
    mount(b"deep", merged + b"/sub/deep", b"tmpfs")
    target, before = target_at(merged, courier), kinds(captured(merged))
    swaps: list[Mount] = []

    def fail_once(place: Place, tree: int) -> None:
        swaps.append(place.mount)
        if len(swaps) == 2:
            raise OSError(12, "no memory")
        swapping.swap(place, tree)

    monkeypatch.setattr(replacing, "swap", fail_once)
    try:
        with pytest.raises(RefusedError, match="Cannot allocate memory"):
            replace(target, courier)
        assert [tried.path for tried in swaps] == [merged, bound, merged]
        assert device_of(merged) == device_of(bound) == target.device
        assert kinds(captured(merged)) == before
    finally:
        umount(merged + b"/sub/deep")
        umount(merged + b"/sub")
    assert all("nosuid" in place.mount.attributes for place in captured(merged).places)
    assert os.listdir(sandbox.path(b"up.work")) == [b"work"]
    os.mkdir(merged + b"/works")


def test_an_umount_by_somebody_else_meanwhile_is_honoured(
    sandbox: Sandbox, courier: Courier, merged: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_the_move(monkeypatch, lambda: umount2(merged, MNT_DETACH))
    with pytest.raises(MountError, match="unmounted meanwhile"):
        replace(target_at(merged, courier), courier)
    assert overlays(sandbox) == []
    sandbox.forget(b"merged")


def test_a_mount_on_top_by_somebody_else_meanwhile_is_not_unmounted(
    sandbox: Sandbox, courier: Courier, merged: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_the_move(monkeypatch, lambda: mount(b"mine", merged, b"tmpfs"))
    with pytest.raises(MountError, match="mounted over it meanwhile"):
        replace(target_at(merged, courier), courier)
    assert os.statvfs(merged).f_files != os.statvfs(sandbox.root).f_files or not os.listdir(merged)
    umount(merged)
    assert read(merged + b"/file") == "1"
    umount(merged)


def after_the_move(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Somebody else acts right after the new mount went beneath the old one."""
    move_mount = swapping.move_mount

    def move(tree: int, to: int, path: bytes = b"", *, flags: int = 0) -> None:
        move_mount(tree, to, path, flags=flags)
        if flags:
            act()

    monkeypatch.setattr(swapping, "move_mount", move)


def test_an_overlay_of_a_user_namespace_stays_its_own(sandbox: Sandbox, courier: Courier, either_way: str) -> None:
    there = os.fsdecode(sandbox.directory(b"there"))
    inmate = sandbox.inmate("--user", "--map-root-user")
    inmate.run(f"mount -t tmpfs none {there} && cd {there} && mkdir low up work merged && echo 1 > low/file")
    options = "lowerdir=$PWD/low,upperdir=$PWD/up,workdir=$PWD/work,userxattr"
    inmate.run(f"mount -t overlay overlay -o {options} $PWD/merged && cat merged/file")
    target = target_of(inmate.run("stat -c %Hd:%Ld merged"), courier)
    inmate.run("mv low before && mkdir low && echo 2 > low/file")
    new = replace(target, courier)
    assert inmate.run(f"cat {there}/merged/file") == "2"
    assert inmate.run(f"stat -c %Hd:%Ld {there}/merged") == new.device
    inmate.run(f"echo 3 >> {there}/merged/file && mount -o remount,ro {there}/merged && umount {there}/merged")
    assert inmate.run("stat -c %u:%g up/file") == "0:0"
    inmate.run("cd /")


def test_a_tenant_cannot_have_a_directory_of_others_shown(sandbox: Sandbox, courier: Courier) -> None:
    home, secret = sandbox.directory(b"home"), sandbox.directory(b"root/secret")
    write(secret + b"/file", "secret")
    write(home + b"/low/file", "old")
    os.chown(home, 1000, 1000)
    merged = sandbox.overlay(b"merged", b"home/low", b"other")
    target, before = target_at(merged, courier), Untouched(merged)
    os.rename(home + b"/low", home + b"/away")
    os.symlink(secret, home + b"/low")
    with pytest.raises(RefusedError, match="symbolic link"):
        replace(target, courier)
    before.check()
    os.unlink(home + b"/low")
    write(home + b"/low/file", "new")
    replace(target, courier)
    assert read(merged + b"/file") == "new"
    assert captured(merged).options == before.capture.options


def test_a_link_that_root_turned_to_another_tree_is_followed(sandbox: Sandbox, courier: Courier) -> None:
    write(sandbox.path(b"v1/file"), "1")
    write(sandbox.path(b"v2/file"), "2")
    os.symlink(b"v1", sandbox.path(b"current"))
    merged = sandbox.overlay(b"merged", b"current", upper=b"up")
    target, shown = target_at(merged, courier), captured(merged).options
    os.symlink(b"v2", sandbox.path(b"next"))
    os.rename(sandbox.path(b"next"), sandbox.path(b"current"))
    replace(target, courier)
    assert read(merged + b"/file") == "2"
    assert captured(merged).options == shown


def test_the_parent_of_a_replaced_mount_stays_a_slave(sandbox: Sandbox, courier: Courier, either_way: str) -> None:
    parent = sandbox.mount_tmpfs(b"parent")
    mount(b"none", parent, flags=MS_SHARED)
    slave = sandbox.inmate(propagation="slave")
    layers = [os.fsdecode(sandbox.directory(name)) for name in (b"low", b"other", b"parent/merged")]
    slave.run("mount -t overlay overlay -o lowerdir={}:{} {}".format(*layers))
    tags = f"grep ' {os.fsdecode(parent)} ' /proc/self/mountinfo | cut -d' ' -f5-8"
    before = slave.run(tags)
    assert "master:" in before
    new = replace(target_of(slave.run(f"stat -c %Hd:%Ld {layers[2]}"), courier), courier)
    assert slave.run(tags) == before
    assert slave.run(f"stat -c %Hd:%Ld {layers[2]}") == new.device
    slave.run(f"umount {layers[2]}")


def test_with_fewer_rights_than_a_mounter_needs_it_is_refused(
    sandbox: Sandbox, courier: Courier, merged: bytes
) -> None:
    before = Untouched(merged, sandbox.path(b"up.work"))
    program = f"""
from tests.kernel.test_replace import *
try:
    replace(target_at({merged!r}, courier := Courier()), courier)
except RefusedError as error:
    print(error)
"""
    command = ["setpriv", "--bounding-set=-setfcap,-mknod", sys.executable, "-c", program]
    told = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "without CAP_MKNOD, CAP_SETFCAP" in told.stdout
    before.check()


def test_the_daemon_heals_what_is_held_and_what_was_recreated(sandbox: Sandbox, daemon: Daemon) -> None:
    low = sandbox.directory(b"low")
    write(low + b"/dir/library", "old")
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.configure(coherence={"actions": ["invalidate", "replace"]})
    daemon.start()
    with open(merged + b"/dir/library", "rb"):
        write(low + b"/dir/library.new", "new")
        os.rename(low + b"/dir/library.new", low + b"/dir/library")
        done = daemon.verb("sync", merged)
        assert (done.returncode, read(merged + b"/dir/library")) == (0, "new"), done.stdout
    recreate(low, "another", like=b"dir/library")
    done = daemon.verb("sync", merged)
    assert (done.returncode, read(merged + b"/dir/library")) == (0, "another"), done.stdout
    assert daemon.mount(merged)["state"] == "coherent"
