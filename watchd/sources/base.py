"""What every source of changes is, and the values it gives.

A source belongs to one worker thread (`watchd.sources.worker`): all its methods are called there and may block on the
filesystem that it watches. It keeps nothing open on that filesystem while it is idle, so that umount works.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from watchd.kernel.files import FileHandle
from watchd.records import Change


@dataclass(frozen=True)
class WatchedLayer:
    """A lower layer as the sources see it."""

    name: str
    path: bytes
    device: int
    """st_dev of the layer's root directory."""
    root: FileHandle | None
    """None where the filesystem has no file handles."""
    open: Callable[[], int] = field(repr=False, compare=False)
    """A detached mount rooted at the layer's directory, as an owned O_PATH descriptor. Raises LayerError."""
    open_mount: Callable[[], int] = field(repr=False, compare=False)
    """The same, rooted at the root of the mount that the layer's directory lies in."""


@dataclass(frozen=True)
class MovedIn:
    """A directory that appeared with contents that no event told of."""

    layer: str
    path: bytes


class Ledger:
    """Told of each reading of a queue that may outlive the process; nobody wants to know of the others."""

    def read(self, descriptor: int, size: int) -> bytes:
        """read(2). What was read can be had again until all that comes of it was recorded. Raises OSError."""
        return os.read(descriptor, size)

    def nothing(self) -> None:
        """Nothing comes of what was read and not told yet."""


Suspects = Mapping[str, Mapping[bytes, int]]
"""Layer name -> path -> `Kind` bits of what happened there."""


@dataclass
class Batch:
    """What one collection of a source's queue amounts to."""

    changes: list[Change]
    """What was looked at; `look`, where there is one, adds the rest."""
    records: dict[str, int]
    """Layer name -> raw events read for it."""
    read_ns: int
    """CLOCK_MONOTONIC when the reading began."""
    complete_ns: int = 0
    """CLOCK_REALTIME: every change older than this is in this or an earlier batch; 0 when the queue was not emptied."""
    barriers: tuple[bytes, ...] = ()
    overflow: bool = False
    moved_in: tuple[MovedIn, ...] = ()
    suspects: Suspects | None = None
    """Known before anything was looked at, so that repair need not wait for that; None: all is in `changes`."""
    linked: set[str] = field(default_factory=set)
    """Layers in which more may be stale than is told: attributes changed of files that have further names, no one knows where,
    or a directory came in that was not heard until now. Complete after `look`."""
    look: Callable[[], list[Change]] | None = None
    """Look at what the suspects and written files are now; to be called once, in the worker's thread."""

    @property
    def is_nothing(self) -> bool:
        """Whether all that was read concerns no layer, so that nobody need be told."""
        return not (self.records or self.changes or self.barriers or self.overflow or self.moved_in or self.linked)


class Source(Protocol):
    """One kernel queue, and what it watches."""

    backend: str

    def fileno(self) -> int:
        """The descriptor that becomes readable when there is something to collect."""

    def collect(self) -> Batch | None:
        """Read what is queued, look at it and return it; None when nothing was queued. Raises OSError: the source is lost."""

    def idle(self) -> None:
        """Nothing is queued: let go of everything that keeps a filesystem busy."""

    def add(self, layer: WatchedLayer) -> None:
        """Watch this layer too. Raises LayerError or UnsupportedError."""

    def remove(self, name: str) -> None:
        """Stop watching the layer of this name."""

    def recover(self) -> None:
        """After an overflow: forget what may have become wrong and watch again what was missed."""

    def close(self) -> None:
        """Give up the queue and all that belongs to it."""
