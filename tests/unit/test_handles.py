"""wire.handles: overlay file handles as measured."""

from __future__ import annotations

import pytest

from watchd.errors import WireError
from watchd.wire.handles import OVL_FILEID_V1, OverlayHandle, parse_origin, parse_overlay_handle

UUID = bytes(range(1, 17))
FID = bytes.fromhex("0200000000000000")


def encoded(uuid: bytes = UUID, fid: bytes = FID, *, version: int = 0, magic: int = 0xFB) -> bytes:
    return bytes([0, 0, 0, version, magic, 21 + len(fid), 4, 1]) + uuid + fid


def test_the_real_object_is_told() -> None:
    handle = parse_overlay_handle(OVL_FILEID_V1, encoded())
    assert handle == OverlayHandle(flags=4, type=1, uuid=UUID, fid=FID)


def test_padding_behind_the_fid_does_not_become_part_of_it() -> None:
    assert parse_overlay_handle(OVL_FILEID_V1, encoded() + bytes(3)).fid == FID


def test_no_uuid_is_not_a_uuid_that_others_could_have() -> None:
    assert parse_overlay_handle(OVL_FILEID_V1, encoded(uuid=bytes(16))).uuid is None


@pytest.mark.parametrize(
    ("handle_type", "data"),
    [
        (1, FID),
        (0xFB, encoded()),
        (OVL_FILEID_V1, b""),
        (OVL_FILEID_V1, encoded()[:23]),
        (OVL_FILEID_V1, encoded()[:-1]),
        (OVL_FILEID_V1, encoded(version=1)),
        (OVL_FILEID_V1, encoded(magic=0)),
    ],
)
def test_what_is_no_overlay_handle_is_refused(handle_type: int, data: bytes) -> None:
    with pytest.raises(WireError, match="handle of an overlay"):
        parse_overlay_handle(handle_type, data)


def test_the_origin_of_a_copy_has_no_padding_and_may_be_empty() -> None:
    assert parse_origin(encoded()[3:]) == parse_overlay_handle(OVL_FILEID_V1, encoded())
    assert parse_origin(b"") is None
    with pytest.raises(WireError):
        parse_origin(encoded()[3:-1])
