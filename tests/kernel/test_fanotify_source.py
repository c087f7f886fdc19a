"""FanotifySource on real filesystems."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Require
from watchd.errors import LayerError, UnsupportedError
from watchd.kernel.files import name_to_handle_at
from watchd.kernel.libc import AT_FDCWD
from watchd.kernel.mounts import open_tree_clone
from watchd.records import Change, Kind
from watchd.sources import fanotify, tree
from watchd.sources.base import Batch, MovedIn, WatchedLayer
from watchd.sources.fanotify import FanotifySource

from .churn import Churn, missed, snapshot
from .conftest import umount
from .images import Images, has_tools_for
from .sandbox import MS_BIND, Sandbox, mount


def layer_at(path: Path, *, mounted_at: Path, name: str = "base") -> WatchedLayer:
    layer, mount_root = os.fsencode(path), os.fsencode(mounted_at)
    return WatchedLayer(
        name,
        layer,
        path.stat().st_dev,
        name_to_handle_at(AT_FDCWD, layer, flags=0),
        lambda: open_tree_clone(AT_FDCWD, layer),
        lambda: open_tree_clone(AT_FDCWD, mount_root),
    )


@pytest.fixture
def place(workspace: Path) -> Path:
    """The root of a filesystem."""
    return workspace


@pytest.fixture
def root(place: Path) -> Path:
    """The layer's."""
    path = place / "layer"
    path.mkdir()
    return path


@pytest.fixture
def barriers(tmp_path: Path) -> Path:
    path = tmp_path / "barriers"
    path.mkdir()
    return path


Watch = Callable[..., FanotifySource]


@pytest.fixture
def watch(place: Path, barriers: Path) -> Iterator[Watch]:
    """`watch(path, ...)`: a source with these layers, named base, second, third."""
    sources: list[FanotifySource] = []

    def start(*paths: Path, content: bool = True, unlimited_queue: bool = True) -> FanotifySource:
        source = FanotifySource(
            barrier_directory=os.fsencode(barriers), content=content, unlimited_queue=unlimited_queue
        )
        sources.append(source)
        for path, name in zip(paths, ("base", "second", "third"), strict=False):
            source.add(layer_at(path, mounted_at=place, name=name))
        return source

    yield start
    for source in sources:
        source.close()


def batches(source: FanotifySource) -> list[Batch]:
    """Everything that is queued now, looked at."""
    result = []
    while select.select([source], [], [], 0)[0]:
        batch = source.collect()
        assert batch is not None
        assert batch.look is not None
        batch.changes += batch.look()
        result.append(batch)
    return result


def changes(source: FanotifySource, *, layer: str = "base") -> list[Change]:
    return [change for batch in batches(source) for change in batch.changes if change.layer == layer]


def told(source: FanotifySource, *, layer: str = "base") -> set[tuple[bytes, int]]:
    return {(change.path, change.kinds) for change in changes(source, layer=layer)}


def paths(source: FanotifySource, *, layer: str = "base") -> set[bytes]:
    return {path for path, _ in told(source, layer=layer)}


# ---- one change each ------------------------------------------------------------------------------------------------


def test_every_kind_of_change_is_told_with_the_state_now(root: Path, watch: Watch) -> None:
    (root / "written").write_text("old")
    (root / "removed").touch()
    (root / "mode").touch()
    source = watch(root)
    with (root / "written").open("a") as file:
        file.write("more")
    (root / "removed").unlink()
    (root / "mode").chmod(0o600)
    (root / "link").symlink_to("/etc")
    found = {change.path: change for change in changes(source)}
    assert {path: change.kinds for path, change in found.items()} == {
        b"written": Kind.MODIFY,
        b"removed": Kind.DELETE,
        b"mode": Kind.ATTRIB,
        b"link": Kind.CREATE,
    }
    assert (found[b"removed"].exists, found[b"removed"].inode) == (False, None)
    assert found[b"written"].exists
    assert found[b"written"].inode == (root / "written").stat().st_ino
    assert not found[b"link"].is_dir
    assert {change.pid for change in found.values()} == {os.getpid()}


def test_what_may_have_waited_for_long_is_told_without_the_command(root: Path, watch: Watch) -> None:
    """The process may be gone and its id another's."""
    source = watch(root)
    (root / "old").touch()
    source.is_catching_up = True
    assert [(change.pid, change.command) for change in changes(source)] == [(os.getpid(), None)]
    (root / "new").touch()
    assert [(change.pid, change.command) for change in changes(source)] == [(os.getpid(), b"watchd")]


