"""What can be asked of the daemon: for each verb its arguments and the type of its answer. Pure, and shared by both clients."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from watchd.client import protocol, values
from watchd.client.values import ChangedDirectories, Changes, Cursor, Followed, Mount, Status
from watchd.errors import WatchdError

SYNC_MARGIN_S = 5.0
"""The daemon keeps the deadline of sync; so much later it is the daemon that is late."""

T_co = TypeVar("T_co", covariant=True)


class Call(msgspec.Struct, Generic[T_co], frozen=True):
    """A request, and what becomes of its answer."""

    verb: str
    arguments: Mapping[str, Any]
    read: Callable[[Mapping[str, Any]], T_co]
    timeout: float | None = None
    """Seconds; None for the client's own."""


def status() -> Call[Status]:
    """See `Client.status`."""
    return Call("status", {}, lambda result: values.convert(result, Status))


def sync(mounts: Iterable[str | bytes], timeout: float) -> Call[tuple[Mount, ...]]:
    """See `Client.sync`."""
    arguments = {"mounts": [os.fsdecode(one) for one in mounts], "timeout": timeout}
    return Call("sync", arguments, lambda result: values.convert(result, _Mounts).mounts, timeout + SYNC_MARGIN_S)


def changes(since: str, layers: Iterable[str], prefix: bytes | None) -> Call[Changes]:
    """See `Client.changes`."""
    return Call("changes", _changes(since, layers, prefix), lambda result: values.convert(result, Changes))


def changed_directories(
    since: str, layers: Iterable[str], prefix: bytes | None, ancestors: bool
) -> Call[ChangedDirectories]:
    """See `Client.changed_directories`."""
    arguments = {**_changes(since, layers, prefix), "dirs": True, "ancestors": ancestors}
    return Call("changes", arguments, lambda result: values.convert(result, ChangedDirectories))


def _changes(since: str, layers: Iterable[str], prefix: bytes | None) -> dict[str, Any]:
    return {
        "since": since,
        "layers": list(layers),
        **({"prefix": os.fsdecode(prefix)} if prefix is not None else {}),
    }


def cursors() -> Call[tuple[Cursor, ...]]:
    """See `Client.cursors`."""
    return Call("cursors", {}, lambda result: values.convert(result, _Cursors).cursors)


def set_cursor(name: str, cursor: str) -> Call[str]:
    """See `Client.set_cursor`."""
    return Call("cursor_set", {"name": name, "cursor": cursor}, lambda result: values.convert(result, Cursor).cursor)


def delete_cursor(name: str) -> Call[None]:
    """See `Client.delete_cursor`."""
    return Call("cursor_delete", {"name": name}, lambda result: None)


class _Mounts(msgspec.Struct):
    mounts: tuple[Mount, ...]


class _Cursors(msgspec.Struct):
    cursors: tuple[Cursor, ...]


class Stream:
    """What comes from `follow`: bytes in, records out."""

    def __init__(self, path: Path, since: str, layers: Iterable[str]) -> None:
        self.request = protocol.encode("follow", {"since": since, "layers": list(layers)})
        self.cursor = ""
        """Where to go on behind what `next` has given."""
        self.fresh = False
        self.has_begun = False
        self._path = path
        self._lines = protocol.Lines()
        self._end: WatchdError | None = None
        self._batches: deque[tuple[str, deque[Followed]]] = deque()

    def feed(self, data: bytes) -> None:
        """Take in what was received; nothing means that the daemon closed. Raises WatchdError if it did not even begin."""
        try:
            if not data:
                raise protocol.went_away(self._path)
            for line in self._lines.feed(data):
                if self.has_begun:
                    self._take(line)
                else:
                    self._begin(line)
        except WatchdError as error:
            if not self.has_begun:
                raise
            self._end = error

    def next(self) -> Followed | None:
        """The next record, None when there is none yet. Raises what ended the stream, once all before it was given."""
        while self._batches:
            cursor, batch = self._batches[0]
            if batch:
                found = batch.popleft()
                self.cursor = found.cursor
                return found
            self.cursor = cursor
            self._batches.popleft()
        if self._end is not None:
            raise self._end
        return None

    def _begin(self, line: bytes) -> None:
        result = protocol.decode(line)
        with protocol.understanding():
            self.cursor, self.fresh = str(result["cursor"]), bool(result["fresh"])
        self.has_begun = True

    def _take(self, line: bytes) -> None:
        more = protocol.decode_more(line)
        with protocol.understanding():
            cursor = str(more["cursor"])
            epoch = cursor.partition(":")[0]
            numbered = [found for value in more["records"] if (found := values.record_of(value)) is not None]
        self._batches.append((cursor, deque(Followed(f"{epoch}:{seq}", record) for seq, record in numbered)))
