from __future__ import annotations

import asyncio
import logging

import pytest

from watchd.coherence.engine import MountState
from watchd.coherence.pins import Holder
from watchd.coherence.view import Stale
from watchd.service import stalelog
from watchd.service.stalelog import StaleLog, sentence


def test_a_line_names_what_is_stale_and_who_holds_it_within_bounds() -> None:
    holders = tuple(Holder(pid, "sh", "open") for pid in range(1, 6))
    assert sentence([Stale(b"", "layer")]) == "1 name is stale: / layer"
    assert sentence([Stale(b"b\n\xff", "ghost", holders, "evict: too large"), Stale(b"a", "missing")]) == (
        "2 names are stale: a missing; "
        r"b\n\udcff ghost, held by 1 (sh, open), 2 (sh, open), 3 (sh, open) and 2 more (evict: too large)"
    )
    assert sentence([Stale(b"%d" % number, "ghost") for number in range(1000)]).endswith(
        "; 100 ghost; 101 ghost; and 995 more"
    )


def test_what_stays_stale_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalelog, "SETTLE_S", 0.0)
    caplog.set_level(logging.INFO, "watchd")
    now: tuple[Stale, ...] = ()

    async def story() -> None:
        nonlocal now
        book = StaleLog(lambda _: MountState("stale", now, {}))
        for stale in ((), (Stale(b"a", "ghost"),), (Stale(b"a", "ghost"),), (Stale(b"b", "ghost"),), (), ()):
            now = stale
            for _ in range(3):
                book.round("0:45", stale=len(stale))
            while book._timers:
                await asyncio.sleep(0)
        book.round("0:45", stale=1)
        book.close()

    asyncio.run(story())
    assert caplog.messages == [
        "0:45: 1 name is stale: a ghost",
        "0:45: 1 name is stale: b ghost",
        "0:45: nothing is stale any more",
    ]