def test_what_may_be_stale_is_known_before_anything_was_looked_at(root: Path, watch: Watch) -> None:
    (root / "written").write_text("old")
    source = watch(root)
    (root / "written").write_text("new")
    (root / "new").mkdir()
    batch = source.collect()
    assert batch is not None
    assert batch.changes == []
    assert batch.suspects == {"base": {b"new": Kind.CREATE}}


def test_writes_are_not_told_where_they_are_not_wanted(root: Path, watch: Watch) -> None:
    (root / "written").write_text("old")
    source = watch(root, content=False)
    (root / "written").write_text("new")
    (root / "new").write_text("new")
    assert told(source) == {(b"new", Kind.CREATE)}


def test_names_that_are_not_utf8_are_told_as_they_are(root: Path, watch: Watch) -> None:
    source = watch(root)
    os.mkdir(os.fsencode(root) + b"/\xff")
    os.close(os.open(os.fsencode(root) + b"/\xff/\n\xfe", os.O_CREAT | os.O_WRONLY))
    os.mkdir(os.fsencode(root) + b"/" + b"\xfd" * 255)
    assert paths(source) == {b"\xff", b"\xff/\n\xfe", b"\xfd" * 255}


def test_a_directory_whose_name_ends_like_a_deleted_one_keeps_its_name(root: Path, watch: Watch) -> None:
    (root / "d (deleted)").mkdir()
    source = watch(root)
    (root / "d (deleted)/file").touch()
    assert paths(source) == {b"d (deleted)/file"}


def test_attributes_of_the_root_are_told_with_the_empty_path(root: Path, watch: Watch) -> None:
    source = watch(root)
    root.chmod(0o700)
    assert [(change.path, change.kinds, change.is_dir) for change in changes(source)] == [(b"", Kind.ATTRIB, True)]


def test_a_rename_tells_both_names(root: Path, watch: Watch) -> None:
    (root / "d").mkdir()
    (root / "old").touch()
    source = watch(root)
    (root / "old").rename(root / "d/new")
    found = {change.path: change for change in changes(source)}
    assert set(found) == {b"old", b"d/new"}
    assert (found[b"old"].kinds, found[b"old"].exists, found[b"old"].from_path) == (Kind.RENAME, False, None)
    assert (found[b"d/new"].kinds, found[b"d/new"].exists, found[b"d/new"].from_path) == (Kind.RENAME, True, b"old")


def test_nothing_outside_the_layer_is_told(place: Path, root: Path, watch: Watch) -> None:
    (place / "beside/deep").mkdir(parents=True)
    (place / "layer2").mkdir()
    source = watch(root)
    for name in ("file", "beside/file", "beside/deep/file", "layer2/file"):
        (place / name).touch()
    (place / "beside/deep").rename(place / "beside/renamed")
    (root / "link").symlink_to(place / "beside")
    (root / "link/through-the-link").touch()
    (batch,) = batches(source)
    assert [change.path for change in batch.changes] == [b"link"]
    assert batch.records == {"base": 1}


# ---- directories that come, go and move -----------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["never met", "just made"])
def test_what_was_in_a_directory_that_is_gone_still_has_a_path(root: Path, watch: Watch, known: bool) -> None:
    source = watch(root)
    (root / "a/b/c").mkdir(parents=True)
    (root / "a/b/c/file").touch()
    if not known:
        batches(source)
        source.recover()
    shutil.rmtree(root / "a")
    found = {change.path: change.exists for change in changes(source)}
    assert found == {b"a": False, b"a/b": False, b"a/b/c": False, b"a/b/c/file": False}


def test_directories_made_and_deleted_in_a_loop_lose_no_path(root: Path, watch: Watch) -> None:
    source = watch(root)
    expected: set[bytes] = set()
    for number in range(300):
        (root / f"{number}/sub").mkdir(parents=True)
        (root / f"{number}/sub/file").touch()
        shutil.rmtree(root / f"{number}")
        expected |= {b"%d" % number, b"%d/sub" % number, b"%d/sub/file" % number}
    assert paths(source) == expected


