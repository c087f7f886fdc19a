"""The client for programs with asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Self, TypeVar

from watchd.client import calls, protocol
from watchd.client.blocking import RUNTIME_DIRECTORY, SILENCE_S, TIMEOUT_S
from watchd.client.calls import Call, Stream
from watchd.client.connection import connect
from watchd.client.values import ChangedDirectories, Changes, Cursor, Followed, Mount, Status
from watchd.config.schema import SOCKET_NAME
from watchd.errors import DeadlineError

_CHUNK_BYTES = 1 << 20

T = TypeVar("T")


class AsyncClient:
    """`watchd.client.Client` for asyncio: the same methods, to be awaited; `follow` is an asynchronous iterator."""

    def __init__(self, runtime_directory: Path | str = RUNTIME_DIRECTORY, *, timeout: float = TIMEOUT_S) -> None:
        """`timeout`: seconds that an answer may take."""
        self._path = Path(runtime_directory) / SOCKET_NAME
        self._timeout = timeout

    async def status(self) -> Status:
        """See `Client.status`."""
        return await self._ask(calls.status())

    async def sync(
        self,
        mounts: Iterable[str | bytes] = (),
        *,
        timeout: float = TIMEOUT_S,  # noqa: ASYNC109 - the daemon keeps it
    ) -> tuple[Mount, ...]:
        """See `Client.sync`."""
        return await self._ask(calls.sync(mounts, timeout))

    async def changes(self, since: str, *, layers: Iterable[str] = (), prefix: bytes | None = None) -> Changes:
        """See `Client.changes`."""
        return await self._ask(calls.changes(since, layers, prefix))

    async def changed_directories(
        self, since: str, *, layers: Iterable[str] = (), prefix: bytes | None = None, ancestors: bool = False
    ) -> ChangedDirectories:
        """See `Client.changed_directories`."""
        return await self._ask(calls.changed_directories(since, layers, prefix, ancestors))

    def follow(self, since: str = "now", *, layers: Iterable[str] = (), silence: float = SILENCE_S) -> AsyncFollow:
        """See `Client.follow`; to be used in `async with`."""
        return AsyncFollow(self._path, since, layers=layers, timeout=self._timeout, silence=silence)

    async def cursors(self) -> tuple[Cursor, ...]:
        """See `Client.cursors`."""
        return await self._ask(calls.cursors())

    async def set_cursor(self, name: str, cursor: str = "now") -> str:
        """See `Client.set_cursor`."""
        return await self._ask(calls.set_cursor(name, cursor))

    async def delete_cursor(self, name: str) -> None:
        """See `Client.delete_cursor`."""
        await self._ask(calls.delete_cursor(name))

    async def _ask(self, call: Call[T]) -> T:
        timeout_s = self._timeout if call.timeout is None else call.timeout
        with protocol.talking(self._path, timeout=timeout_s):
            async with asyncio.timeout(timeout_s):
                return call.read(await self._request(call, timeout_s))

    async def _request(self, call: Call[T], timeout_s: float) -> dict[str, Any]:
        reader, writer = await _connect(self._path, timeout_s)
        lines = protocol.Lines()
        try:
            writer.write(protocol.encode(call.verb, call.arguments))
            while True:
                data = await reader.read(_CHUNK_BYTES)
                if not data:
                    raise protocol.went_away(self._path)
                if found := lines.feed(data):
                    return protocol.decode(found[0])
        finally:
            writer.close()


async def _connect(path: Path, timeout_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    connecting = asyncio.create_task(asyncio.to_thread(connect, path, timeout_s))
    try:
        connection = await asyncio.shield(connecting)
    except asyncio.CancelledError:
        connecting.add_done_callback(_close)
        raise
    return await asyncio.open_unix_connection(sock=connection)


def _close(connecting: asyncio.Task[Any]) -> None:
    """Nobody waits for this connection any more."""
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()


class AsyncFollow(AbstractAsyncContextManager["AsyncFollow"]):
    """`watchd.client.Follow` for asyncio: `async with client.follow() as records: async for one in records: ...`."""

    def __init__(self, path: Path, since: str, *, layers: Iterable[str], timeout: float, silence: float) -> None:
        self._stream = Stream(path, since, layers)
        self._path, self._timeout, self._silence = path, timeout, silence
        self._writer: asyncio.StreamWriter | None = None

    @property
    def cursor(self) -> str:
        """See `Follow.cursor`."""
        return self._stream.cursor

    @property
    def fresh(self) -> bool:
        """See `Follow.fresh`."""
        return self._stream.fresh

    async def __aenter__(self) -> Self:
        """Raises as the methods of `Client`."""
        try:
            with protocol.talking(self._path, timeout=self._timeout):
                async with asyncio.timeout(self._timeout):
                    self._reader, self._writer = await _connect(self._path, self._timeout)
                    self._writer.write(self._stream.request)
                    while not self._stream.has_begun:
                        self._stream.feed(await self._reader.read(_CHUNK_BYTES))
        except BaseException:
            self.close()
            raise
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Followed:
        """Waits for the next record. Raises DaemonUnreachableError and WatchdError."""
        while (found := self._stream.next()) is None:
            self._stream.feed(await self._receive())
        return found

    async def _receive(self) -> bytes:
        try:
            with protocol.talking(self._path, timeout=self._silence):
                async with asyncio.timeout(self._silence):
                    return await self._reader.read(_CHUNK_BYTES)
        except DeadlineError:
            raise protocol.silent(self._path, self._silence) from None

    def close(self) -> None:
        """Ends it."""
        if self._writer is not None:
            self._writer.close()

    async def __aexit__(self, *_exception: object) -> None:
        self.close()
