"""What consumers of the journal ask for over the control socket: changes, named cursors, and following.

Whoever follows is read to from the journal's files, in threads, at the pace at which it takes what it gets: nothing is kept
for it in memory but one piece of the journal. It gets no record before the commit that made it durable.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from watchd.errors import JournalError, UsageError
from watchd.journal.changes import JOURNAL, collect
from watchd.journal.cursors import DIRECTORY, Cursor, Cursors, resolve
from watchd.journal.reader import Extent, Follower
from watchd.journal.render import changes_to_json, to_json
from watchd.journal.segments import VERIFY
from watchd.journal.writer import Journal
from watchd.service.control import Encoded
from watchd.service.patience import in_thread

FOLLOWERS_MAX = 32
"""Connections that follow at once; each has one descriptor of the journal and one piece of it in memory."""

CHANGES_AT_ONCE = 2
"""Questions of what changed that are worked on at once; more wait."""

CHANGES_MAX_BYTES = 128 << 20
"""A larger answer is refused."""

HEARTBEAT_S = 5.0
"""Whoever follows hears something at least so often, and we find out that it is gone."""

END_S = 1.0
"""So long followers have to take their last line when the daemon stops."""

_to_line = msgspec.json.Encoder().encode


class Consumers:
    """Answers them. Belongs to the event loop."""

    def __init__(self, journal: Journal, state_directory: Path) -> None:
        self._journal = journal
        self._state_directory = state_directory
        self._cursors = Cursors(state_directory / DIRECTORY)
        self._working = asyncio.Semaphore(CHANGES_AT_ONCE)
        self._news = asyncio.Event()
        """Set for a moment when there are new durable records, or the end has come."""
        self._ending = False
        self._unfollowed = asyncio.Event()
        self._unfollowed.set()
        self.readings: set[Reading] = set()
        """The places of all that follow."""

    def committed(self) -> None:
        """To be called when records have become durable."""
        self._news.set()
        self._news.clear()

    async def close(self) -> None:
        """End all following; who does not take its last line is left to be cut off."""
        self._ending = True
        self.committed()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await self._unfollowed.wait()

    # ---- questions --------------------------------------------------------------------------------------------------

    async def changes(self, request: Mapping[str, Any]) -> Encoded:
        """The verb `changes`. Raises UsageError, JournalError."""
        since = _word(request, "changes", "since")
        question = partial(
            collect,
            self._state_directory,
            since,
            layers=frozenset(_layers(request, "changes")),
            prefix=_prefix(request),
            dirs=_choice(request, "changes", "dirs"),
            ancestors=_choice(request, "changes", "ancestors"),
        )
        async with self._working:
            return await in_thread(lambda: _encoded(changes_to_json(question())), name="changes")

    async def cursors(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The verb `cursors`. Raises JournalError."""
        named = await in_thread(self._cursors.all, name="cursors")
        return {"cursors": [{"name": name, "cursor": str(cursor)} for name, cursor in named.items()]}

    async def set_cursor(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The verb `cursor_set`. Raises UsageError, JournalError."""
        name, wanted = _word(request, "cursor_set", "name"), _word(request, "cursor_set", "cursor", default="now")
        there = self._extent()

        def set_it() -> Cursor:
            cursor = Cursor(there.epoch, resolve(wanted, there, self._cursors))
            self._cursors.set(name, cursor)
            return cursor

        return {"name": name, "cursor": str(await in_thread(set_it, name="cursors"))}

    async def delete_cursor(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The verb `cursor_delete`. Raises UsageError, JournalError."""
        name = _word(request, "cursor_delete", "name")
        await in_thread(partial(self._cursors.delete, name), name="cursors")
        return {"name": name}

    # ---- following --------------------------------------------------------------------------------------------------

    async def follow(self, request: Mapping[str, Any]) -> AsyncGenerator[bytes, None]:
        """The verb `follow`: its lines, until the daemon ends. Raises UsageError, JournalError."""
        since, layers = _word(request, "follow", "since", default="now"), frozenset(_layers(request, "follow"))
        if len(self.readings) >= FOLLOWERS_MAX:
            raise UsageError(
                f"{FOLLOWERS_MAX} connections follow already", remedy="end one of them, or ask for changes"
            )
        reading = Reading(self._state_directory / JOURNAL, layers)
        self.readings.add(reading)
        self._unfollowed.clear()
        try:
            first = await in_thread(partial(reading.begin, since, self._extent(), self._cursors), name="follow")
            yield _line({"ok": True, "result": first})
            async for line in self._lines(reading):
                yield line
            yield _line({"end": "it was told to stop"})
        finally:
            self.readings.discard(reading)
            if not self.readings:
                self._unfollowed.set()
            # In a thread too, for one that was called off may be in the middle of reading.
            threading.Thread(target=reading.close, name="follow", daemon=True).start()

    async def _lines(self, reading: Reading) -> AsyncGenerator[bytes, None]:
        while not self._ending:
            if self._journal.epoch != reading.epoch:
                raise JournalError("the journal was begun anew", remedy="look at everything once, and go on from now")
            if self._journal.durable_seq > reading.seq:
                yield await in_thread(partial(reading.next_line, self._journal.durable_seq), name="follow")
                continue
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._news.wait()
            except TimeoutError:
                yield reading.heartbeat()

    def _extent(self) -> Extent:
        """What of the journal is durable."""
        return Extent(self._journal.epoch, self._journal.first_seq, self._journal.durable_seq)


class Reading:
    """One follower's place in the journal. Its methods but `heartbeat` block, and are called in threads."""

    def __init__(self, directory: Path, layers: frozenset[str]) -> None:
        self._directory, self._layers = directory, layers
        self._lock = threading.Lock()
        self._follower: Follower | None = None
        self._closed = False
        self.epoch = ""
        self.seq = 0
        """Everything up to here was read."""

    def begin(self, since: str, there: Extent, cursors: Cursors) -> dict[str, Any]:
        """Find the place; what the first line says. Raises UsageError, JournalError."""
        with self._lock:
            seq = resolve(since, there, cursors)
            fresh = seq + 1 < there.first_seq
            self.epoch, self.seq = there.epoch, max(seq, there.first_seq - 1)
            if not self._closed:
                self._follower = Follower(self._directory, self.seq)
            return {"cursor": self._cursor(), "fresh": fresh}

    def next_line(self, upto: int) -> bytes:
        """What comes next, up to a record that is durable; no records if none was asked for. Raises JournalError."""
        with self._lock:
            if self._follower is None or self._closed:
                return self.heartbeat()
            records = self._follower.poll(upto=upto)
            self.seq = self._follower.position.seq
            if not records and self.seq < upto:
                raise JournalError(f"{self._directory} lacks the records behind {self.seq}", remedy=VERIFY)
            return self._line([to_json(seq, record) for seq, record in records if self._wants(record.layer)])

    def heartbeat(self) -> bytes:
        """A line without records."""
        return self._line([])

    def close(self) -> None:
        """Let go of the journal."""
        with self._lock:
            self._closed = True
            if self._follower is not None:
                self._follower.close()

    def _wants(self, layer: str) -> bool:
        return not self._layers or layer in self._layers

    def _line(self, records: list[dict[str, Any]]) -> bytes:
        return _to_line({"cursor": self._cursor(), "records": records})

    def _cursor(self) -> str:
        return f"{self.epoch}:{self.seq}"


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode("ascii")


def _encoded(answer: dict[str, Any]) -> Encoded:
    encoded = _to_line(answer)
    if len(encoded) > CHANGES_MAX_BYTES:
        raise UsageError(
            f"the answer is larger than {CHANGES_MAX_BYTES >> 20} MiB",
            remedy="ask for the directories only, for a prefix or a layer, or run `watchd changes`",
        )
    return Encoded(encoded)


# ---- arguments ------------------------------------------------------------------------------------------------------


def _word(request: Mapping[str, Any], verb: str, key: str, *, default: str | None = None) -> str:
    value = request.get(key, default)
    if not isinstance(value, str):
        raise UsageError(f"{verb}: `{key}` must be a string")
    return value


def _prefix(request: Mapping[str, Any]) -> bytes | None:
    if request.get("prefix") is None:
        return None
    try:
        return _word(request, "changes", "prefix").encode("utf-8", "surrogateescape").strip(b"/")
    except UnicodeEncodeError as error:
        raise UsageError(f"changes: `prefix` is no path: {error}") from None


def _layers(request: Mapping[str, Any], verb: str) -> list[str]:
    value = request.get("layers", [])
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UsageError(f"{verb}: `layers` must be a list of strings")
    return value


def _choice(request: Mapping[str, Any], verb: str, key: str) -> bool:
    value = request.get(key, False)
    if not isinstance(value, bool):
        raise UsageError(f"{verb}: `{key}` must be true or false")
    return value