def test_a_directory_renamed_and_deleted_before_it_was_met_still_has_a_path(root: Path, watch: Watch) -> None:
    source = watch(root)
    (root / "a/sub").mkdir(parents=True)
    (root / "a").rename(root / "b")
    (root / "b/sub/file").touch()
    shutil.rmtree(root / "b")
    assert {b"a", b"b", b"b/sub", b"b/sub/file"} <= paths(source)


def test_names_of_a_removed_directory_are_told_as_they_are_in_the_one_that_took_its_place(
    root: Path, watch: Watch
) -> None:
    for path in ("old/sub", "old/only", "new/sub"):
        (root / path).mkdir(parents=True)
    (root / "old/sub/file").touch()
    (root / "new/sub/file").touch()
    source = watch(root)
    shutil.rmtree(root / "old")
    (root / "new").rename(root / "old")
    found = {change.path: change for change in changes(source)}
    assert {path: change.exists for path, change in found.items()} == {
        b"old": True,
        b"new": False,
        b"old/sub": True,
        b"old/sub/file": True,
        b"old/only": False,
    }
    assert found[b"old/sub/file"].inode == (root / "old/sub/file").stat().st_ino


def test_below_a_renamed_directory_the_new_path_is_told(root: Path, watch: Watch) -> None:
    (root / "a/b/c").mkdir(parents=True)
    (root / "target").mkdir()
    source = watch(root)
    (root / "a/b/c/before").touch()
    assert paths(source) == {b"a/b/c/before"}
    (root / "a").rename(root / "target/moved")
    (root / "target/moved/b/c/file").touch()
    (batch,) = batches(source)
    found = {change.path: change for change in batch.changes}
    assert found[b"target/moved"].from_path == b"a"
    assert found[b"target/moved"].is_dir
    assert found[b"target/moved/b/c/file"].exists
    assert batch.moved_in == ()


def test_a_tree_moved_in_is_told_for_a_scan(place: Path, root: Path, watch: Watch) -> None:
    (place / "tree/a/b").mkdir(parents=True)
    (root / "d").mkdir()
    source = watch(root)
    (place / "tree").rename(root / "d/tree")
    (root / "d/tree/a/b/file").touch()
    (batch,) = batches(source)
    assert batch.moved_in == (MovedIn("base", b"d/tree"),)
    assert {change.path for change in batch.changes} == {b"d/tree", b"d/tree/a/b/file"}


def test_a_tree_moved_in_and_renamed_before_anybody_looked_is_told_for_a_scan(
    place: Path, root: Path, watch: Watch
) -> None:
    (place / "outside/tree").mkdir(parents=True)
    (root / "old").mkdir()
    source = watch(root)
    (place / "outside/tree").rename(root / "temporary")
    for old, new in (("temporary", "final"), ("final", "temporary"), ("temporary", "final")):
        (root / old).rename(root / new)
    (root / "old").rename(root / "renamed")
    (root / "renamed").rename(root / "old")
    (batch,) = batches(source)
    assert batch.moved_in == (MovedIn("base", b"final"),)


def test_a_tree_that_is_outside_just_while_its_events_are_looked_at_is_told_for_a_scan(
    place: Path, root: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "tree").mkdir()
    source = watch(root)
    (root / "tree/file").touch()

    def leave() -> None:
        monkeypatch.undo()
        (root / "tree").rename(place / "tree")

    monkeypatch.setattr(source._tree, "begin", leave)  # between reading and looking
    first = source.collect()
    assert first is not None
    assert first.is_nothing
    (place / "tree").rename(root / "tree")
    (batch,) = batches(source)
    assert batch.moved_in == (MovedIn("base", b"tree"),)


