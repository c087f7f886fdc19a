"""Walk a layer that is new, so that later scans have something to compare with.

Fact: a walk beside renames of directories may miss what is below them: moved from where it has not been to where it has been.
So the walk must be made again if an event tells of such a rename, or if it did not find a directory that it had listed; whoever
asks for it judges by `told.directory_renamed` and `Walked.astray`, once all that was queued when the walk ended was read.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from watchd.errors import LayerError
from watchd.records import Change
from watchd.sources.base import WatchedLayer
from watchd.sources.listing import SLICE_ENTRIES, Budget, joined, pack_state, read_directory
from watchd.sources.walk import Walk
from watchd.wire.listing import Listing, is_directory, pack_numbers

BATCH_BYTES = 1 << 17
BATCH_DIRECTORIES = 500

PAUSE_S = 0.002
"""So long a slice waits for the disk before events are looked after again."""

DRAINS_MAX = 1000

_VANISHED = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE})

Rows = list[tuple[int, Listing]]


@dataclass
class Walked:
    """What a walk found."""

    root: int = 0
    """The number of the root directory's listing."""
    state: bytes = b""
    """Of the root directory."""
    entries: int = 0
    astray: bool = False
    """Something that was listed was not there any more."""
    is_wanted: bool = True
    """Set to false by whoever does not need it any more, in any thread."""


class Keeper:
    """Where listings go. All of it is called in the thread of the layer's source."""

    def __init__(
        self, *, numbers: Callable[[int], range], store: Callable[[Rows], None], is_busy: Callable[[], bool]
    ) -> None:
        """`numbers` gives so many for listings, `store` takes listings and does not wait, `is_busy` asks for a pause."""
        self.numbers, self.store, self.is_busy = numbers, store, is_busy


def walk_through(
    layer: WatchedLayer,
    keeper: Keeper,
    walked: Walked,
    *,
    queued: Callable[[], int],
    slice_entries: int = SLICE_ENTRIES,
) -> Generator[list[Change], None, None]:
    """Hand every directory of the layer to `keeper`, and what was found to `walked`.

    Gives empty lists, after every slice, and until what was queued (`queued` bytes) when the walk ended was read. Raises
    LayerError if the layer's root is gone or cannot be read.
    """
    root = layer.open()
    try:
        yield from _walk(layer, root, keeper, walked, slice_entries)
    finally:
        os.close(root)
    for _ in range(DRAINS_MAX):
        yield []
        if not queued():
            return
    walked.astray = True


def _walk(
    layer: WatchedLayer, root: int, keeper: Keeper, walked: Walked, slice_entries: int
) -> Generator[list[Change], None, None]:
    def failed(path: bytes, error: OSError) -> None:
        if not path:
            raise LayerError(f"layer {layer.name} cannot be read: {error.strerror}") from None
        # What cannot be read stands empty, and a scan that cannot read it either tells nothing of it.
        walked.astray = walked.astray or error.errno in _VANISHED

    walked.state, walked.root = pack_state(os.fstat(root)), keeper.numbers(1)[0]
    budget = Budget(slice_entries)
    rows: Rows = []
    size = 0
    for directory in Walk(root, failed=failed):
        if not walked.is_wanted:
            return
        reading = read_directory(directory.descriptor, budget)
        pairs = []
        try:
            while True:
                try:
                    next(reading)
                except StopIteration as end:
                    pairs = end.value
                    break
                yield []
        except OSError as error:
            failed(directory.path, error)
        directory.descend = [name for name, state in pairs if is_directory(state)]
        directory.descend_tags = keeper.numbers(len(directory.descend))
        listing = Listing(*joined(pairs), pack_numbers(directory.descend_tags))
        rows.append((directory.tag if directory.parent else walked.root, listing))
        walked.entries += len(pairs)
        size += len(listing.names) + len(listing.states)
        if size >= BATCH_BYTES or len(rows) >= BATCH_DIRECTORIES:
            yield from _hand_over(keeper, rows)
            rows, size = [], 0
    yield from _hand_over(keeper, rows)


def _hand_over(keeper: Keeper, rows: Sequence[tuple[int, Listing]]) -> Generator[list[Change], None, None]:
    while keeper.is_busy():
        time.sleep(PAUSE_S)
        yield []
    keeper.store(list(rows))
    yield []
