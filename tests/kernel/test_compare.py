"""Scans against what is known, on real filesystems: exactly what changed is told."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from watchd.journal.known import Known
from watchd.records import Change
from watchd.sources.base import WatchedLayer
from watchd.sources.baseline import Keeper, Walked, walk_through
from watchd.sources.compare import differences
from watchd.journal.render import kind_names

from . import snapshot
from .snapshot import Wilderness
from .test_inotify import layer_at
from .test_scan import run


@pytest.fixture
def known(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("known")
    known = Known(directory / "known.db", journal=directory, epoch="0" * 16, last_seq=0)
    yield known
    known.close()


def learn(known: Known, layer: WatchedLayer) -> Walked:
    walked = Walked()
    number = known.begin(layer.name, layer.path, 0)
    keeper = Keeper(number=known.next_number, store=lambda rows: known.store(number, rows), is_busy=lambda: False)
    for changes in walk_through(layer, keeper, walked, queued=lambda: 0, slice_entries=10):
        assert changes == []
    known.complete(number, walked.root, walked.state)
    return walked


def compare(known: Known, layer: WatchedLayer, **options: int) -> list[Change]:
    return run(differences(layer, lambda: known.tree(layer.name), **options))[0]


def kinds_of(changes: list[Change]) -> dict[bytes, frozenset[str]]:
    told = {change.path: frozenset(kind_names(change.kinds)) for change in changes}
    assert len(told) == len(changes), "something is told twice"
    return told


@pytest.mark.parametrize("seed", range(40))
def test_a_scan_tells_what_two_looks_at_the_tree_tell(workspace: Path, known: Known, seed: int) -> None:
    layer, root = layer_at(workspace), os.fsencode(workspace)
    wilderness = Wilderness(root, random.Random(seed))
    wilderness.grow(60)
    learn(known, layer)
    before = snapshot.snapshot(root)
    assert compare(known, layer) == []
    wilderness.churn(seed * 2)
    after = snapshot.snapshot(root)
    changes = compare(known, layer, slice_entries=7)
    assert kinds_of(changes) == snapshot.differences(before, after)
    assert {change.path for change in changes if change.exists} == snapshot.differences(before, after).keys() & after.keys()