def test_what_was_in_a_tree_that_is_removed_while_its_events_are_read_is_told(
    root: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/file").touch()
    source = watch(root)
    (root / "a/b/file").unlink()

    def remove() -> None:
        monkeypatch.undo()
        (root / "a/b").rmdir()
        (root / "a").rmdir()

    monkeypatch.setattr(source._tree, "begin", remove)  # between reading and looking
    first = source.collect()
    assert first is not None
    assert first.is_nothing
    (batch,) = batches(source)
    assert {change.path: change.exists for change in batch.changes} == dict.fromkeys((b"a", b"a/b", b"a/b/file"), False)


def test_what_came_out_of_a_tree_before_or_after_that_was_moved_in_is_told_for_a_scan(
    place: Path, root: Path, watch: Watch
) -> None:
    (place / "outside/before/deep").mkdir(parents=True)
    (place / "outside/after/deep").mkdir(parents=True)
    source = watch(root)
    (place / "outside/before").rename(root / "before")
    (place / "outside").rename(root / "tree")
    (root / "tree/after").rename(root / "after")
    found = {moved for batch in batches(source) for moved in batch.moved_in}
    assert found == {MovedIn("base", b"before"), MovedIn("base", b"tree"), MovedIn("base", b"after")}


def test_a_file_moved_in_needs_no_scan(place: Path, root: Path, watch: Watch) -> None:
    (place / "file").touch()
    source = watch(root)
    (place / "file").rename(root / "file")
    (batch,) = batches(source)
    assert batch.moved_in == ()
    assert [(change.path, change.from_path) for change in batch.changes] == [(b"file", None)]


def test_a_tree_moved_out_is_told_and_what_happens_in_it_is_not(place: Path, root: Path, watch: Watch) -> None:
    (root / "tree/a/b").mkdir(parents=True)
    source = watch(root)
    (root / "tree/a/b/before").touch()
    batches(source)
    (root / "tree").rename(place / "tree")
    assert [(change.path, change.exists) for change in changes(source)] == [(b"tree", False)]
    (place / "tree/a/b/file").touch()
    assert paths(source) == set()


def test_a_tree_that_comes_back_is_known_again(place: Path, root: Path, watch: Watch) -> None:
    (root / "tree/a").mkdir(parents=True)
    source = watch(root)
    for number in range(3):
        (root / "tree").rename(place / "tree")
        batches(source)
        (place / "tree/a/outside").touch()
        batches(source)
        (place / "tree").rename(root / "tree")
        assert [batch.moved_in for batch in batches(source)] == [(MovedIn("base", b"tree"),)]
        (root / f"tree/a/{number}").touch()
        assert paths(source) == {b"tree/a/%d" % number}


def test_directories_that_change_places_are_told_apart(root: Path, watch: Watch) -> None:
    for name in ("x/inner", "y/inner"):
        (root / name).mkdir(parents=True)
    source = watch(root)
    for _ in range(3):
        (root / "x").rename(root / "t")
        (root / "y").rename(root / "x")
        (root / "t").rename(root / "y")
        (root / "x/inner/in-x").touch()
        (root / "y/inner/in-y").touch()
        assert {b"x/inner/in-x", b"y/inner/in-y"} <= paths(source)
        (root / "x/inner/in-x").unlink()
        (root / "y/inner/in-y").unlink()
        assert paths(source) == {b"x/inner/in-x", b"y/inner/in-y"}


@pytest.mark.parametrize("read_in_between", [False, True])
def test_after_a_storm_of_renames_every_directory_has_its_right_path(
    root: Path, watch: Watch, read_in_between: bool
) -> None:
    for number in range(8):
        (root / f"d{number}/in/deep").mkdir(parents=True)
    source = watch(root)
    for turn in range(200):
        here, there = root / f"d{turn % 8}", root / f"d{(turn + 3) % 8}"
        target = there / "in/deep/guest"
        if not target.exists():
            here.rename(target)
        if (root / f"d{(turn + 3) % 8}/in/deep/guest").exists():
            target.rename(here)
        if read_in_between and turn % 7 == 0:
            batches(source)
    batches(source)
    for directory, _, _ in os.walk(root):
        (Path(directory) / "probe").touch()
    assert paths(source) == {path for path in snapshot(root) if path.endswith(b"probe")}


def test_a_path_longer_than_the_kernel_takes_is_told(root: Path, watch: Watch) -> None:
    source = watch(root)
    name = b"x" * 250
    descriptor = os.open(root, os.O_RDONLY)
    expected = set()
    for depth in range(1, 25):
        os.mkdir(name, dir_fd=descriptor)
        descriptor, above = os.open(name, os.O_RDONLY, dir_fd=descriptor), descriptor
        os.close(above)
        expected.add(b"/".join([name] * depth))
    longest = b"/".join([name] * 24)
    assert len(longest) > 6000
    assert paths(source) == expected
    source.recover()
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    assert [(change.path, change.exists) for change in changes(source)[:1]] == [(longest + b"/file", True)]
    os.close(descriptor)


def test_with_more_directories_than_are_remembered_no_path_is_wrong(
    root: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "NODES_MAX", 10)
    monkeypatch.setattr(tree, "PLACES_MAX", 10)
    source = watch(root)
    for number in range(50):
        (root / f"{number}/sub").mkdir(parents=True)
        (root / f"{number}/sub/file").touch()
        assert paths(source) == {b"%d" % number, b"%d/sub" % number, b"%d/sub/file" % number}
    assert source._tree.forgotten


# ---- several layers, mounts -----------------------------------------------------------------------------------------


def test_layers_nested_in_one_another_are_both_told(root: Path, watch: Watch) -> None:
    (root / "inner/d").mkdir(parents=True)
    (root / "beside/tree").mkdir(parents=True)
    source = watch(root, root / "inner")
    (root / "inner/d/file").touch()
    (root / "inner").chmod(0o700)
    (root / "beside/file").touch()
    found = [change for batch in batches(source) for change in batch.changes]
    assert {(change.layer, change.path) for change in found} == {
        ("base", b"inner/d/file"),
        ("second", b"d/file"),
        ("base", b"inner"),
        ("second", b""),
        ("base", b"beside/file"),
    }
    (root / "beside/tree").rename(root / "inner/tree")
    (batch,) = batches(source)
    assert batch.moved_in == (MovedIn("second", b"tree"),)
    moved = {(change.layer, change.path): change.from_path for change in batch.changes}
    assert moved == {("base", b"beside/tree"): None, ("base", b"inner/tree"): b"beside/tree", ("second", b"tree"): None}


def test_two_layers_at_one_directory_are_both_told(root: Path, watch: Watch) -> None:
    source = watch(root, root)
    (root / "file").touch()
    (batch,) = batches(source)
    assert {(change.layer, change.path) for change in batch.changes} == {("base", b"file"), ("second", b"file")}


def test_a_removed_layer_tells_nothing_more_and_the_others_go_on(root: Path, watch: Watch) -> None:
    for name in ("one/d", "two/d"):
        (root / name).mkdir(parents=True)
    source = watch(root / "one", root / "two")
    (root / "one/d/told").touch()
    batches(source)
    source.remove("base")
    for name in ("one", "two"):
        (root / name / "d/file").touch()
    found = [(change.layer, change.path) for batch in batches(source) for change in batch.changes]
    assert set(found) == {("second", b"d/file")}


@pytest.fixture
def bound(sandbox: Sandbox) -> Iterator[tuple[Path, Path]]:
    """A filesystem, and a bind mount of one of its directories elsewhere."""
    whole = Path(os.fsdecode(sandbox.mount_tmpfs(b"whole")))
    (whole / "part/layer/d").mkdir(parents=True)
    (whole / "other").mkdir()
    part = Path(os.fsdecode(sandbox.directory(b"bound")))
    mount(os.fsencode(whole / "part"), os.fsencode(part), flags=MS_BIND)
    yield whole, part
    umount(part)


def bare_source() -> FanotifySource:
    return FanotifySource(barrier_directory=None, content=False, unlimited_queue=True)


def test_a_layer_on_a_mount_that_shows_a_part_of_its_filesystem_is_told(bound: tuple[Path, Path]) -> None:
    whole, part = bound
    with contextlib.closing(bare_source()) as source:
        source.add(layer_at(part / "layer", mounted_at=part))
        (part / "layer/d/file").touch()
        (whole / "part/layer/d/by-the-other-way").touch()
        (whole / "part/beside").touch()
        (whole / "other/file").touch()
        assert paths(source) == {b"d/file", b"d/by-the-other-way"}
        (whole / "part/layer/d").rename(whole / "other/d")
        assert paths(source) == {b"d"}
        (whole / "other/d/outside").touch()
        assert paths(source) == set()
        (whole / "other/d").rename(whole / "part/layer/again")
        (batch,) = batches(source)
        assert batch.moved_in == (MovedIn("base", b"again"),)
        (part / "layer/again/file").touch()
        assert paths(source) == {b"again/file"}


@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["the wider mount last", "the wider mount first"])
def test_a_layer_that_contains_another_one_on_a_narrower_mount_is_told_of_it(
    bound: tuple[Path, Path], order: list[int]
) -> None:
    whole, part = bound
    layers = [
        layer_at(part / "layer", mounted_at=part, name="narrow"),
        layer_at(whole, mounted_at=whole, name="wide"),
    ]
    with contextlib.closing(bare_source()) as source:
        for number in order:
            source.add(layers[number])
        for _ in range(2):
            (part / "layer/d/file").touch()
            (part / "beside").touch()
            found = {(change.layer, change.path) for batch in batches(source) for change in batch.changes}
            assert found == {("narrow", b"d/file"), ("wide", b"part/layer/d/file"), ("wide", b"part/beside")}
            source.recover()
            (part / "layer/d/file").unlink()
            (part / "beside").unlink()
            batches(source)


