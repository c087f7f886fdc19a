"""wire.mountinfo: lines as the kernel writes them."""

from __future__ import annotations

import pytest

from watchd.errors import WireError
from watchd.wire.mountinfo import FUSE_OVERLAYFS, OVERLAY, MountInfo, parse_line, parse_mountinfo, split_options

ROOT = b"27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard"
MERGED = (
    b"54 42 0:40 / /srv/a\\040b rw,relatime shared:5 master:2 - overlay none ro,lowerdir=/l\\0541:/l2,redirect_dir=on"
)
FUSE = b"60 27 0:50 / /home/u/m rw - fuse.fuse-overlayfs fuse-overlayfs rw,user_id=1000"
LOOK_ALIKE = b"61 27 0:51 / /mnt rw - cifs //s/a x - overlay - y rw,a b"


def test_every_field_is_where_proc_5_says() -> None:
    assert parse_line(MERGED) == MountInfo(
        mount_id=54,
        parent_id=42,
        device=(0, 40),
        root=b"/",
        mount_point=b"/srv/a b",
        options=b"rw,relatime",
        tags=(b"shared:5", b"master:2"),
        fstype=b"overlay",
        source=b"none",
        super_options=b"ro,lowerdir=/l\\0541:/l2,redirect_dir=on",
    )


def test_an_empty_source_does_not_shift_the_options() -> None:
    info = parse_line(b"97 42 0:51 / /m rw - overlay  ro,lowerdir=a:b")
    assert (info.source, info.super_options) == (b"", b"ro,lowerdir=a:b")


def test_only_the_wanted_filesystems_are_decoded() -> None:
    data = b"\n".join([ROOT, b"garbage", MERGED, FUSE, LOOK_ALIKE, b""])
    assert [info.mount_id for info in parse_mountinfo(data, frozenset({OVERLAY, FUSE_OVERLAYFS}))] == [54, 60]


def test_a_line_that_only_looks_like_an_overlay_is_not_taken_for_one() -> None:
    assert parse_mountinfo(LOOK_ALIKE + b"\n", frozenset({OVERLAY})) == ()


def test_without_a_choice_every_line_is_decoded() -> None:
    assert [info.fstype for info in parse_mountinfo(ROOT + b"\n" + MERGED + b"\n")] == [b"ext4", b"overlay"]


def test_escaped_commas_do_not_split_an_option() -> None:
    assert split_options(b"ro,lowerdir=/l\\0541:/a\\134\\054b,userxattr") == [
        (b"ro", b""),
        (b"lowerdir", b"/l,1:/a\\,b"),
        (b"userxattr", b""),
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"54 42 0:40 / /m rw",
        b"54 42 0:40 / /m - overlay none rw",
        b"54 42 0:40 / /m rw - overlay none",
        b"54 42 040 / /m rw - overlay none rw",
        b"x 42 0:40 / /m rw - overlay none rw",
    ],
)
def test_a_bad_line_is_named(line: bytes) -> None:
    with pytest.raises(WireError, match="not a mountinfo line") as caught:
        parse_line(line)
    assert repr(line) in str(caught.value)
