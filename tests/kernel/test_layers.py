"""overlay.layers and overlay.access: from mountinfo's strings to the directories that the kernel holds."""

from __future__ import annotations

import os

import pytest

from tests.kernel.sandbox import Inmate, Sandbox
from watchd.errors import LayerError, MountError
from watchd.kernel.namespaces import Courier, mount_namespace
from watchd.overlay.access import clone_directory, clone_mount
from watchd.overlay.discovery import discover
from watchd.overlay.layers import resolve
from watchd.overlay.model import LayerDirectory, Overlay, View

TMPFS_MAGIC = 0x01021994


def overlay_at(path: bytes) -> Overlay:
    (overlay,) = (o for o in discover("all").overlays if any(point.path == path for point in o.mount_points))
    return overlay


def own_view() -> View:
    return View(os.getpid(), mount_namespace())


def place(layer: LayerDirectory | None) -> tuple[int, int]:
    assert layer is not None
    assert layer.error == ""
    return layer.device, layer.inode


def place_of(path: bytes) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


@pytest.mark.parametrize("upper", [None, b"u"])
def test_every_layer_is_found_and_proven(sandbox: Sandbox, courier: Courier, upper: bytes | None) -> None:
    overlay = overlay_at(sandbox.overlay(b"m", b"l:1", b"l 2", upper=upper))
    stack = resolve(overlay, courier)
    assert stack.proven
    assert [place(layer) for layer in stack.lowers] == [place_of(sandbox.path(b"l:1")), place_of(sandbox.path(b"l 2"))]
    assert {layer.view for layer in stack.lowers} == {own_view()}
    assert stack.lowers[0].magic == TMPFS_MAGIC
    if upper is None:
        assert stack.upper is None
    else:
        assert place(stack.upper) == place_of(sandbox.path(upper))


def test_data_only_layers_are_found(sandbox: Sandbox, courier: Courier) -> None:
    lower, data = sandbox.directory(b"l"), sandbox.directory(b"d")
    merged = sandbox.mount_overlay(b"m", [(b"lowerdir", lower + b"::" + data), (b"metacopy", b"on")])
    assert [place(layer) for layer in resolve(overlay_at(merged), courier).data_only] == [place_of(data)]


def test_a_container_s_paths_are_looked_up_in_the_container(sandbox: Sandbox, courier: Courier) -> None:
    """The same strings lead somewhere in our view too: to the wrong directories."""
    for name in (b"l1", b"l2", b"m"):
        sandbox.directory(name)
    inmate = sandbox.inmate()
    root = os.fsdecode(sandbox.root)
    inmate.run(f"mount -t tmpfs none {root} && cd {root} && mkdir l1 l2 m && stat -c '%d %i' l1 l2")
    inmate.run(f"mount -t overlay -o lowerdir={root}/l1:{root}/l2 none {root}/m")
    stack = resolve(overlay_at(sandbox.path(b"m")), courier)
    assert stack.proven
    assert [layer.view for layer in stack.lowers] == [inmate.view] * 2
    inside = [tuple(map(int, line.split())) for line in inmate.run(f"cd {root}; stat -c '%d %i' l1 l2").splitlines()]
    assert [place(layer) for layer in stack.lowers] == inside
    inmate.run("cd /")


def test_an_overlay_mounted_for_a_container_is_looked_up_in_our_view(sandbox: Sandbox, courier: Courier) -> None:
    """Like podman's -v src:dst:O: the container shows the mount, and has something else where its layers are."""
    lower, data, upper = sandbox.directory(b"src/l"), sandbox.directory(b"src/l2"), sandbox.directory(b"src/u")
    inmate = sandbox.inmate()
    work, merged, source = sandbox.directory(b"src/w"), sandbox.directory(b"m"), sandbox.path(b"src")
    layers = (
        f"lowerdir={os.fsdecode(lower)}:{os.fsdecode(data)},upperdir={os.fsdecode(upper)},workdir={os.fsdecode(work)}"
    )
    inmate.run(f"mount -t overlay -o {layers} none {os.fsdecode(merged)}")
    inmate.run(f"mount -t tmpfs none {os.fsdecode(source)} && cd {os.fsdecode(source)} && mkdir l l2 u w && cd /")
    stack = resolve(overlay_at(merged), courier)
    assert stack.proven
    assert [place(layer) for layer in stack.lowers] == [place_of(lower), place_of(data)]
    assert stack.lowers[0].view == own_view()


