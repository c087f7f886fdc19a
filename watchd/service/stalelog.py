"""Say in the log what is stale and who holds it: once for each change of that, not for each round that finds it so."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Collection

from watchd.coherence.engine import MountState
from watchd.coherence.pins import Holder
from watchd.coherence.view import Stale
from watchd.config.tree import shown

log = logging.getLogger(__name__)

SETTLE_S = 0.5
"""What is stale is often right a moment later, and its holders are not looked for in every round."""

NAMES_MAX = 5
HOLDERS_MAX = 3
"""What one line of the log names; the rest is counted. `watchd status` has them all."""


class StaleLog:
    """What was said of each mount last. Owned by the event loop."""

    def __init__(self, state_of: Callable[[str], MountState | None]) -> None:
        self._state_of = state_of
        self._said: dict[str, str] = {}
        """Of mounts of which something was stale when it was said."""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._loop = asyncio.get_running_loop()

    def round(self, device: str, *, stale: int) -> None:
        """A round on a mount ended, with so many stale names."""
        if (stale or device in self._said) and device not in self._timers:
            self._timers[device] = self._loop.call_later(SETTLE_S, self._say, device)

    def keep(self, devices: Collection[str]) -> None:
        """Only these mounts are there still."""
        for device in self._said.keys() - {*devices}:
            del self._said[device]

    def close(self) -> None:
        """Say nothing more."""
        for timer in self._timers.values():
            timer.cancel()

    def _say(self, device: str) -> None:
        del self._timers[device]
        state = self._state_of(device)
        words = sentence(state.stale) if state and state.stale else ""
        if words == self._said.get(device, ""):
            return
        if words:
            self._said[device] = words
            log.warning("%s: %s", device, words)
        else:
            del self._said[device]
            log.info("%s: nothing is stale any more", device)


def sentence(stale: Collection[Stale]) -> str:
    """What is stale, on one line of bounded length."""
    first = sorted(stale, key=lambda entry: entry.path)[:NAMES_MAX]
    more = f"; and {len(stale) - len(first)} more" if len(stale) > len(first) else ""
    count = "1 name is stale" if len(stale) == 1 else f"{len(stale)} names are stale"
    return f"{count}: {'; '.join(map(_entry, first))}{more}"


def _entry(entry: Stale) -> str:
    why = f" ({shown(entry.reason)})" if entry.reason else ""
    return f"{shown(os.fsdecode(entry.path)) or '/'} {entry.kind}{_held_by(entry.pinned_by)}{why}"


def _held_by(holders: Collection[Holder]) -> str:
    first = [f"{holder.pid} ({shown(holder.command)}, {holder.how})" for holder in list(holders)[:HOLDERS_MAX]]
    more = f" and {len(holders) - len(first)} more" if len(holders) > len(first) else ""
    return f", held by {', '.join(first)}{more}" if first else ""
