"""Overlay file handles: what name_to_handle_at(AT_HANDLE_FID) answers on an object of a merged mount, and what the xattr
overlay.origin of an upper object holds.

Facts (struct ovl_fh and ovl_fb in fs/overlayfs/overlayfs.h; the same on every architecture, no byte order involved)

    offset  size  meaning
    0       3     padding, so that the fid is aligned
    3       1     version, 0
    4       1     magic, 0xfb
    5       1     length of everything from the version on: 21 + length of the fid
    6       1     flags: 1 encoded on a big endian machine, 2 any endian, 4 the object is in the upper
    7       1     handle type of the layer's filesystem
    8       16    uuid of the layer's superblock; zero with `uuid=off` and for filesystems without one (squashfs)
    24      n     fid, as name_to_handle_at gives it on the layer itself

The handle type of the whole is 0xf8 (OVL_FILEID_V1); an older format, 0xfb (OVL_FILEID_V0), lacks the padding and is not
produced since Linux 5.10. What it is of (ovl_check_encode_origin in fs/overlayfs/export.c; held by a test): without an upper
the first layer's object. With one, the upper's of the root and of what only the upper has; of what the upper shares with a
lower, a merged directory or a copied-up file, the first lower's, except with nfs_export.
"""

from __future__ import annotations

import struct

import msgspec

from watchd.errors import WireError

OVL_FILEID_V1 = 0xF8

_PATH_UPPER = 4

_header = struct.Struct("3xBBBBB16s")
_PADDING_BYTES = 3
_VERSION = 0
_MAGIC = 0xFB
_NO_UUID = bytes(16)


class OverlayHandle(msgspec.Struct, frozen=True, gc=False):
    """The real object that an object of a merged mount resolves to now."""

    flags: int
    type: int
    uuid: bytes | None
    """Of the real filesystem, 16 bytes; None where the overlay does not tell."""
    fid: bytes

    @property
    def in_upper(self) -> bool:
        """The object is in the upper."""
        return bool(self.flags & _PATH_UPPER)


def parse_origin(data: bytes) -> OverlayHandle | None:
    """Decode the xattr overlay.origin, which has no padding; None if it is empty, as over a layer without file handles.

    Raises WireError.
    """
    return parse_overlay_handle(OVL_FILEID_V1, bytes(_PADDING_BYTES) + data) if data else None


def parse_overlay_handle(handle_type: int, data: bytes) -> OverlayHandle:
    """Decode the handle of an object of a merged mount. Raises WireError if it is not an overlay's."""
    if handle_type != OVL_FILEID_V1:
        raise WireError(f"not the handle of an overlay: type {handle_type:#x}")
    if len(data) < _header.size:
        raise WireError(f"the handle of an overlay is cut short: {data.hex()}")
    version, magic, length, flags, kind, uuid = _header.unpack_from(data)
    end = _PADDING_BYTES + length
    if version != _VERSION or magic != _MAGIC or not _header.size <= end <= len(data):
        raise WireError(f"not the handle of an overlay: {data.hex()}")
    return OverlayHandle(flags=flags, type=kind, uuid=None if uuid == _NO_UUID else uuid, fid=data[_header.size : end])
