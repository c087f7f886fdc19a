"""How long the tests that go on for as long as one lets them go on."""

from __future__ import annotations

import os

SOAK = int(os.environ.get("WATCHD_SOAK", "0"))
"""How many times as long as in `make test`; 0 or 1: as there."""


def rounds(number: int) -> int:
    """`number`, or so many times more when soaking."""
    return number * max(SOAK, 1)
