"""overlay.capture and overlay.build: from mountinfo to the settings of a new overlay."""

from __future__ import annotations

import msgspec
import pytest

from watchd.kernel import mounts as kernel
from watchd.overlay.build import Setting, recipe
from watchd.overlay.capture import Capture, Place, Propagation, attribute_flags, capture
from watchd.overlay.model import LayerDirectory, ResolvedStack, View
from watchd.wire.mountinfo import parse_mountinfo

VIEW = View(1, 4026531840)
MOUNTINFO = rb"""20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 20 0:40 / /srv/my\040app ro,nosuid,noatime shared:7 master:3 - overlay my\040app %s
31 30 0:41 / /srv/my\040app/tmp rw,nodev unbindable - tmpfs tmpfs rw
32 31 0:42 / /srv/my\040app/tmp/deep rw,relatime - tmpfs tmpfs rw
33 20 0:43 / /srv/my\040apple rw,relatime - tmpfs tmpfs rw
"""
SHORT = rb"rw,lowerdir=/a:/b::/data,upperdir=/up\134134,workdir=/wo\054rk,redirect_dir=on,userxattr"


def captured(super_options: bytes = SHORT) -> Capture:
    found = capture("0:40", {VIEW: parse_mountinfo(MOUNTINFO % super_options)})
    assert found is not None
    return found


def stack(*lowers: bytes, data: tuple[bytes, ...] = (), upper: bytes | None = None) -> ResolvedStack:
    def layer(path: bytes) -> LayerDirectory:
        return LayerDirectory(path, VIEW)

    return ResolvedStack("0:40", layer(upper) if upper else None, (*map(layer, lowers),), (*map(layer, data),), True)


def test_nothing_about_the_mount_is_forgotten() -> None:
    found = captured()
    (place,) = found.places
    assert found.source == b"my app"
    assert place.mount.attributes == ("ro", "nosuid", "noatime")
    assert place.mount.propagation == Propagation(shared=7, master=3)
    assert place.parent is not None
    assert (place.parent.path, place.spreads) == (b"/", True)
    assert [mount.path for mount in place.submounts] == [b"/srv/my app/tmp", b"/srv/my app/tmp/deep"]
    assert [mount.mount_id for mount in place.children] == [31]
    assert place.submounts[0].propagation.unbindable


def test_it_is_a_value_that_can_be_written_down() -> None:
    assert msgspec.json.decode(msgspec.json.encode(captured()), type=Capture) == captured()


def test_the_root_directory_of_a_process_has_no_parent() -> None:
    found = capture("8:1", {VIEW: parse_mountinfo(b"20 1 8:1 / / rw - overlay none rw,lowerdir=/a:/b\n")})
    assert found is not None
    assert found.places[0].parent is None
    assert capture("9:9", {VIEW: parse_mountinfo(MOUNTINFO % SHORT)}) is None


@pytest.mark.parametrize(
    ("attributes", "flags"),
    [
        ("rw,relatime", 0),
        ("rw", kernel.MOUNT_ATTR_STRICTATIME),
        ("ro,noatime", kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOATIME),
        ("rw,nodiratime,relatime", kernel.MOUNT_ATTR_NODIRATIME),
        (
            "rw,nosuid,nodev,noexec,relatime,nosymfollow",
            kernel.MOUNT_ATTR_NOSUID
            | kernel.MOUNT_ATTR_NODEV
            | kernel.MOUNT_ATTR_NOEXEC
            | kernel.MOUNT_ATTR_NOSYMFOLLOW,
        ),
    ],
)
def test_what_mountinfo_shows_becomes_flags(attributes: str, flags: int) -> None:
    assert attribute_flags(attributes.split(",")) == flags


def test_an_attribute_that_cannot_be_given_is_named() -> None:
    with pytest.raises(KeyError, match="idmapped"):
        attribute_flags(["rw", "idmapped", "relatime"])


def test_strings_are_given_again_as_they_were() -> None:
    what = recipe(captured(), stack(b"/a", b"/b", data=(b"/data",), upper=rb"/up\4"))
    assert [(setting.key, setting.value) for setting in what.settings] == [
        (b"source", b"my app"),
        (b"lowerdir", b"/a:/b::/data"),
        (b"upperdir", rb"/up\134"),
        (b"workdir", b"/wo,rk"),
        (b"redirect_dir", b"on"),
        (b"userxattr", None),
    ]
    assert (what.workdir, what.predecessor) == (b"/wo,rk", "0:40")


def test_relative_paths_become_absolute_and_are_escaped_where_they_share_a_string() -> None:
    options = b"ro,lowerdir=a:b,upperdir=up,workdir=work"
    what = recipe(captured(options), stack(b"/x:y/a", b"/x:y/b", upper=b"/x:y/up"))
    assert what.settings[1:] == (
        Setting(b"ro", None),
        Setting(b"lowerdir", rb"/x\:y/a:/x\:y/b"),
        Setting(b"upperdir", rb"/x\:y/up", b"/x:y/up"),
        Setting(b"workdir", rb"/x\:y/work", b"/x:y/work"),
    )
    assert what.workdir == b"/x:y/work"


def test_a_list_too_long_for_a_string_is_given_one_by_one() -> None:
    lowers = [b"/layers/%d" % number + b"x" * 30 for number in range(20)]
    what = recipe(captured(b"ro,lowerdir=" + b":".join(lowers) + b"::/data"), stack(*lowers, data=(b"/data",)))
    assert [setting.value for setting in what.settings if setting.key == b"lowerdir+"] == lowers
    assert what.settings[-1] == Setting(b"datadir+", b"/data", b"/data")


def test_layers_that_were_given_one_by_one_are_given_so_again() -> None:
    options = b"ro,lowerdir+=/a:b,lowerdir+=rel,datadir+=/data,seclabel,metacopy=on"
    what = recipe(captured(options), stack(b"/a:b", b"/base/rel", data=(b"/data",)))
    assert [(setting.key, setting.value) for setting in what.settings[2:]] == [
        (b"lowerdir+", b"/a:b"),
        (b"lowerdir+", b"/base/rel"),
        (b"datadir+", b"/data"),
        (b"metacopy", b"on"),
    ]


def test_children_are_those_of_the_overlay_alone() -> None:
    place = captured().places[0]
    assert isinstance(place, Place)
    assert b"/srv/my apple" not in [mount.path for mount in place.submounts]
