"""A blocking client for the daemon's control socket.

The protocol: one request a connection. The client sends one line of JSON, `{"verb": "...", ...arguments}`; the daemon
answers with one line, `{"ok": true, "result": {...}}` or `{"ok": false, "error": "one line", "kind": "..."}`, and closes.

Facts about unix sockets that shape this module (unix(7)):

* A missing socket is ENOENT; one whose daemon died is ECONNREFUSED, since the name outlives the process.
* With a full backlog a blocking connect waits, as long as SO_SNDTIMEO allows, and then says EAGAIN; a non-blocking one, which
  is what a timeout makes of a Python socket, says EAGAIN at once. So the connect is a blocking one.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from watchd.config import SOCKET_NAME
from watchd.errors import (
    ConfigError,
    DaemonUnreachableError,
    DeadlineError,
    JournalError,
    MountError,
    NotPermittedError,
    UsageError,
    WatchdError,
)

ANSWER_LIMIT_BYTES = 256 << 20
_CHUNK_BYTES = 1 << 20

ERROR_KINDS: dict[str, type[WatchdError]] = {
    "usage": UsageError,
    "config": ConfigError,
    "permission": NotPermittedError,
    "deadline": DeadlineError,
    "mount": MountError,
    "journal": JournalError,
    "internal": WatchdError,
}
"""What the `kind` of a refusal is raised as."""


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
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            _connect(connection, path, timeout)
            connection.settimeout(_left(deadline))
            connection.sendall(json.dumps({**(arguments or {}), "verb": verb}).encode() + b"\n")
            line = _read_line(connection, deadline)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        raise _unreachable(f"no daemon answers on {path}") from None
    except (BrokenPipeError, ConnectionResetError):
        raise _unreachable(f"the daemon on {path} went away before it answered") from None
    except (TimeoutError, BlockingIOError):
        raise DeadlineError(f"the daemon on {path} did not answer within {timeout:g} s") from None
    except PermissionError:
        remedy = "run as root or as a member of the socket's group (control.group)"
        raise NotPermittedError(f"{path} may not be used", remedy=remedy) from None
    if not line:
        raise _unreachable(f"the daemon on {path} went away before it answered")
    return _result(line)


def _connect(connection: socket.socket, path: Path, timeout: float) -> None:
    timeval = struct.pack("@ll", int(timeout), int(timeout % 1 * 1e6) or 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    connection.connect(str(path))


def _left(deadline: float) -> float:
    """Seconds until then; a socket takes zero for `do not wait`, so there is always a little."""
    return max(deadline - time.monotonic(), 0.001)


def _read_line(connection: socket.socket, deadline: float) -> bytes:
    """The answer up to its newline, or what came before the daemon closed. Raises TimeoutError."""
    answer = bytearray()
    while not answer.endswith(b"\n"):
        if time.monotonic() >= deadline:
            raise TimeoutError
        connection.settimeout(_left(deadline))
        chunk = connection.recv(_CHUNK_BYTES)
        if not chunk:
            break
        answer += chunk
        if len(answer) > ANSWER_LIMIT_BYTES:
            raise WatchdError(
                f"the daemon's answer is larger than {ANSWER_LIMIT_BYTES >> 20} MiB", remedy="name fewer mounts"
            )
    return bytes(answer)


def _result(line: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(line)
        if answer["ok"] is True and isinstance(answer["result"], dict):
            return dict(answer["result"])
        refusal = ERROR_KINDS.get(answer["kind"], WatchdError)(str(answer["error"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        remedy = "restart it if it is of another version"
        raise WatchdError("the daemon's answer cannot be understood", remedy=remedy) from None
    raise refusal


def _unreachable(message: str) -> DaemonUnreachableError:
    return DaemonUnreachableError(message, remedy="start it with `systemctl start watchd` or `watchd run`")
