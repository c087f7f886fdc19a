"""The book of layers, with sources that do as they are told and a journal that only counts."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from watchd.config.schema import Sources
from watchd.errors import UnsupportedError
from watchd.overlay.model import LayerDirectory, View
from watchd.service.fdstore import FdStore
from watchd.service.layer import Layer
from watchd.service.layers import LayerBook
from watchd.service.names import NameBook
from watchd.sources.base import Batch, Source, WatchedLayer
from watchd.sources.worker import Worker

PATIENCE_S = 20.0


class ObedientSource:
    """Breaks when `breaking` is set, and watches nothing before `permission` is."""

    backend = "obedient"

    def __init__(self) -> None:
        self._events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.permission = threading.Event()
        self.permission.set()
        self.adding = threading.Event()
        self.closed = False

    def break_down(self) -> None:
        os.eventfd_write(self._events, 1)

    def fileno(self) -> int:
        return self._events

    def collect(self) -> Batch | None:
        raise OSError("broken")

    def add(self, layer: WatchedLayer) -> None:
        self.adding.set()
        assert self.permission.wait(PATIENCE_S)

    def idle(self) -> None: ...

    def remove(self, name: str) -> None: ...

    def recover(self) -> None: ...

    def close(self) -> None:
        self.closed = True
        os.close(self._events)


class CountingJournal:
    pending = 0
    failure = None

    def __init__(self) -> None:
        self.recovered = type("Recovered", (), {"layers": {}})()
        self.last_seq = 0

    def append(self, records: object) -> int:
        self.last_seq += 1
        return self.last_seq

    def note(self, marks: object) -> None: ...


class Indifferent:
    """An engine and metrics that nothing matters to."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


class Book(LayerBook):
    """With obedient sources, which can be had by the order in which they were made."""

    def __init__(self, directory: Path) -> None:
        anything: Any = Indifferent()
        journal: Any = CountingJournal()
        super().__init__(
            journal,
            anything,
            anything,
            settings=Sources(backend="inotify"),
            knowledge=anything,
            barrier_directory=directory,
            names=NameBook({}),
            store=FdStore({}, epoch="", last_seq=0, is_there=False),
            on_round=print,
        )
        self.sources: list[ObedientSource] = []
        self.prepare: Callable[[ObedientSource], None] = lambda source: None

    def _source(self, backend: str) -> Source:
        self.sources.append(ObedientSource())
        self.prepare(self.sources[-1])
        return self.sources[-1]

    async def adopt_at(self, path: bytes) -> Layer:
        directory = LayerDirectory(path, View(1, 1), 1, len(self.layers) + 2)
        watched = WatchedLayer(os.fsdecode(path), path, 1, None, lambda: -1, lambda: -1)
        return await self.adopt(watched, directory, name=os.fsdecode(path), backend="auto")

    async def close(self) -> None:
        for worker in list(self._workers.values()):
            await asyncio.to_thread(worker.stop)


def with_book(directory: Path, story: Callable[[Book], Awaitable[None]]) -> None:
    async def tell() -> None:
        book = Book(directory)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await story(book)
        finally:
            await book.close()

    asyncio.run(tell())


def test_a_sync_does_not_wait_for_a_layer_that_went_away(tmp_path: Path) -> None:
    async def story(book: Book) -> None:
        layer = await book.adopt_at(b"one")
        waiting = asyncio.create_task(book.barrier([layer]))
        await asyncio.sleep(0)
        book.drop(layer)
        await waiting

    with_book(tmp_path, story)


def test_a_sync_does_not_wait_for_a_source_that_was_lost(tmp_path: Path) -> None:
    async def story(book: Book) -> None:
        layer = await book.adopt_at(b"one")
        waiting = asyncio.create_task(book.barrier([layer]))
        await asyncio.sleep(0)
        book.sources[0].break_down()
        await waiting
        assert layer.state == "failed"

    with_book(tmp_path, story)


def test_losing_one_source_does_not_end_another_that_is_just_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(book: Book) -> None:
        await book.adopt_at(b"one")
        book.prepare = lambda source: source.permission.clear()
        beginning = asyncio.create_task(book.adopt_at(b"two"))
        while len(book.sources) < 2:
            await asyncio.sleep(0)
        second = book.sources[1]
        await asyncio.to_thread(second.adding.wait, PATIENCE_S)
        stopped: asyncio.Queue[str] = asyncio.Queue()
        loop, stop = asyncio.get_running_loop(), Worker.stop

        def tell_and_stop(worker: Worker) -> None:
            loop.call_soon_threadsafe(stopped.put_nowait, worker.name)
            stop(worker)

        monkeypatch.setattr(Worker, "stop", tell_and_stop)
        book.sources[0].break_down()
        assert await stopped.get() == "inotify one"
        second.permission.set()
        layer = await beginning
        assert layer.state == "live"
        assert not second.closed
        assert stopped.empty()

    with_book(tmp_path, story)


def test_a_layer_that_is_live_through_the_overlay_around_it_is_not_tried_again_and_failed(tmp_path: Path) -> None:
    async def story(book: Book) -> None:
        def refuse(source: ObedientSource) -> None:
            def add(layer: WatchedLayer) -> None:
                raise UnsupportedError("no mark")

            source.add = add  # type: ignore[method-assign]

        book.prepare = refuse
        layer = await book.adopt_at(b"one")
        assert (layer.state, layer.worker) == ("failed", None)
        layer.become("live", "as the book of mounts finds it")
        layer.retry_at = 0.0
        await book.retry()
        assert layer.state == "live"
        layer.become("failed")
        await book.retry()
        assert len(book.sources) == 2, "one that failed is tried again"

    with_book(tmp_path, story)
