"""Whatever is done to a tree, what is folded from what a source tells of it is the tree."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.journal.renames import Renames, Tree
from watchd.journal.folding import Folding, Unsettled
from watchd.records import STATUS
from watchd.wire.listing import STATE_BYTES, Listing


class Shelf:
    """Listings in memory."""

    def __init__(self) -> None:
        self.listings: dict[int, Listing] = {}
        self._last = 1

    def load(self, number: int) -> Listing:
        return self.listings.get(number, Listing())

    def save(self, number: int, listing: Listing) -> None:
        self.listings[number] = listing

    def delete(self, number: int) -> None:
        self.listings.pop(number, None)

    def next_number(self) -> int:
        self._last += 1
        return self._last

    def tree(self, root: int) -> Tree:
        found: Tree = {}
        pending = [(b"", root)]
        while pending:
            above, number = pending.pop()
            listing = self.load(number)
            for name, state in listing.entries().items():
                mode, _, _, size, _, _ = STATUS.unpack(state[8:])
                assert above + name not in found
                found[above + name] = int.from_bytes(state[:8], "little"), mode, size
            pending += [(above + name + b"/", child) for name, child in listing.directories().items()]
        return found


@settings(deadline=None)
@given(random=st.randoms(use_true_random=False), steps=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_what_is_folded_is_the_tree_whatever_was_renamed_where(random: Random, steps: list[int]) -> None:
    renames, shelf = Renames(random), Shelf()
    folding = Folding(shelf, 1, bytes(STATE_BYTES), Unsettled())
    for count in steps:
        renames.churn(count)
        changes = renames.tell()
        if changes:
            folding.apply(changes)
            folding.settle(changes[-1].time_ns)
            folding.write()
        assert shelf.tree(1) == renames.tree()
