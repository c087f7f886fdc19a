"""What whoever opens the journal must know, carried along entry by entry.

The writer keeps it to begin each segment with, recovery gets it back from the last segment. Both apply the same
rules.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from watchd.journal.format import LOST_REASON, Checkpoint, Entry, LayerMark
from watchd.records import Change, Desync, Resync, Stop


class JournalState:
    """The layers' marks after all entries that were applied."""

    def __init__(self, checkpoint: Checkpoint | None = None) -> None:
        self._layers: dict[str, LayerMark] = {}
        self._last_time_ns = 0
        self._stopped = False
        self._every_layer = 0
        self.last_lost = 0
        """The last number that damage has taken the record of; no scan finds out what that was. 0 if there is none."""
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
            self._desync(entry.layer, seq)
            if not entry.layer and entry.reason == LOST_REASON:
                self.last_lost = seq
        elif isinstance(entry, Resync) and entry.closes >= self._mark(entry.layer, seq).open_desync:
            self._set_open_desync(entry.layer, 0, seq)

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

    def is_fresh(self, since: int, layers: Collection[str] = ()) -> bool:
        """Whether changes behind the number `since` may be missing of any of `layers`, or when it is empty of any layer
        that is known."""
        if self.last_lost > since:
            return True
        if layers:
            return any(self._misses(name, since) for name in layers)
        opened = [mark.open_desync for mark in self._layers.values()]
        return any(opened) if opened else bool(self._every_layer)

    def _misses(self, layer: str, since: int) -> bool:
        """Whether changes of a layer may be missing: all that happened before a source heard of it are."""
        mark = self._layers.get(layer)
        return mark is None or bool(mark.open_desync) or 0 < mark.since_seq >= since

    def checkpoint(self) -> Checkpoint:
        """The state as a note."""
        return Checkpoint(dict(self._layers), self._last_time_ns, self._stopped, self._every_layer, self.last_lost)

    def _load(self, checkpoint: Checkpoint) -> None:
        self._layers = dict(checkpoint.layers)
        self._last_time_ns = checkpoint.last_time_ns
        self._stopped = checkpoint.stopped
        # Whoever notes the marks of its layers does not know of these, so they are never taken back.
        self._every_layer = max(self._every_layer, checkpoint.every_layer)
        self.last_lost = max(self.last_lost, checkpoint.lost)

    def _desync(self, layer: str, seq: int) -> None:
        """Opens the layer's gap, with "" that of all layers, of those that are not known yet too."""
        if layer:
            self._set_open_desync(layer, seq, seq)
            return
        self._every_layer = seq
        for name in self._layers:
            self._set_open_desync(name, seq, seq)

    def _mark(self, layer: str, seq: int) -> LayerMark:
        """The layer's mark; of one that nothing is known of when the record with the number `seq` tells of it, nothing is
        known of before."""
        return self._layers.get(layer) or LayerMark(b"", 0, self._every_layer, seq)

    def _set_open_desync(self, layer: str, open_desync: int, seq: int) -> None:
        self._layers[layer] = msgspec.structs.replace(self._mark(layer, seq), open_desync=open_desync)
