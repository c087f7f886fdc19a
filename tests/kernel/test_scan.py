"""Scans and walks of a real tmpfs."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from watchd.errors import LayerError
from watchd.kernel.files import openat2
from watchd.kernel.statx import birth_time_ns
from watchd.records import Change, Kind, Via
from watchd.sources.base import WatchedLayer
from watchd.sources.scan import Scan, Scanned, changed_since, everything_below
from watchd.sources.walk import LISTABLE, Walk

from .test_inotify import layer_at

OLD_NS = 1_000_000_000_500_000_000


@pytest.fixture
def layer(workspace: Path) -> WatchedLayer:
    return layer_at(workspace)


def run(scan: Scan) -> tuple[list[Change], Scanned]:
    found: list[Change] = []
    while True:
        try:
            found += next(scan)
        except StopIteration as stop:
            return found, stop.value


def after_everything_in(path: Path) -> int:
    """A time later than all of the tree's by more than the margin, or a busy wait for it: timestamps cannot be chosen."""
    newest = max(os.lstat(entry).st_ctime_ns for entry in [path, *path.rglob("*")])
    while time.time_ns() <= newest + 20_000_000:
        pass
    return time.time_ns()


def test_changes_are_told_by_what_their_times_say(workspace: Path, layer: WatchedLayer) -> None:
    for name in ("written", "mode", "untouched"):
        (workspace / name).touch()
        os.utime(workspace / name, ns=(OLD_NS, OLD_NS))
    (workspace / "d/e").mkdir(parents=True)
    (workspace / "d/e/removed").touch()
    since = after_everything_in(workspace)
    (workspace / "written").write_text("new")
    (workspace / "mode").chmod(0o600)
    (workspace / "d/e/removed").unlink()
    (workspace / "created").touch()
    found, scanned = run(changed_since(layer, since))
    assert {change.path: change.kinds for change in found} == {
        b"": Kind.MODIFY,
        b"written": Kind.MODIFY,
        b"mode": Kind.ATTRIB,
        b"created": Kind.CREATE,
        b"d/e": Kind.MODIFY,
    }
    assert {(change.via, change.exists, change.layer) for change in found} == {(Via.SCAN, True, "base")}
    assert {change.path for change in found if change.is_dir} == {b"", b"d/e"}
    assert scanned == Scanned(entries=7, told=5)


def test_a_change_in_the_tick_before_the_time_asked_for_is_told(workspace: Path, layer: WatchedLayer) -> None:
    (workspace / "file").touch()
    found, _ = run(changed_since(layer, (workspace / "file").stat().st_ctime_ns + 9_000_000))
    assert b"file" in {change.path for change in found}


def test_a_filesystem_with_whole_seconds_hides_nothing(workspace: Path, layer: WatchedLayer) -> None:
    (workspace / "file").touch()
    second = time.time_ns() // 1_000_000_000 * 1_000_000_000 + 100_000_000_000
    os.utime(workspace / "file", ns=(second, second))
    found, _ = run(changed_since(layer, second + 1_900_000_000))
    assert [(change.path, change.kinds) for change in found] == [(b"file", Kind.MODIFY)]


def test_a_large_directory_is_told_in_slices(workspace: Path, layer: WatchedLayer) -> None:
    for number in range(25):
        (workspace / f"{number}").touch()
    assert [len(part) for part in changed_since(layer, 0, slice_entries=10)] == [10, 10, 6]
    later = time.time_ns() + 10**12
    assert [len(part) for part in changed_since(layer, later, slice_entries=10)] == [0, 0, 0]


def test_a_scan_that_is_given_up_leaves_nothing_open(workspace: Path, layer: WatchedLayer) -> None:
    for number in range(25):
        (workspace / f"{number}/sub").mkdir(parents=True)
    scan = changed_since(layer, 0, slice_entries=30)
    next(scan)
    scan.close()


def test_names_that_are_not_utf8_are_told_as_they_are(workspace: Path, layer: WatchedLayer) -> None:
    os.makedirs(os.fsencode(workspace) + b"/\xff/\xfe")
    found, _ = run(everything_below(layer, b"\xff"))
    assert [(change.path, change.kinds, change.is_dir) for change in found] == [(b"\xff/\xfe", Kind.CREATE, True)]


