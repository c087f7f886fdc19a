"""A layer that is watched, as the service knows it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from watchd.kernel.files import FileHandle
from watchd.overlay.model import LayerDirectory
from watchd.service.patience import Waiting
from watchd.sources.base import WatchedLayer
from watchd.sources.worker import Worker

STUCK_S = 2.0
"""What takes so long is said to be waited for."""

Key = tuple[int, int, FileHandle | None]


@dataclass(eq=False)
class Layer:
    """A lower layer. Owned by the event loop."""

    name: str
    directory: LayerDirectory
    watched: WatchedLayer
    backend: str
    """What was asked for; `worker.source.backend` is what was got."""
    devices: set[str] = field(default_factory=set)
    """The mounts that it is a lower of."""
    data_of: set[str] = field(default_factory=set)
    """The mounts that it is a data-only layer of."""
    configured: bool = False
    worker: Worker | None = None
    state: str = "scanning"
    reason: str = ""
    complete_ns: int = 0
    desync_seq: int = 0
    since_seq: int = 0
    """See `watchd.journal.format.LayerMark`."""
    scan_again: bool = False
    by_times: bool = False
    """The next scan goes by times, for what is known of the layer could not be read."""
    differences: int = 0
    retry_at: float = 0.0
    watching: asyncio.Task[None] | None = None
    """The attempt to have a source watch it, while it lasts."""
    asked_at: float = 0.0
    """When that began; CLOCK_MONOTONIC, seconds."""
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while nothing is missing that could be had: live or failed."""
    arrivals: set[asyncio.Future[None]] = field(default_factory=set)
    """Directories that came in with contents, until all in them was told or nobody is left to tell it."""

    def become(self, state: str, reason: str = "") -> None:
        """Change the state."""
        self.state, self.reason = state, reason
        if state in ("live", "failed"):
            self.settled.set()
        else:
            self.settled.clear()

    def lose_worker(self) -> None:
        """No source watches it any more."""
        self.worker = None
        while self.arrivals:
            self.arrivals.pop().set_result(None)

    def waiting(self, *, longer_than_s: float = STUCK_S) -> Waiting | None:
        """Since when its filesystem gives no answer."""
        since = self.asked_at if self.watching is not None else 0.0 if self.worker is None else self.worker.busy_since
        return Waiting(since) if since and time.monotonic() - since >= longer_than_s else None


def key_of(directory: LayerDirectory) -> Key:
    """What makes a layer the same layer."""
    return directory.device, directory.inode, directory.handle
