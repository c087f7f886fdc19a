"""Positions in a journal as people write them: `EPOCH:SEQ`, `now` and `beginning`."""

from __future__ import annotations

import re
from typing import Final

from watchd.errors import UsageError
from watchd.journal.reader import Extent

_CURSOR: Final = re.compile(r"([0-9a-f]{16}):([0-9]{1,19})")


def parse_cursor(text: str, extent: Extent) -> int:
    """The sequence number behind which `text` stands, 0 for `beginning`.

    Raises UsageError when it is no cursor, belongs to another journal or lies beyond the end.
    """
    if text == "beginning":
        return 0
    if text == "now":
        return extent.last_seq
    match = _CURSOR.fullmatch(text)
    if not match:
        raise UsageError(f"{text!r} is no cursor", remedy="give EPOCH:SEQ, now or beginning")
    epoch, seq = match[1], int(match[2])
    if epoch != extent.epoch:
        remedy = "start over from beginning"
        raise UsageError(f"cursor {text} belongs to another journal, this one is {extent.epoch}", remedy=remedy)
    if seq > extent.last_seq:
        remedy = "give now for its end"
        raise UsageError(f"cursor {text} lies beyond the journal's end at {extent.last_seq}", remedy=remedy)
    return seq