def test_layers_on_mounts_of_different_parts_are_told(bound: tuple[Path, Path]) -> None:
    whole, part = bound
    mount(os.fsencode(whole / "other"), os.fsencode(whole / "other"), flags=MS_BIND)
    try:
        with contextlib.closing(bare_source()) as source:
            source.add(layer_at(part / "layer", mounted_at=part, name="one"))
            source.add(layer_at(whole / "other", mounted_at=whole / "other", name="two"))
            (part / "layer/d/file").touch()
            (whole / "other/sub").mkdir()
            batches(source)
            source.recover()
            (whole / "other/sub/file").touch()
            (part / "layer/d/file").unlink()
            found = {(change.layer, change.path) for batch in batches(source) for change in batch.changes}
            assert found == {("one", b"d/file"), ("two", b"sub/file")}
    finally:
        umount(whole / "other")


def test_umount_succeeds_while_the_source_is_idle(place: Path, root: Path, watch: Watch) -> None:
    (root / "a").mkdir()
    source = watch(root)
    (root / "a/file").touch()
    assert paths(source) == {b"a/file"}
    source.idle()
    umount(place)
    assert source.collect() is None


def test_umount_succeeds_while_the_source_works(place: Path, root: Path, watch: Watch) -> None:
    (root / "a").mkdir()
    source = watch(root)
    (root / "a/file").touch()
    batch = source.collect()
    assert batch is not None
    assert batch.look is not None
    umount(place)
    assert {change.path for change in batch.look()} == {b"a/file"}
    source.idle()
    assert source.collect() is None


