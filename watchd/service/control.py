"""The control socket: one JSON line in, one JSON line out, or several for a verb that streams.

Facts: the kernel checks write permission on the socket file at connect(2), so mode and group of the file decide who may ask at
all (unix(7)); SO_PEERCRED tells who asks, as of connect, and cannot be forged.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NewType

from watchd.config.schema import SOCKET_NAME, Control
from watchd.errors import (
    ConfigError,
    DeadlineError,
    JournalError,
    LayerError,
    MountError,
    NotPermittedError,
    UsageError,
    WatchdError,
)

log = logging.getLogger(__name__)

REQUEST_MAX_BYTES = 1 << 20
REQUEST_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 1.0
CONNECTIONS_MAX = 128

_KINDS: tuple[tuple[type[WatchdError], str], ...] = (
    (UsageError, "usage"),
    (ConfigError, "config"),
    (NotPermittedError, "permission"),
    (DeadlineError, "deadline"),
    (MountError, "mount"),
    (LayerError, "mount"),
    (JournalError, "journal"),
)
_ucred = struct.Struct("=iII")

Encoded = NewType("Encoded", bytes)
"""A result that is JSON already, in one line of ASCII or UTF-8."""

Verb = Callable[[Mapping[str, Any]], Awaitable[Any]]
Stream = Callable[[Mapping[str, Any]], AsyncGenerator[bytes, None]]
"""A verb that gives whole lines, as they are to be sent and without their end."""


class ControlServer:
    """Answers requests on `<runtime_directory>/watchd.sock`."""

    def __init__(
        self,
        runtime_directory: Path,
        verbs: Mapping[str, Verb],
        *,
        root_only: frozenset[str],
        streams: Mapping[str, Stream] | None = None,
    ) -> None:
        """`root_only`: verbs that change something, for root and the daemon's own user only."""
        self._path = runtime_directory / SOCKET_NAME
        self._verbs, self._streams, self._root_only = verbs, streams or {}, root_only
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, settings: Control) -> None:
        """Listen. Raises NotPermittedError, OSError."""
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(self._path.lstat().st_mode):
                raise UsageError(f"{self._path} is in the way", remedy="remove it, it is no socket")
            self._path.unlink()  # ours alone: the lock of the runtime directory is held
        before = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, self._path, limit=REQUEST_MAX_BYTES)
        finally:
            os.umask(before)
        self.permit(settings)

    def permit(self, settings: Control) -> None:
        """Who may ask, by mode and group of the socket. Raises ConfigError for a group that does not exist."""
        try:
            group = grp.getgrnam(settings.group).gr_gid
        except KeyError:
            raise ConfigError(f"control.group: there is no group {settings.group!r}", remedy="create it") from None
        os.chown(self._path, -1, group)
        os.chmod(self._path, int(settings.mode))

    async def close(self) -> None:
        """Stop answering."""
        if self._server is None:
            return
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):  # for those who do not take their answer
                await self._server.wait_closed()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if len(self._tasks) <= CONNECTIONS_MAX:
                async with contextlib.aclosing(self._answer(reader, writer)) as lines:
                    async for line in lines:
                        writer.write(line + b"\n")
                        await writer.drain()  # what a peer does not take is not made
        except OSError:
            pass  # the peer is gone
        except asyncio.CancelledError:
            # We are. From Python 3.12 on the server waits for what was written to be taken, which may be never.
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> AsyncGenerator[bytes, None]:
        """The lines of the answer."""
        try:
            verb, request = _parse(await _read_request(reader))
            self._check_peer(verb, writer.get_extra_info("socket"))
            if stream := self._streams.get(verb):
                async with contextlib.aclosing(stream(request)) as lines:
                    async for line in lines:
                        yield line
            elif known := self._verbs.get(verb):
                yield _success(await known(request))
            else:
                raise UsageError(f"unknown verb {verb!r}", remedy="use the watchd command of the same version")
        except WatchdError as error:
            kind = next((kind for cls, kind in _KINDS if isinstance(error, cls)), "internal")
            yield _failure(str(error), kind)
        except OSError as error:
            yield _failure(f"{error.filename or 'internal error'}: {error.strerror}", "internal")
        except Exception as error:
            log.exception("a request failed")
            yield _failure(f"internal error, please report it: {error!r}", "internal")

    def _check_peer(self, verb: str, peer: socket.socket) -> None:
        _, uid, _ = _ucred.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _ucred.size))
        if verb in self._root_only and uid not in (0, os.geteuid()):
            raise NotPermittedError(f"{verb} is for root only, not for uid {uid}", remedy="run it as root")


async def _read_request(reader: asyncio.StreamReader) -> bytes:
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            return await reader.readline()
    except TimeoutError:
        raise UsageError("bad request: it did not arrive in time") from None
    except ValueError as error:
        raise UsageError(f"bad request: {error}") from None


def _parse(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"bad request: {error}") from None
    if not isinstance(request, dict):
        raise UsageError("bad request: not an object")
    verb = request.pop("verb", None)
    if not isinstance(verb, str):
        raise UsageError(f"unknown verb {verb!r}", remedy="use the watchd command of the same version")
    return verb, request


def _success(result: Any) -> bytes:
    if isinstance(result, bytes):  # Encoded
        return b'{"ok": true, "result": %b}' % result
    return _encode({"ok": True, "result": result})


def _failure(message: str, kind: str) -> bytes:
    return _encode({"ok": False, "error": message.replace("\n", " "), "kind": kind})


def _encode(answer: Any) -> bytes:
    return json.dumps(answer).encode("ascii")  # escapes keep names that are not UTF-8 as surrogates, both ways
