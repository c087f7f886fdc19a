"""What events have told of a layer since a scan of it began, so that the scan does not tell it again."""

from __future__ import annotations

from collections.abc import Iterator

from watchd.records import Change, Kind
from watchd.wire.listing import state_of

TOLD_MAX = 20_000
"""Names remembered, about 6 MB. At the bound they are forgotten: then some changes are told twice, which does no harm."""

CHAIN_MAX = 8

_GONE = b""
_RENAME = int(Kind.RENAME)


class Told:
    """Lives in the thread of the layer's source."""

    def __init__(self, *, limit: int = TOLD_MAX) -> None:
        """`limit`: of the names remembered; 0 for whoever asks for `directory_renamed` only."""
        self._limit = limit
        self.states: dict[bytes, bytes] = {}
        """Path -> state as an event found it."""
        self.recent: set[bytes] = set()
        """The paths told of since somebody cleared it."""
        self.directory_renamed = False
        self._origins: dict[bytes, bytes] = {}

    def add(self, change: Change) -> None:
        """A change was found by an event."""
        is_rename = change.is_dir and change.kinds & _RENAME
        self.directory_renamed = self.directory_renamed or bool(is_rename)
        if not self._limit:
            return
        if len(self.states) >= self._limit:
            self.states.clear()
            self._origins.clear()
            self.recent.clear()
        path = change.path
        self.states[path] = state_of(change) if change.exists else _GONE
        self.recent.add(path)
        if is_rename and change.from_path is not None:
            self._origins[path] = change.from_path

    def is_gone(self, path: bytes) -> bool:
        """Whether the last that was told of a name is that it is gone."""
        return self.states.get(path) == _GONE

    def origins_of(self, path: bytes) -> Iterator[bytes]:
        """Where a renamed directory came from, and where that had come from."""
        for _ in range(CHAIN_MAX):
            origin = self._origins.get(path)
            if origin is None:
                return
            yield origin
            path = origin