def test_a_source_that_can_look_at_nothing_any_more_is_lost_and_not_silent(
    place: Path, root: Path, watch: Watch
) -> None:
    def lost() -> int:
        raise LayerError("the path shows something else now")

    source = watch()
    layer = layer_at(root, mounted_at=place)
    source.add(layer)
    object.__setattr__(layer, "open_mount", lost)
    (root / "file").touch()
    with pytest.raises(LayerError, match="something else now"):
        batches(source)


def test_an_overlay_without_an_upper_is_refused_and_leaves_nothing_open(sandbox: Sandbox, barriers: Path) -> None:
    merged = Path(os.fsdecode(sandbox.overlay(b"merged", b"one", b"two")))
    source = FanotifySource(barrier_directory=os.fsencode(barriers), content=True, unlimited_queue=True)
    with contextlib.closing(source):
        clone = layer_at(barriers, mounted_at=barriers)
        layer = WatchedLayer(
            "base",
            os.fsencode(merged),
            0,
            clone.root,
            clone.open,
            lambda: open_tree_clone(AT_FDCWD, os.fsencode(merged)),
        )
        with pytest.raises(UnsupportedError, match="no fanotify mark"):
            source.add(layer)
        with pytest.raises(UnsupportedError, match="no file handles"):
            source.add(WatchedLayer("base", b"/", 0, None, clone.open, clone.open_mount))
        (merged.parent / "one/file").touch()
        assert source.collect() is None


# ---- overflow, barriers, batches ------------------------------------------------------------------------------------


def test_overflow_is_told_once_and_what_comes_after_recovery_is_told_again(root: Path, watch: Watch) -> None:
    (root / "moved").mkdir()
    source = watch(root, unlimited_queue=False)
    (root / "moved/file").touch()
    batches(source)
    limit = int(Path("/proc/sys/fs/fanotify/max_queued_events").read_text())
    descriptor = os.open(root, os.O_RDONLY)
    for number in range(limit + 10):
        os.mknod(b"%d" % number, 0o100600, dir_fd=descriptor)
    os.close(descriptor)
    (root / "moved").rename(root / "renamed")
    got = batches(source)
    assert sum(batch.overflow for batch in got) == 1
    assert sum(len(batch.changes) for batch in got) == limit
    source.recover()
    (root / "renamed/file").unlink()
    (batch,) = batches(source)
    assert not batch.overflow
    assert [change.path for change in batch.changes] == [b"renamed/file"]


