"""wire.handles against handles of any kind."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from watchd.errors import WireError
from watchd.wire.handles import OVL_FILEID_V1, OverlayHandle, parse_overlay_handle

byte = st.integers(0, 255)


@given(st.sampled_from([OVL_FILEID_V1, 1, 0xFB]), st.binary() | st.binary().map(lambda rest: b"\0\0\0\0\xfb" + rest))
def test_no_handle_gets_past_as_anything_but_values_or_a_wire_error(handle_type: int, data: bytes) -> None:
    with contextlib.suppress(WireError):
        assert parse_overlay_handle(handle_type, data).fid in data


@given(byte, byte, st.binary(min_size=16, max_size=16).filter(any), st.binary(max_size=104))
def test_what_is_encoded_is_decoded(flags: int, kind: int, uuid: bytes, fid: bytes) -> None:
    data = bytes([0, 0, 0, 0, 0xFB, 21 + len(fid), flags, kind]) + uuid + fid
    assert parse_overlay_handle(OVL_FILEID_V1, data) == OverlayHandle(flags, kind, uuid, fid)
