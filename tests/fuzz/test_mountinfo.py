"""wire.mountinfo and overlay.model against names and lines of any kind."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from watchd.errors import WireError
from watchd.overlay.model import View, build_overlays, split_lowerdir
from watchd.wire.mountinfo import parse_line, parse_mountinfo

path = st.binary(min_size=1).filter(lambda name: b"\0" not in name)


def shown(value: bytes, escaped: bytes) -> bytes:
    """seq_escape() of the kernel."""
    return b"".join(b"\\%03o" % byte if byte in escaped else bytes([byte]) for byte in value)


def typed(layer: bytes) -> bytes:
    """A path as the mounter has to write it in `lowerdir=` and `upperdir=`."""
    return b"".join(b"\\" + bytes([byte]) if byte in b"\\:," else bytes([byte]) for byte in layer)


@given(st.binary())
def test_no_line_gets_past_as_anything_but_values_or_a_wire_error(data: bytes) -> None:
    with contextlib.suppress(WireError):
        parse_mountinfo(data)


@given(st.binary())
def test_no_super_options_break_the_model(super_options: bytes) -> None:
    line = b"54 42 0:40 / /m rw - overlay none " + super_options.replace(b"\n", b"")
    (overlay,) = build_overlays([(View(1, 1), parse_line(line))])
    assert overlay.device == "0:40"


@given(st.lists(path, min_size=1), st.lists(path))
def test_any_layer_name_survives_the_colon_syntax(lower: list[bytes], data_only: list[bytes]) -> None:
    value = b"::".join([b":".join(map(typed, lower)), *map(typed, data_only)])
    assert split_lowerdir(value) == (tuple(lower), tuple(data_only))


@given(st.lists(path, min_size=1), path, path)
def test_any_name_survives_the_way_through_mountinfo(lower: list[bytes], upper: bytes, mount_point: bytes) -> None:
    layers = b",".join(b"lowerdir+=" + shown(layer, b", \t\n\\") for layer in lower)
    options = b"rw,%s,upperdir=%s,workdir=/w" % (layers, shown(typed(upper), b", \t\n\\"))
    line = b"54 42 0:40 / %s rw - overlay none %s" % (shown(mount_point, b" \t\n\\"), options)
    (info,) = parse_mountinfo(b"1 1 0:1 / / rw - ext4 x rw\n" + line + b"\n", frozenset({b"overlay"}))
    (overlay,) = build_overlays([(View(1, 1), info)])
    assert (overlay.lowerdir, overlay.upperdir, info.mount_point) == (tuple(lower), upper, mount_point)