def test_a_barrier_comes_no_earlier_than_what_happened_before_it(root: Path, barriers: Path, watch: Watch) -> None:
    source = watch(root)
    expected = set()
    for number in range(50):
        (root / f"{number}").touch()
        expected.add(b"%d" % number)
        (barriers / f"token-{number}").touch()
        (barriers / f"token-{number}").unlink()
        if number % 10 == 9:
            got = batches(source)
            assert [name for batch in got for name in batch.barriers] == [
                b"token-%d" % n for n in range(number - 9, number + 1)
            ]
            assert {change.path for batch in got for change in batch.changes} == expected
            expected.clear()


def test_a_batch_is_complete_only_when_the_queue_was_emptied(
    root: Path, barriers: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fanotify, "FIRST_READ_BYTES", 8192)
    monkeypatch.setattr(fanotify, "EVENT_MAX_BYTES", 1024)
    monkeypatch.setattr(fanotify, "BATCH_BYTES", 8000)
    source = watch(root)
    for number in range(500):
        (root / f"{number}").touch()
    (barriers / "token").touch()
    got = batches(source)
    assert len(got) > 2
    assert [bool(batch.complete_ns) for batch in got] == [False] * (len(got) - 1) + [True]
    assert [batch.barriers for batch in got] == [()] * (len(got) - 1) + [(b"token",)]
    assert [change.path for batch in got for change in batch.changes] == [b"%d" % number for number in range(500)]


# ---- churn ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["tmpfs", "ext4"])
def arena(request: pytest.FixtureRequest, tmp_path: Path, images: Images, require: Require) -> Iterator[Path]:
    """A filesystem with a directory `layer` and one beside it."""
    require(has_tools_for(request.param), f"what makes a filesystem of type {request.param}")
    (tmp_path / "arena").mkdir()
    with images.mounted(request.param, tmp_path / "arena") as path:
        for name in ("layer", "outside"):
            (path / name).mkdir()
        yield path


def collected(source: FanotifySource) -> tuple[list[Change], set[bytes]]:
    """Changes, and the directories that are left to a scan."""
    got = batches(source)
    return [change for batch in got for change in batch.changes], {moved.path for b in got for moved in b.moved_in}


@pytest.mark.parametrize("seed", range(10))
def test_random_churn_leaves_no_difference_untold(arena: Path, seed: int) -> None:
    root = arena / "layer"
    churn = Churn(root, arena / "outside", seed)
    for _ in range(30):
        churn.step()
    with contextlib.closing(bare_source()) as source:
        source._mask |= fanotify.CONTENT_MASK
        source.add(layer_at(root, mounted_at=arena))
        for _ in range(8):
            before = snapshot(root)
            seen: list[Change] = []
            scanned: set[bytes] = set()
            for _ in range(churn.random.randrange(1, 60)):
                churn.step()
                if churn.random.random() < 0.1:
                    more, left = collected(source)
                    seen, scanned = seen + more, scanned | left
                if churn.random.random() < 0.05:
                    source.idle()
            more, left = collected(source)
            assert missed(before, snapshot(root), seen + more, scanned=scanned | left) == set()
            assert_every_directory_is_known(root, source)


def test_churn_while_the_source_reads_leaves_no_difference_untold(arena: Path) -> None:
    """Renames race with the looking up of paths; every path must be right when it has come to rest."""
    root = arena / "layer"
    churn = Churn(root, arena / "outside", 1)
    with contextlib.closing(bare_source()) as source:
        source._mask |= fanotify.CONTENT_MASK
        source.add(layer_at(root, mounted_at=arena))
        for _ in range(2):
            before = snapshot(root)
            writer = threading.Thread(target=churn.steps, args=(200,))
            seen: list[Change] = []
            scanned: set[bytes] = set()
            writer.start()
            while writer.is_alive():
                more, left = collected(source)
                seen, scanned = seen + more, scanned | left
            writer.join()
            more, left = collected(source)
            assert missed(before, snapshot(root), seen + more, scanned=scanned | left) == set()
            assert_every_directory_is_known(root, source)


def assert_every_directory_is_known(root: Path, source: FanotifySource) -> None:
    """A name that is made in any directory is told with its right path, and with that only."""
    probes = [Path(directory) / "probe" for directory, _, _ in os.walk(root)]
    for probe in probes:
        probe.touch()
    assert paths(source) == {os.fsencode(probe.relative_to(root)) for probe in probes}
    for probe in probes:
        probe.unlink()
    batches(source)