def test_a_tenant_cannot_make_us_take_his_strings_for_our_directories(sandbox: Sandbox, courier: Courier) -> None:
    """His upper is the same directory in both views; his lower is his own there and something of ours here."""
    secret, upper, merged = sandbox.directory(b"secret"), sandbox.directory(b"shared/u"), sandbox.directory(b"m")
    work = sandbox.directory(b"shared/w")
    inmate = sandbox.inmate()
    layers = f"lowerdir={os.fsdecode(secret)},upperdir={os.fsdecode(upper)},workdir={os.fsdecode(work)}"
    inmate.run(f"mount -t tmpfs none {os.fsdecode(secret)}; mount -t overlay -o {layers} none {os.fsdecode(merged)}")
    (lower,) = resolve(overlay_at(merged), courier).lowers
    assert lower.view == inmate.view
    assert place(lower) != place_of(secret)


def test_an_overlay_of_an_unprivileged_user_is_resolved(sandbox: Sandbox, courier: Courier) -> None:
    inmate = sandbox.inmate("--user", "--map-root-user")
    root = os.fsdecode(sandbox.root)
    inmate.run(f"mount -t tmpfs none {root} && mkdir {root}/u {root}/w {root}/l {root}/m")
    inmate.run(f"mount -t overlay -o userxattr,lowerdir={root}/l,upperdir={root}/u,workdir={root}/w none {root}/m")
    for name in (b"u", b"w", b"l"):
        sandbox.directory(name)  # the same strings, in our view
    overlay = overlay_at(sandbox.path(b"m"))
    stack = resolve(overlay, courier)
    assert not stack.proven, "the kernel reveals more than it used to: prefer that"
    assert [(layer.view, layer.error) for layer in stack.lowers] == [(inmate.view, "")]
    for fd in (
        clone_directory(stack.lowers[0], courier),
        clone_mount(overlay.mount_points[0], courier, device=overlay.device),
    ):
        os.close(fd)


def test_a_first_layer_that_was_replaced_is_unknown_and_never_guessed(sandbox: Sandbox, courier: Courier) -> None:
    merged = sandbox.overlay(b"m", b"l1", b"l2")
    os.rename(sandbox.path(b"l1"), sandbox.path(b"moved"))
    sandbox.directory(b"l1")
    stack = resolve(overlay_at(merged), courier)
    assert not stack.proven
    assert all("in no view" in layer.error for layer in stack.lowers)


def test_a_lower_that_vanished_leaves_the_others_known(sandbox: Sandbox, courier: Courier) -> None:
    merged = sandbox.overlay(b"m", b"l1", b"l2", b"l3")
    os.rmdir(sandbox.path(b"l2"))
    first, second, third = resolve(overlay_at(merged), courier).lowers
    assert (first.error, second.error, third.error) == ("", "unknown: No such file or directory", "")


def test_a_replaced_first_layer_is_noticed_without_handles_too(sandbox: Sandbox, courier: Courier) -> None:
    sandbox.overlay(b"inner", b"l1", b"l2")
    outer = sandbox.overlay(b"outer", b"inner", b"l3")
    sandbox.mount_tmpfs(b"inner")
    assert all("in no view" in layer.error for layer in resolve(overlay_at(outer), courier).lowers)


def test_a_relative_path_holds_below_a_directory_above_the_mount_point(
    sandbox: Sandbox, courier: Courier, monkeypatch: pytest.MonkeyPatch
) -> None:
    inode = os.stat(sandbox.directory(b"l1")).st_ino
    sandbox.directory(b"l2")
    with monkeypatch.context() as patch:
        patch.chdir(os.fsdecode(sandbox.root))
        merged = sandbox.mount_overlay(b"deep/m", [(b"lowerdir", b"l1:l2")])
    assert overlay_at(merged).lowerdir == (b"l1", b"l2")
    first, second = resolve(overlay_at(merged), courier).lowers
    assert (first.path, first.inode, first.error) == (sandbox.path(b"l1"), inode, "")
    assert second.path == sandbox.path(b"l2")


