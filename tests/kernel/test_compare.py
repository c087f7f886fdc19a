"""Scans against what is known, on real filesystems: exactly what changed is told."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import Require
from watchd.journal.known import Known
from watchd.journal.render import kind_names
from watchd.records import Change, Kind, pack_status
from watchd.sources.base import WatchedLayer
from watchd.sources.baseline import Keeper, Walked, walk_through
from watchd.sources.compare import differences, unless_told
from watchd.sources.listing import SLICE_ENTRIES, Budget, Pairs, read_directory
from watchd.sources.told import Told

from . import snapshot
from .images import Images, has_tools_for
from .snapshot import Wilderness
from .test_inotify import layer_at
from .test_scan import run


@pytest.fixture
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Known]:
    directory = tmp_path_factory.mktemp("known")
    known = Known(directory / "known.db", journal=directory, epoch="0" * 16, last_seq=0)
    yield known
    known.close()


def learn(known: Known, layer: WatchedLayer) -> Walked:
    walked = Walked()
    number = known.begin(layer.name, layer.path, 0)
    keeper = Keeper(numbers=known.next_numbers, store=lambda rows: known.store(number, rows), is_busy=lambda: False)
    for changes in walk_through(layer, keeper, walked, queued=lambda: 0, slice_entries=10):
        assert changes == []
    known.complete(number, walked.root, walked.state)
    return walked


def compare(
    known: Known, layer: WatchedLayer, told: Told | None = None, *, slice_entries: int = SLICE_ENTRIES
) -> list[Change]:
    tree = partial(known.tree, layer.name)
    return run(differences(layer, tree, told=told, slice_entries=slice_entries))[0]


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
    assert {change.path for change in changes if change.exists} == snapshot.differences(
        before, after
    ).keys() & after.keys()


@pytest.fixture
def grown(workspace: Path, known: Known) -> WatchedLayer:
    """A layer that is known, with a directory `d` that has a file and a directory with another file in it."""
    (workspace / "d/e").mkdir(parents=True)
    (workspace / "d/f").touch()
    (workspace / "d/e/g").touch()
    layer = layer_at(workspace)
    learn(known, layer)
    return layer


def event(workspace: Path, path: str, kinds: int, from_path: bytes | None = None) -> Change:
    """What a source tells of a path just now."""
    try:
        status = os.lstat(workspace / path)
    except FileNotFoundError:
        return Change(1, "base", path.encode(), kinds, False, path in ("d", "d/e"))
    is_dir = (workspace / path).is_dir()
    packed = pack_status(status)
    return Change(1, "base", path.encode(), kinds, True, is_dir, from_path, status.st_ino, status=packed)


def test_what_events_have_told_since_is_not_told_again(workspace: Path, known: Known, grown: WatchedLayer) -> None:
    told = Told()
    (workspace / "new").touch()
    (workspace / "d/f").unlink()
    (workspace / "d/e/g").write_text("more")
    for path, kinds in (("new", Kind.CREATE), ("d/f", Kind.DELETE), ("d/e/g", Kind.MODIFY)):
        told.add(event(workspace, path, kinds))
    assert compare(known, grown, told) == []
    (workspace / "new").write_text("changed again, and no event of it came yet")
    assert kinds_of(compare(known, grown, told)) == {b"new": {"create"}}


def test_below_a_directory_whose_rename_was_told_only_what_changed_is_told(
    workspace: Path, known: Known, grown: WatchedLayer
) -> None:
    told = Told()
    for old, new in (("d", "h"), ("h", "i")):
        (workspace / old).rename(workspace / new)
        told.add(event(workspace, old, Kind.RENAME))
        told.add(event(workspace, new, Kind.RENAME, old.encode()))
    (workspace / "i/e/g").write_text("more")
    assert kinds_of(compare(known, grown, told)) == {b"i/e/g": {"modify"}}


def test_what_was_told_during_a_slice_is_known_to_whoever_records_it(
    workspace: Path, known: Known, grown: WatchedLayer
) -> None:
    told = Told()
    told.add(event(workspace, "d", Kind.ATTRIB))
    (workspace / "new").touch()
    slices = unless_told(differences(grown, lambda: known.tree("base"), told=told), told)
    [change] = next(slices)
    assert told.recent == set(), "what was told before the slice began is compared with"
    told.add(event(workspace, "new", Kind.CREATE))
    assert change.path in told.recent
    slices.close()


def test_a_directory_that_cannot_be_read_is_not_told_as_empty(
    workspace: Path, known: Known, grown: WatchedLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(descriptor: int, budget: Budget) -> Generator[None, None, Pairs]:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/e"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return (yield from read_directory(descriptor, budget))

    monkeypatch.setattr("watchd.sources.compare.read_directory", unreadable)
    changes, scanned = run(differences(grown, lambda: known.tree("base")))
    assert changes == []
    assert (scanned.skipped, scanned.first_error) == (1, "d/e: Input/output error")


def test_a_directory_replaced_by_another_is_told_with_all_that_is_in_either(
    workspace: Path, known: Known, grown: WatchedLayer
) -> None:
    (workspace / "other/e").mkdir(parents=True)
    (workspace / "other/n").touch()
    (workspace / "d").rename(workspace / "aside")
    (workspace / "other").rename(workspace / "d")
    replaced = {"create", "delete"}
    assert kinds_of(compare(known, grown)) == {
        b"aside": {"create"},
        b"aside/e": {"create"},
        b"aside/e/g": {"create"},
        b"aside/f": {"create"},
        b"d": replaced,
        b"d/e": replaced,
        b"d/e/g": {"delete"},
        b"d/f": {"delete"},
        b"d/n": {"create"},
    }


def test_a_time_that_64_bits_do_not_hold_breaks_no_scan(workspace: Path, known: Known) -> None:
    (workspace / "far").touch()
    os.utime(workspace / "far", (2**40, 2**40))
    layer = layer_at(workspace)
    learn(known, layer)
    assert compare(known, layer) == []


def test_a_walk_that_did_not_find_a_directory_it_had_listed_says_so(workspace: Path, known: Known) -> None:
    for name in ("a", "b", "c"):
        (workspace / name / "sub").mkdir(parents=True)
    walked, keeper = Walked(), Keeper(numbers=known.next_numbers, store=lambda rows: None, is_busy=lambda: False)
    slices = walk_through(layer_at(workspace), keeper, walked, queued=lambda: 0, slice_entries=3)
    next(slices)
    for name in ("a", "b", "c"):
        (workspace / name).rename(workspace / f"{name}-renamed")
    assert list(slices)
    assert walked.astray


@pytest.mark.parametrize("fstype", ["ext4", "btrfs"])
def test_inode_numbers_that_are_used_again_hide_nothing(
    tmp_path: Path, images: Images, require: Require, known: Known, fstype: str
) -> None:
    require(has_tools_for(fstype), f"mkfs.{fstype}")
    (tmp_path / "at").mkdir()
    with images.mounted(fstype, tmp_path / "at") as root:
        for seed in range(8):
            layer, wilderness = layer_at(root), Wilderness(os.fsencode(root), random.Random(seed))
            wilderness.grow(40)
            learn(known, layer)
            before = snapshot.snapshot(os.fsencode(root))
            wilderness.churn(60)
            after = snapshot.snapshot(os.fsencode(root))
            assert kinds_of(compare(known, layer)) == snapshot.differences(before, after)
