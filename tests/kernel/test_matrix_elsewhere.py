"""Every accident to overlays that are nested, many, mounted elsewhere or shown in part."""

from __future__ import annotations

import errno
import os

import pytest

from tests.kernel.accidents import ACCIDENTS
from tests.kernel.matrix import NEEDS_PROGRAM, Overlay, Scene, Shape, mount_overlay, play, set_scene
from tests.kernel.running import Daemon
from tests.kernel.sandbox import MS_BIND, Sandbox, mount, umount

ONE = Shape(1, 0, has_upper=True)
TWO = Shape(2, 1, has_upper=True)
MANY = 50
IN_A_NAMESPACE = [name for name in ACCIDENTS if name not in NEEDS_PROGRAM]
"""Seen from another mount namespace, nothing runs setuid."""
TO_ANOTHER_USER = frozenset({"chown"})
"""Whoever mounted the overlay in a user namespace may not read files of users that it does not know; the judge may."""


def around(sandbox: Sandbox, inner: Overlay, name: bytes) -> Overlay:
    """An overlay over the merged mount of another."""
    return mount_overlay(sandbox, name, [inner.merged], upper=sandbox.directory(name + b".up"))


@pytest.mark.parametrize("shape", [ONE, TWO], ids=str)
def test_every_accident_below_an_overlay_in_an_overlay(running: Daemon, sandbox: Sandbox, shape: Shape) -> None:
    scene = set_scene(sandbox, shape, sandbox.path(b"low"))
    [inner] = scene.repaired
    outer = [around(sandbox, inner, b"outer"), around(sandbox, inner, b"another")]
    play(Scene(scene.changing, scene.cases, [inner, *outer], scene.observed), running)


def test_the_kernel_takes_no_third_overlay_around_two(sandbox: Sandbox) -> None:
    inner = mount_overlay(sandbox, b"inner", [sandbox.directory(b"low")], upper=sandbox.directory(b"up"))
    outer = around(sandbox, inner, b"outer")
    with pytest.raises(OSError) as refused:
        around(sandbox, outer, b"outermost")
    assert refused.value.errno == errno.EINVAL


def test_every_accident_below_fifty_overlays(running: Daemon, sandbox: Sandbox) -> None:
    scene = set_scene(sandbox, ONE, sandbox.path(b"low"), accidents=list(ACCIDENTS)[::4])
    lowers = scene.repaired[0].layers[1:]
    others = [
        mount_overlay(sandbox, b"merged%d" % number, lowers, upper=sandbox.directory(b"up%d" % number))
        for number in range(MANY - 1)
    ]
    play(Scene(scene.changing, scene.cases, [*scene.repaired, *others]), running)


@pytest.mark.parametrize("kind", ["mount namespace", "user namespace"])
def test_every_accident_below_an_overlay_in_another(running: Daemon, sandbox: Sandbox, kind: str) -> None:
    in_user_namespace = kind == "user namespace"
    accidents = [name for name in IN_A_NAMESPACE if not (in_user_namespace and name in TO_ANOTHER_USER)]
    scene = set_scene(sandbox, ONE, sandbox.path(b"low"), accidents=accidents)
    inmate = sandbox.inmate(*(("--user", "--map-root-user") if in_user_namespace else ()))
    merged, upper, work = (sandbox.directory(name) for name in (b"in", b"in.up", b"in.work"))
    paths = f"lowerdir={os.fsdecode(scene.changing)},upperdir={os.fsdecode(upper)},workdir={os.fsdecode(work)}"
    more = ",userxattr" if in_user_namespace else ""
    inmate.run(f"mount -t overlay overlay -o {paths}{more} {os.fsdecode(merged)}")
    overlay = Overlay(
        merged,
        [upper, scene.changing],
        ((b"userxattr", None),) if in_user_namespace else (),
        seen_as=b"/proc/%d/root%s" % (inmate.pid, merged),
    )
    play(Scene(scene.changing, scene.cases, [overlay, *scene.repaired], scene.observed), running)


def test_every_accident_below_an_overlay_whose_layers_were_given_relative(running: Daemon, sandbox: Sandbox) -> None:
    scene = set_scene(sandbox, ONE, sandbox.path(b"low"))
    before = os.open(".", os.O_PATH | os.O_CLOEXEC)
    os.chdir(sandbox.root)
    try:
        sandbox.directory(b"relative.up"), sandbox.directory(b"relative.work")
        options = [(b"lowerdir", b"low"), (b"upperdir", b"relative.up"), (b"workdir", b"relative.work")]
        merged = sandbox.mount_overlay(b"relative", options)
    finally:
        os.fchdir(before)
        os.close(before)
    overlay = Overlay(merged, [sandbox.path(b"relative.up"), scene.changing])
    play(Scene(scene.changing, scene.cases, [overlay], scene.observed), running)


def test_every_accident_below_an_overlay_that_shows_at_several_points_and_in_part(
    running: Daemon, sandbox: Sandbox
) -> None:
    scene = set_scene(sandbox, ONE, sandbox.path(b"low"))
    [overlay] = scene.repaired
    part = scene.cases[0].directory
    sandbox.bind(b"merged", b"again")
    mount(overlay.merged + b"/" + part, sandbox.directory(b"part"), flags=MS_BIND)
    try:
        again = Overlay(sandbox.path(b"again"), overlay.layers, overlay.options)
        play(Scene(scene.changing, scene.cases, [overlay, again], scene.observed), running)
        [told] = [told for told in running.status()["mounts"] if told["mount_points"][0]["path"].endswith("/merged")]
        assert len(told["mount_points"]) == 3
        assert sorted(os.listdir(sandbox.path(b"part"))) == sorted(os.listdir(overlay.merged + b"/" + part))
    finally:
        umount(sandbox.path(b"part"))
