"""What travels over the control socket, without the socket: requests to bytes, bytes to answers.

The protocol: one request a connection. The client sends one line of JSON, `{"verb": "...", ...arguments}`; the daemon
answers with one line, `{"ok": true, "result": {...}}` or `{"ok": false, "error": "one line", "kind": "..."}`, and closes.

`follow` goes on behind its first line, with as many of these as come, and the connection stays:

    {"cursor": "EPOCH:SEQ", "records": [...]}   records in order, as `watchd log --json` has them; up to the cursor there
                                                are no others that were asked for. None at all now and then, as a sign of life
    {"end": "why"}                              the last line of a daemon that stops
    {"ok": false, ...}                          the last line of one that cannot go on

Names that are not UTF-8 travel in a request as `os.fsdecode` gives them, a lone surrogate for each byte, which JSON can
escape; in an answer as `path_b64` beside a lossy `path`, or, in `lowerdir`, `upperdir` and `workdir`, like in a request.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


def encode(verb: str, arguments: Mapping[str, Any]) -> bytes:
    """The request for `verb`; `arguments` are values of JSON."""
    return json.dumps({**arguments, "verb": verb}).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The result in the first line of an answer. Raises what ERROR_KINDS names when the daemon refuses."""
    with understanding():
        answer = json.loads(line)
        if answer["ok"] is True and isinstance(answer["result"], dict):
            return dict(answer["result"])
        refusal = _refusal(answer)
    raise refusal


def decode_more(line: bytes) -> dict[str, Any]:
    """A later line of a stream. Raises DaemonUnreachableError for the last one, and the daemon's refusal."""
    with understanding():
        more = json.loads(line)
        if "cursor" in more:
            return dict(more)
        last = unreachable(f"the daemon ended: {more['end']}") if "end" in more else _refusal(more)
    raise last


def _refusal(answer: Mapping[str, Any]) -> WatchdError:
    return ERROR_KINDS.get(answer["kind"], WatchdError)(str(answer["error"]))


class Lines:
    """Puts lines together from what a stream gives."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes. Raises WatchdError when one grows without end."""
        *ends, rest = data.split(b"\n")
        lines = []
        for end in ends:
            lines.append(b"".join([*self._parts, end]))
            self._parts, self._size = [], 0
        if rest:
            self._parts.append(rest)
            self._size += len(rest)
        if self._size > ANSWER_LIMIT_BYTES:
            raise WatchdError(
                f"the daemon's answer is larger than {ANSWER_LIMIT_BYTES >> 20} MiB", remedy="ask for less at once"
            )
        return lines


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def understanding() -> Iterator[None]:
    """Makes one clear error of an answer that is none."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        remedy = "restart it if it is of another version"
        raise WatchdError("the daemon's answer cannot be understood", remedy=remedy) from None


@contextlib.contextmanager
def talking(path: Path, *, timeout: float) -> Iterator[None]:
    """Makes the errors for people of those of the socket `path`; `timeout` (seconds) is what was waited for."""
    try:
        yield
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        raise unreachable(f"no daemon answers on {path}") from None
    except (BrokenPipeError, ConnectionResetError):
        raise went_away(path) from None
    except (TimeoutError, BlockingIOError):
        raise DeadlineError(f"the daemon on {path} did not answer within {timeout:g} s") from None
    except PermissionError:
        remedy = "run as root or as a member of the socket's group (control.group)"
        raise NotPermittedError(f"{path} may not be used", remedy=remedy) from None


def went_away(path: Path) -> DaemonUnreachableError:
    """The daemon closed the connection too early."""
    return unreachable(f"the daemon on {path} went away before it answered")


def silent(path: Path, silence: float) -> DaemonUnreachableError:
    """The daemon does not even say that it lives."""
    return unreachable(f"the daemon on {path} gave no sign of life for {silence:g} s")


def unreachable(message: str) -> DaemonUnreachableError:
    """No daemon, and what to do about it."""
    return DaemonUnreachableError(message, remedy="start it with `systemctl start watchd` or `watchd run`")
