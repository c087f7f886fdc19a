"""Asking what may never answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from watchd.service.patience import CREW_MAX, Patience, Waiting, in_thread

LIMIT_S = 20.0


def tell(story: Callable[[], Awaitable[None]]) -> None:
    async def within_limits() -> None:
        async with asyncio.timeout(LIMIT_S):
            await story()

    asyncio.run(within_limits())


def test_a_question_that_hangs_takes_no_answer_from_the_others() -> None:
    async def story() -> None:
        hang, late = threading.Event(), asyncio.Event()
        patience = Patience("test", on_late=late.set, limit_s=0.05)
        answers = await patience.ask({1: lambda: "one", 2: hang.wait, 3: lambda: "three"})
        assert (answers[1], answers[3]) == ("one", "three")
        assert isinstance(answers[2], Waiting)
        hang.set()
        await late.wait()
        assert await patience.ask({2: lambda: "asked again"}) == {2: True}, "the late answer is not lost"
        assert await patience.ask({2: lambda: "asked again"}) == {2: "asked again"}

    tell(story)


def test_what_hangs_is_not_asked_by_more_and_more_threads() -> None:
    async def story() -> None:
        hang, begun = threading.Event(), []

        def question() -> None:
            begun.append(threading.get_ident())
            hang.wait()

        patience = Patience("test", on_late=lambda: None, limit_s=0.05)
        first = await patience.ask({"it": question})
        second = await patience.ask({"it": question})
        assert first == second, "it is told since when it is waited for"
        assert len(begun) == 1
        hang.set()

    tell(story)


def test_many_that_hang_are_given_up_together_and_leave_a_bounded_number_of_threads() -> None:
    async def story() -> None:
        hang, begun = threading.Event(), []

        def question() -> None:
            begun.append(threading.get_ident())
            hang.wait()

        patience = Patience("test", on_late=lambda: None, limit_s=0.05)
        answers = await patience.ask(dict.fromkeys(range(3 * CREW_MAX), question))
        assert all(isinstance(answer, Waiting) for answer in answers.values())
        assert len(begun) == CREW_MAX
        hang.set()

    tell(story)


def test_an_ask_that_is_cancelled_loses_no_answer() -> None:
    async def story() -> None:
        hang, late = threading.Event(), asyncio.Event()
        patience = Patience("test", on_late=late.set, limit_s=LIMIT_S)
        asking = asyncio.create_task(patience.ask({"it": lambda: hang.wait() and "answer"}))
        while not asking.done() and not threading.active_count() > 1:
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        hang.set()
        while "answer" not in (await patience.ask({"it": lambda: "answer"})).values():
            await late.wait()

    tell(story)


def test_an_error_is_raised_for_the_one_who_asks() -> None:
    async def story() -> None:
        patience = Patience("test", on_late=lambda: None)
        with pytest.raises(ZeroDivisionError):
            await patience.ask({"it": lambda: 1 // 0})
        with pytest.raises(ZeroDivisionError):
            await in_thread(lambda: 1 // 0, name="test")
        assert await in_thread(lambda: 1, name="test") == 1

    tell(story)
