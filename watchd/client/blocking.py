"""The client for programs that wait."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self, TypeVar

from watchd.client import calls, protocol
from watchd.client.calls import Call, Stream
from watchd.client.connection import connect
from watchd.client.values import ChangedDirectories, Changes, Cursor, Followed, Mount, Status
from watchd.config.schema import SOCKET_NAME, Config
from watchd.errors import DeadlineError

RUNTIME_DIRECTORY = Config().runtime_directory
TIMEOUT_S = 30.0
SILENCE_S = 30.0
"""A daemon that is alive says something every five seconds."""

_CHUNK_BYTES = 1 << 20

T = TypeVar("T")


def request(
    runtime_directory: Path, verb: str, *, timeout: float, arguments: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Asks the daemon for `verb` and gives the result.

    `timeout` is in seconds, for all of it together. `arguments` are values of JSON; names that are not UTF-8 are given as
    `os.fsdecode` gives them.

    Raises DaemonUnreachableError when no daemon answers, NotPermittedError when the socket may not be used, DeadlineError
    when the answer is not there in time, and the class that ERROR_KINDS names when the daemon refuses.
    """
    path = runtime_directory / SOCKET_NAME
    deadline = time.monotonic() + timeout
    lines = protocol.Lines()
    with protocol.talking(path, timeout=timeout), connect(path, timeout) as connection:
        connection.settimeout(_left(deadline))
        connection.sendall(protocol.encode(verb, arguments or {}))
        while True:
            data = _receive(connection, deadline)
            if not data:
                raise protocol.went_away(path)
            if found := lines.feed(data):
                return protocol.decode(found[0])


def _left(deadline: float) -> float:
    """Seconds until then; a socket takes zero for `do not wait`, so there is always a little."""
    return max(deadline - time.monotonic(), 0.001)


def _receive(connection: socket.socket, deadline: float) -> bytes:
    if time.monotonic() >= deadline:
        raise TimeoutError
    connection.settimeout(_left(deadline))
    return connection.recv(_CHUNK_BYTES)


class Client:
    """Asks a daemon. Every question is a connection of its own, so a client may be used in several threads.

    All methods raise DaemonUnreachableError, NotPermittedError, DeadlineError, and UsageError or another WatchdError when the
    daemon refuses.
    """

    def __init__(self, runtime_directory: Path | str = RUNTIME_DIRECTORY, *, timeout: float = TIMEOUT_S) -> None:
        """`timeout`: seconds that an answer may take."""
        self._directory = Path(runtime_directory)
        self._timeout = timeout

    def status(self) -> Status:
        """Mounts, layers, the journal, named cursors."""
        return self._ask(calls.status())

    def sync(self, mounts: Iterable[str | bytes] = (), *, timeout: float = TIMEOUT_S) -> tuple[Mount, ...]:
        """Returns when every change made before the call is in the journal and was verified in the mounts.

        `mounts` are mount points, major:minor or globs; none are all of them. Gives these mounts, see `Mount.is_coherent`.
        Raises DeadlineError after `timeout` seconds.
        """
        return self._ask(calls.sync(mounts, timeout))

    def changes(self, since: str, *, layers: Iterable[str] = (), prefix: bytes | None = None) -> Changes:
        """Every path that changed behind the cursor `since` once, as it is now.

        `since` is EPOCH:SEQ, a name, `now` or `beginning`. With `layers` only these; with `prefix` only what lies at or below
        that path of a layer.
        """
        return self._ask(calls.changes(since, layers, prefix))

    def changed_directories(
        self, since: str, *, layers: Iterable[str] = (), prefix: bytes | None = None, ancestors: bool = False
    ) -> ChangedDirectories:
        """Only the directories that hold such paths, with `ancestors` all that lie above them too. Much cheaper."""
        return self._ask(calls.changed_directories(since, layers, prefix, ancestors))

    def follow(self, since: str = "now", *, layers: Iterable[str] = (), silence: float = SILENCE_S) -> Follow:
        """The records behind the cursor `since` and then those to come, as soon as they are durable.

        `layers`: only records of these. Without a sign of life for `silence` seconds the daemon counts as lost.
        """
        return Follow(self._directory / SOCKET_NAME, since, layers=layers, timeout=self._timeout, silence=silence)

    def cursors(self) -> tuple[Cursor, ...]:
        """The named cursors."""
        return self._ask(calls.cursors())

    def set_cursor(self, name: str, cursor: str = "now") -> str:
        """Have a named cursor stand at `cursor`, and so keep what lies behind it; gives it as EPOCH:SEQ. For root."""
        return self._ask(calls.set_cursor(name, cursor))

    def delete_cursor(self, name: str) -> None:
        """Forget a named cursor. For root."""
        self._ask(calls.delete_cursor(name))

    def _ask(self, call: Call[T]) -> T:
        timeout = self._timeout if call.timeout is None else call.timeout
        return call.read(request(self._directory, call.verb, timeout=timeout, arguments=call.arguments))


class Follow(AbstractContextManager["Follow"]):
    """An endless iterator over records; owns its connection.

    When it raises, DaemonUnreachableError for a daemon that ended, follow anew from `cursor`: nothing is missed or told twice.
    """

    def __init__(self, path: Path, since: str, *, layers: Iterable[str], timeout: float, silence: float) -> None:
        self._stream = Stream(path, since, layers)
        self._path, self._silence = path, silence
        with protocol.talking(path, timeout=timeout):
            self._connection = connect(path, timeout)
        try:
            with protocol.talking(path, timeout=timeout):
                self._connection.settimeout(timeout)
                self._connection.sendall(self._stream.request)
                while not self._stream.has_begun:
                    self._stream.feed(self._connection.recv(_CHUNK_BYTES))
        except BaseException:
            self._connection.close()
            raise

    @property
    def cursor(self) -> str:
        """Where to go on behind all that was given, also past records that were not asked for."""
        return self._stream.cursor

    @property
    def fresh(self) -> bool:
        """Whether records behind the cursor that was asked for are not kept any more: look at everything."""
        return self._stream.fresh

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Followed:
        """Waits for the next record. Raises DaemonUnreachableError and WatchdError."""
        while (found := self._stream.next()) is None:
            self._stream.feed(self._receive())
        return found

    def _receive(self) -> bytes:
        self._connection.settimeout(self._silence)
        try:
            with protocol.talking(self._path, timeout=self._silence):
                return self._connection.recv(_CHUNK_BYTES)
        except DeadlineError:
            raise protocol.silent(self._path, self._silence) from None

    def close(self) -> None:
        """Ends it."""
        self._connection.close()

    def __exit__(self, *_exception: object) -> None:
        self.close()