def test_symlinks_and_mounts_lead_nowhere(workspace: Path, layer: WatchedLayer) -> None:
    (workspace / "inside/target").mkdir(parents=True)
    (workspace / "inside/link").symlink_to("/")
    assert {change.path for change in run(everything_below(layer, b"inside"))[0]} == {b"inside/link", b"inside/target"}
    found, scanned = run(everything_below(layer, b"inside/link"))
    assert (found, scanned.skipped) == ([], 1)


def test_what_vanishes_under_the_scan_is_counted_not_raised(workspace: Path, layer: WatchedLayer) -> None:
    for number in range(20):
        (workspace / f"{number}/sub").mkdir(parents=True)
    scan = changed_since(layer, 0, slice_entries=22)
    found = next(scan)
    for number in range(20):
        shutil.rmtree(workspace / f"{number}")
    rest, scanned = run(scan)
    assert len(found) == 22
    assert rest == []
    assert scanned.skipped > 0
    assert run(everything_below(layer, b"gone"))[1].skipped == 1


def test_a_layer_that_is_gone_is_an_error(workspace: Path) -> None:
    (workspace / "layer").mkdir()
    layer = layer_at(workspace / "layer")

    def gone() -> int:
        raise LayerError("gone")

    with pytest.raises(LayerError):
        run(changed_since(WatchedLayer("x", layer.path, layer.device, layer.root, gone, gone), 0))


def test_a_tree_deeper_than_a_path_can_be_is_walked_to_its_end(workspace: Path, layer: WatchedLayer) -> None:
    depth = 60
    name = "n" * 200
    directory = os.open(workspace, LISTABLE)
    for _ in range(depth):
        # The directory that sorts beside the deep one makes the walk come back to a parent it had to close.
        for each in (name, "beside", "beside/sub"):
            os.mkdir(each, dir_fd=directory)
        below = os.open(name, LISTABLE, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(directory)
    found, scanned = run(everything_below(layer, b""))
    assert scanned.skipped == 0
    assert max(len(change.path) for change in found) == depth * 201 - 1
    assert len(found) == 3 * depth + 1
    shutil.rmtree(workspace / name)


def test_a_directory_swapped_for_another_during_the_walk_is_left_alone(workspace: Path, layer: WatchedLayer) -> None:
    (workspace / "a/inner").mkdir(parents=True)
    (workspace / "b/inner").mkdir(parents=True)
    (workspace / "other/inner").mkdir(parents=True)
    failed = []
    root = layer.open()
    walk = Walk(root, failed=lambda path, error: failed.append(path))
    visited = []
    for directory in walk:
        visited.append(directory.path)
        directory.descend = sorted(walk.subdirectories(directory))
        if directory.path == b"b":
            (workspace / "a").rename(workspace / "moved")
            (workspace / "other").rename(workspace / "a")
    os.close(root)
    assert b"a/inner" not in visited
    assert b"b/inner" in visited
    assert failed == [b"other", b"a"]


def test_leaf_directories_are_known_without_listing_them(workspace: Path, layer: WatchedLayer) -> None:
    (workspace / "leaf").mkdir()
    (workspace / "parent/sub").mkdir(parents=True)
    root = layer.open()
    leaves = {}
    walk = Walk(root, failed=lambda path, error: None)
    for directory in walk:
        leaves[directory.path] = directory.is_leaf()
        directory.descend = [name for name, is_dir, _ in walk.entries(directory) if is_dir]
    os.close(root)
    assert leaves == {b"": False, b"leaf": True, b"parent": False, b"parent/sub": True}


def test_the_time_of_creation_is_not_moved_by_a_write(workspace: Path) -> None:
    (workspace / "file").touch()
    directory = os.open(workspace, LISTABLE)
    born = birth_time_ns(b"file", directory)
    after_everything_in(workspace)
    (workspace / "file").write_text("later")
    assert birth_time_ns(b"file", directory) == born
    descriptor = openat2(directory, b"file")
    assert birth_time_ns(b"", descriptor) == born
    os.close(descriptor)
    os.close(directory)
    with pytest.raises(FileNotFoundError):
        birth_time_ns(os.fsencode(workspace / "missing"), -100)
