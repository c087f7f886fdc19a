"""Work that is given up when its time is over."""

from __future__ import annotations

import asyncio
import gc
from typing import Any, cast

import pytest

from watchd.errors import JournalError
from watchd.journal.writer import Journal
from watchd.service.keeper import JournalKeeper
from watchd.service.layers import LayerBook


class FakeJournal:
    def __init__(self) -> None:
        self.failed: asyncio.Future[JournalError] = asyncio.get_running_loop().create_future()


async def give_up(complaints: list[dict[str, Any]]) -> None:
    """Work that has failed when it is given up, which its guard does not know of yet."""
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    keeper = JournalKeeper(cast(Journal, FakeJournal()), cast(LayerBook, None), changed=lambda: None)
    start, failing = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await start.wait()
        failing.set()
        raise TimeoutError

    guarded = asyncio.ensure_future(keeper.guard(work()))
    start.set()
    await failing.wait()
    guarded.cancel()
    with pytest.raises(asyncio.CancelledError):
        await guarded


def test_work_that_fails_when_it_is_given_up_leaves_no_complaint() -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.run(give_up(complaints))
    gc.collect()
    assert complaints == []
