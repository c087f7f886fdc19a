"""What whoever opens the journal must know, carried along entry by entry.

The writer keeps it to begin each segment with, recovery gets it back from the last segment. Both apply the same
rules.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from watchd.journal.format import Checkpoint, Entry, LayerMark
from watchd.records import Change, Desync, Resync, Stop


class JournalState:
    """The layers' marks after all entries that were applied."""

    def __init__(self, checkpoint: Checkpoint | None = None) -> None:
        self._layers: dict[str, LayerMark] = {}
        self._last_time_ns = 0
        self._stopped = False
        if checkpoint:
            self._load(checkpoint)

    def apply(self, entry: Entry, seq: int) -> None:
        """Takes `entry` into account; `seq` is its sequence number, for a note that of the record before it."""
        if isinstance(entry, Checkpoint):
            self._load(entry)
            return
        self._last_time_ns = entry.time_ns
        self._stopped = isinstance(entry, Stop)
        if isinstance(entry, Desync):
            self._set_open_desync(entry.layer, seq)
        elif isinstance(entry, Resync) and entry.closes >= self._mark(entry.layer).open_desync:
            self._set_open_desync(entry.layer, 0)

    def apply_all(self, entries: Sequence[Entry], last_seq: int) -> int:
        """Applies entries whose first record has the number `last_seq + 1`; returns the number of the last one."""
        seq = last_seq
        for entry in entries:
            if type(entry) is Change:
                seq += 1
                continue
            if not isinstance(entry, Checkpoint):
                seq += 1
            self.apply(entry, seq)
        if entries and isinstance(last := entries[-1], Change):
            self.apply(last, seq)
        return seq

    def is_open(self, layers: Collection[str] = ()) -> bool:
        """Whether changes of any of `layers`, or of any layer when it is empty, may be missing."""
        names = {"", *layers} if layers else self._layers
        return any(self._mark(name).open_desync for name in names)

    def checkpoint(self) -> Checkpoint:
        """The state as a note."""
        return Checkpoint(dict(self._layers), self._last_time_ns, self._stopped)

    def _load(self, checkpoint: Checkpoint) -> None:
        self._layers = dict(checkpoint.layers)
        self._last_time_ns = checkpoint.last_time_ns
        self._stopped = checkpoint.stopped

    def _mark(self, layer: str) -> LayerMark:
        return self._layers.get(layer) or LayerMark(b"")

    def _set_open_desync(self, layer: str, seq: int) -> None:
        self._layers[layer] = msgspec.structs.replace(self._mark(layer), open_desync=seq)
