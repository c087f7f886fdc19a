from __future__ import annotations

import contextlib
import struct

from hypothesis import given
from hypothesis import strategies as st

from watchd.errors import WireError
from watchd.wire.inotify import IN_IGNORED, IN_Q_OVERFLOW, IN_UNMOUNT, Events, decode

U32 = st.integers(0, 2**32 - 1)


@given(st.binary(max_size=512))
def test_no_bytes_raise_anything_but_wire_errors(buffer: bytes) -> None:
    with contextlib.suppress(WireError):
        decode(buffer, Events())


@given(st.lists(st.tuples(st.integers(1, 5), U32, st.integers(0, 3), st.binary(max_size=40))))
def test_every_name_in_well_formed_events_is_found_again(records: list[tuple[int, int, int, bytes]]) -> None:
    buffer = b"".join(struct.pack("=iIII", wd, mask, cookie, len(name)) + name for wd, mask, cookie, name in records)
    events = Events()
    decode(buffer, events)
    assert events.records == len(records)
    for wd, mask, _, name in records:
        if not mask & (IN_IGNORED | IN_UNMOUNT | IN_Q_OVERFLOW):
            assert events.names[wd][name.rstrip(b"\0")] & mask == mask
