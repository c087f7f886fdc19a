"""Asking what may never answer, without waiting for it for ever.

Facts
* A thread that waits for the server of a FUSE or network filesystem cannot be called back: it ends with the answer, or with the
  process. stat, statfs and every lookup below the root of such a mount wait; a walk to the root itself does not.
* The threads of Python's own pools are joined when the process ends, so one that hangs there keeps it from ending. Daemon
  threads are not; those here are.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

LIMIT_S = 1.0
"""So long an answer is waited for; it is not lost if it comes later."""

HELP_S = 0.02
"""When no answer came for so long another thread takes the next question."""

CREW_MAX = 32
"""Threads for one list of questions."""

LATE_MAX = 1000
"""Answers that came late and were never asked for again are forgotten beyond so many."""

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Waiting:
    """In place of an answer that is not there yet."""

    since: float
    """CLOCK_MONOTONIC, seconds."""

    def __str__(self) -> str:
        return f"for {time.monotonic() - self.since:.0f} s"


async def in_thread(work: Callable[[], T], *, name: str) -> T:
    """What `work` returns or raises, from a thread of its own, which nobody waits for once the caller is cancelled."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not answer.done():
            setter(value)

    def run() -> None:
        try:
            outcome: tuple[Callable[[Any], None], Any] = (answer.set_result, work())
        except Exception as error:
            outcome = (answer.set_exception, error)
        _tell(loop, partial(settle, *outcome))

    threading.Thread(target=run, name=name, daemon=True).start()
    return await answer


class Patience:
    """Asks questions that may hang. Belongs to the event loop; one list of questions is worked on at a time.

    Usually a single thread answers them all. One that hangs is left alone with its question, which is not put to another
    until it returns; a thread in its place goes on with the rest.
    """

    def __init__(self, name: str, *, on_late: Callable[[], None], limit_s: float = LIMIT_S) -> None:
        """`on_late` is called, in the loop, when an answer came after the limit: the next `ask` has it."""
        self._name, self._on_late, self._limit_s = name, on_late, limit_s
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._lock = threading.Lock()
        self._hanging: dict[Hashable, float] = {}
        self._late: dict[Hashable, object] = {}

    async def ask(self, questions: Mapping[K, Callable[[], T]]) -> dict[K, T | Waiting]:
        """The answer to each, or since when it is waited for. Raises what a question raised."""
        async with self._turn:
            with self._lock:
                answers: dict[Hashable, object] = {key: self._late.pop(key) for key in questions if key in self._late}
                left = {key: ask for key, ask in questions.items() if key not in answers and key not in self._hanging}
            crew = _Crew(self._name, left, self._lock, self._came_late)
            try:
                await crew.work(self._limit_s)
            finally:
                with self._lock:
                    self._hanging |= crew.dismiss()
                    waiting = {key: Waiting(since) for key, since in self._hanging.items()}
            answers |= crew.answers
        for answer in answers.values():
            if isinstance(answer, Exception):
                raise answer
        unasked = Waiting(time.monotonic())
        return {key: cast(T | Waiting, answers.get(key, waiting.get(key, unasked))) for key in questions}

    def _came_late(self, key: Hashable, answer: object) -> None:
        """In the thread that hung; with the lock."""
        del self._hanging[key]
        if len(self._late) >= LATE_MAX:
            self._late.clear()
        self._late[key] = answer
        _tell(self._loop, self._on_late)


class _Crew:
    """The threads that work on one list of questions."""

    def __init__(
        self,
        name: str,
        questions: Mapping[Any, Callable[[], object]],
        lock: threading.Lock,
        came_late: Callable[[Hashable, object], None],
    ) -> None:
        """Both are of the one who asks: an answer is either in time or late."""
        self.answers: dict[Hashable, object] = {}
        self._name, self._lock, self._came_late = name, lock, came_late
        self._left = deque(questions.items())
        self._begun: dict[Hashable, float] = {}
        self._dismissed = False
        self._threads = 0
        self._loop = asyncio.get_running_loop()
        self._rested = asyncio.Event()

    async def work(self, limit_s: float) -> None:
        """Returns when everything is answered, or what is not has had `limit_s`."""
        answered = -1
        while not self._is_over(limit_s):
            if answered in (-1, len(self.answers)):
                self._add_thread()
            answered = len(self.answers)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HELP_S):
                    await self._rested.wait()

    def dismiss(self) -> dict[Hashable, float]:
        """Nobody waits any more; returns which questions hang, and since when. To be called with the lock."""
        self._dismissed = True
        self._left.clear()
        return dict(self._begun)

    def _is_over(self, limit_s: float) -> bool:
        overdue = time.monotonic() - limit_s
        with self._lock:
            if any(since > overdue for since in self._begun.values()):
                return False
            return not self._left or len(self._begun) >= CREW_MAX

    def _add_thread(self) -> None:
        if self._left and self._threads < CREW_MAX:
            self._threads += 1
            threading.Thread(target=self._run, name=f"{self._name}-{self._threads}", daemon=True).start()

    def _run(self) -> None:
        while (question := self._next()) is not None:
            key, ask = question
            try:
                answer = ask()
            except Exception as error:
                answer = error
            with self._lock:
                if self._dismissed:
                    self._came_late(key, answer)
                    return
                del self._begun[key]
                self.answers[key] = answer
        _tell(self._loop, self._rest)

    def _next(self) -> tuple[Hashable, Callable[[], object]] | None:
        with self._lock:
            if not self._left:
                return None
            key, ask = self._left.popleft()
            self._begun[key] = time.monotonic()
            return key, ask

    def _rest(self) -> None:
        if not self._begun:
            self._rested.set()


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the end is near
        loop.call_soon_threadsafe(call)
