"""overlay.model: from mountinfo lines to overlays."""

from __future__ import annotations

import pytest

from watchd.overlay.model import MountPoint, Overlay, View, build_overlays, split_lowerdir
from watchd.wire.mountinfo import parse_line

HOST, CONTAINER = View(1, 100), View(77, 200)


def overlay(super_options: bytes) -> Overlay:
    (built,) = build_overlays([(HOST, parse_line(b"54 42 0:40 / /m rw - overlay none " + super_options))])
    return built


@pytest.mark.parametrize(
    ("value", "lower", "data_only"),
    [
        (b"/a", (b"/a",), ()),
        (b"/a:/b", (b"/a", b"/b"), ()),
        (b"/a::/d1::/d2", (b"/a",), (b"/d1", b"/d2")),
        (rb"/a\:b:/c\,d:/e\\f:/g\h", (b"/a:b", b"/c,d", rb"/e\f", b"/gh"), ()),
        (rb"/a\\:/b", (b"/a\\", b"/b"), ()),
        (b"rel:../up", (b"rel", b"../up"), ()),
        (b"/a\n\xff:/b", (b"/a\n\xff", b"/b"), ()),
        (b"", (), ()),
    ],
)
def test_layers_are_split_where_the_kernel_splits_them(
    value: bytes, lower: tuple[bytes, ...], data_only: tuple[bytes, ...]
) -> None:
    assert split_lowerdir(value) == (lower, data_only)


def test_layers_given_one_by_one_are_taken_as_they_are() -> None:
    built = overlay(b"ro,lowerdir+=/a:b,lowerdir+=/c\\134d\\054,datadir+=/e::f,metacopy=on")
    assert (built.lowerdir, built.data_only) == ((b"/a:b", b"/c\\d,"), (b"/e::f",))


def test_the_upper_is_unescaped_like_the_kernel_does_when_it_looks_it_up() -> None:
    built = overlay(b"rw,lowerdir=/l,upperdir=/u\\134\\054p\\134\\134x,workdir=/w\\040k,userxattr,xino=off,volatile")
    assert (built.upperdir, built.workdir) == (b"/u,p\\x", b"/w k")
    assert built.options == {"userxattr": "", "xino": "off", "volatile": ""}
    assert not built.read_only


def test_an_overlay_without_an_upper_has_none() -> None:
    built = overlay(b"ro,lowerdir=/l:/m")
    assert (built.upperdir, built.workdir, built.read_only) == (None, None, True)


def test_a_read_only_mount_of_a_writable_overlay_is_not_a_read_only_superblock() -> None:
    line = b"54 42 0:40 / /m ro,relatime - overlay none rw,lowerdir=/l,upperdir=/u,workdir=/w"
    (built,) = build_overlays([(HOST, parse_line(line))])
    assert not built.read_only


def test_one_superblock_is_one_overlay_however_many_mounts_show_it() -> None:
    lines = [
        (HOST, b"54 42 0:40 / /m rw - overlay none rw,lowerdir=/l"),
        (HOST, b"55 42 0:41 / /n rw - overlay none rw,lowerdir=/k"),
        (HOST, b"56 42 0:40 /sub /bind rw - overlay none rw,lowerdir=/l"),
        (CONTAINER, b"90 80 0:40 / / rw - overlay none rw,lowerdir=/l"),
    ]
    first, second = build_overlays((view, parse_line(line)) for view, line in lines)
    assert (first.device, second.device) == ("0:40", "0:41")
    assert first.mount_points == (
        MountPoint(b"/m", 100, 1),
        MountPoint(b"/bind", 100, 1, b"/sub"),
        MountPoint(b"/", 200, 77),
    )