def test_a_relative_path_from_elsewhere_is_unknown_though_a_directory_of_that_name_is_near(
    sandbox: Sandbox, courier: Courier, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.directory(b"elsewhere/l1"), sandbox.directory(b"elsewhere/l2"), sandbox.directory(b"l1")
    with monkeypatch.context() as patch:
        patch.chdir(os.fsdecode(sandbox.path(b"elsewhere")))
        merged = sandbox.mount_overlay(b"m", [(b"lowerdir", b"l1:l2")])
    assert all(layer.error for layer in resolve(overlay_at(merged), courier).lowers)


def test_where_the_kernel_reveals_nothing_the_result_is_not_called_proven(sandbox: Sandbox, courier: Courier) -> None:
    """A nested overlay: its lower, itself an overlay, has no file handles that could be kept."""
    sandbox.overlay(b"inner", b"l1", b"l2")
    outer = sandbox.mount_overlay(
        b"outer", [(b"lowerdir+", sandbox.path(b"inner")), (b"lowerdir+", sandbox.directory(b"l3"))]
    )
    stack = resolve(overlay_at(outer), courier)
    assert not stack.proven
    assert [place(layer) for layer in stack.lowers] == [place_of(sandbox.path(b"inner")), place_of(sandbox.path(b"l3"))]


def test_a_symlink_in_a_layer_path_is_followed_like_the_mounter_did(sandbox: Sandbox, courier: Courier) -> None:
    real = sandbox.directory(b"releases/7")
    os.symlink(b"releases/7", sandbox.path(b"current"))
    merged = sandbox.overlay(b"m", b"current", b"l2")
    assert place(resolve(overlay_at(merged), courier).lowers[0]) == place_of(real)
    os.unlink(sandbox.path(b"current"))
    os.symlink(sandbox.directory(b"releases/8"), sandbox.path(b"current"))
    assert not resolve(overlay_at(merged), courier).proven


def test_a_clone_keeps_neither_the_merged_mount_nor_the_lower_busy(sandbox: Sandbox, courier: Courier) -> None:
    sandbox.mount_tmpfs(b"lower")
    overlay = overlay_at(sandbox.overlay(b"m", b"lower/l", b"l2"))
    fds = [
        clone_mount(overlay.mount_points[0], courier, device=overlay.device),
        clone_directory(resolve(overlay, courier).lowers[0], courier),
    ]
    sandbox.umount(b"m")
    sandbox.umount(b"lower")
    for fd in fds:
        os.close(fd)


def test_a_layer_whose_path_shows_something_else_is_not_touched(sandbox: Sandbox, courier: Courier) -> None:
    stack = resolve(overlay_at(sandbox.overlay(b"m", b"l1", b"l2")), courier)
    sandbox.mount_tmpfs(b"l1")
    with pytest.raises(LayerError, match="shows something else now"):
        clone_directory(stack.lowers[0], courier)
    os.rmdir(sandbox.path(b"l2"))
    with pytest.raises(LayerError, match="No such file"):
        clone_directory(stack.lowers[1], courier)


def test_a_mount_point_that_shows_something_else_is_not_touched(sandbox: Sandbox, courier: Courier) -> None:
    overlay = overlay_at(sandbox.overlay(b"m", b"l1", b"l2"))
    sandbox.mount_tmpfs(b"m")
    with pytest.raises(MountError, match="shows something else"):
        clone_mount(overlay.mount_points[0], courier, device=overlay.device)


def test_a_container_that_ended_is_an_error_of_its_mount_only(sandbox: Sandbox, courier: Courier) -> None:
    inmate = mounted_inside(sandbox)
    overlay = overlay_at(sandbox.path(b"m"))
    stack = resolve(overlay, courier)
    inmate.end()
    with pytest.raises(MountError, match="cannot enter"):
        clone_mount(overlay.mount_points[0], courier, device=overlay.device)
    with pytest.raises(LayerError, match="cannot enter"):
        clone_directory(stack.lowers[0], courier)
    assert all(layer.error for layer in resolve(overlay, courier).lowers)


def test_a_container_can_unmount_while_a_clone_is_held(sandbox: Sandbox, courier: Courier) -> None:
    inmate = mounted_inside(sandbox)
    overlay = overlay_at(sandbox.path(b"m"))
    fd = clone_mount(overlay.mount_points[0], courier, device=overlay.device)
    inmate.run(f"umount {os.fsdecode(sandbox.path(b'm'))} && umount {os.fsdecode(sandbox.root)}")
    os.close(fd)


def mounted_inside(sandbox: Sandbox) -> Inmate:
    """A container with an overlay at `m`, over a tmpfs of its own."""
    inmate = sandbox.inmate()
    root = os.fsdecode(sandbox.root)
    inmate.run(f"mount -t tmpfs none {root} && mkdir {root}/l1 {root}/l2 {root}/m")
    inmate.run(f"mount -t overlay -o lowerdir={root}/l1:{root}/l2 none {root}/m")
    return inmate
