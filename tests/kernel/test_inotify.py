"""InotifySource on a real tmpfs."""

from __future__ import annotations

import os
import select
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from watchd.errors import LayerError, UnsupportedError
from watchd.kernel.files import RENAME_EXCHANGE, name_to_handle_at, renameat2
from watchd.kernel.libc import AT_FDCWD
from watchd.kernel.mounts import open_tree_clone
from watchd.records import Change, Kind
from watchd.sources import inotify
from watchd.sources.base import Batch, WatchedLayer
from watchd.sources.held import TRIES_MAX
from watchd.sources.inotify import InotifySource
from watchd.sources.scan import changed_since, everything_below

from .churn import Churn, missed, snapshot
from .conftest import mount_tmpfs, umount


def layer_at(path: Path, *, name: str = "base") -> WatchedLayer:
    encoded = os.fsencode(path)

    def clone() -> int:
        return open_tree_clone(AT_FDCWD, encoded)

    return WatchedLayer(name, encoded, path.stat().st_dev, name_to_handle_at(AT_FDCWD, encoded, flags=0), clone, clone)


@pytest.fixture
def root(workspace: Path) -> Path:
    path = workspace / "layer"
    path.mkdir()
    return path


Watch = Callable[[Path], InotifySource]


@pytest.fixture
def watch(workspace: Path, tmp_path: Path) -> Iterator[Watch]:
    sources = []

    def start(path: Path) -> InotifySource:
        (tmp_path / "barrier").mkdir(exist_ok=True)
        source = InotifySource(barrier_directory=os.fsencode(tmp_path / "barrier"))
        sources.append(source)
        source.add(layer_at(path))
        return source

    yield start
    for source in sources:
        source.close()


def batches(source: InotifySource) -> list[Batch]:
    """Everything that is queued now, and what comes of it."""
    result = []
    while select.select([source], [], [], 0)[0]:
        batch = source.collect()
        assert batch is not None
        result.append(batch)
    return result


def changes(source: InotifySource) -> list[Change]:
    return [change for batch in batches(source) for change in batch.changes]


def told(source: InotifySource) -> set[tuple[bytes, int]]:
    return {(change.path, change.kinds) for change in changes(source)}


def watched_directories(source: InotifySource) -> int:
    return source.statistics()["watches"]


def directories(root: Path) -> int:
    return sum(1 for _ in os.walk(root))


# -- one change each --------------------------------------------------------------------------------------------------


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
    assert not found[b"removed"].exists
    assert found[b"written"].exists
    assert found[b"written"].inode == (root / "written").stat().st_ino
    assert not found[b"link"].is_dir


def test_names_that_are_not_utf8_lose_nothing_beside_them(root: Path, watch: Watch) -> None:
    os.mkdir(os.fsencode(root) + b"/\xff")
    source = watch(root)
    for name in (b"a", b"\xff/\xfe", b"z"):
        os.close(os.open(os.fsencode(root) + b"/" + name, os.O_CREAT | os.O_WRONLY))
    os.mkdir(os.fsencode(root) + b"/\xff/\xfd")
    assert sorted(change.path for change in changes(source)) == [b"a", b"z", b"\xff/\xfd", b"\xff/\xfe"]
    os.close(os.open(os.fsencode(root) + b"/\xff/\xfd/\xfc", os.O_CREAT | os.O_WRONLY))
    assert [change.path for change in changes(source)] == [b"\xff/\xfd/\xfc"]


def test_attributes_of_a_directory_are_told_once(root: Path, watch: Watch) -> None:
    (root / "d").mkdir()
    source = watch(root)
    (root / "d").chmod(0o700)
    assert [(change.path, change.kinds, change.is_dir) for change in changes(source)] == [(b"d", Kind.ATTRIB, True)]


def test_attributes_of_the_root_are_told_with_the_empty_path(root: Path, watch: Watch) -> None:
    source = watch(root)
    root.chmod(0o700)
    assert [(change.path, change.kinds, change.exists) for change in changes(source)] == [(b"", Kind.ATTRIB, True)]


def test_a_rename_tells_both_names(root: Path, watch: Watch) -> None:
    (root / "d").mkdir()
    (root / "old").touch()
    source = watch(root)
    (root / "old").rename(root / "d/new")
    found = {change.path: change for change in changes(source)}
    assert set(found) == {b"old", b"d/new"}
    assert (found[b"old"].kinds, found[b"old"].exists, found[b"old"].from_path) == (Kind.RENAME, False, None)
    assert (found[b"d/new"].kinds, found[b"d/new"].exists, found[b"d/new"].from_path) == (Kind.RENAME, True, b"old")


def test_below_a_renamed_directory_the_new_path_is_told(root: Path, watch: Watch) -> None:
    (root / "a/b/c").mkdir(parents=True)
    (root / "target").mkdir()
    source = watch(root)
    (root / "a").rename(root / "target/moved")
    (root / "target/moved/b/c/file").touch()
    found = {change.path: change for change in changes(source)}
    assert found[b"target/moved"].from_path == b"a"
    assert found[b"target/moved"].is_dir
    assert found[b"target/moved/b/c/file"].exists
    assert watched_directories(source) == directories(root)


def test_nothing_outside_the_layer_is_told(workspace: Path, root: Path, watch: Watch) -> None:
    source = watch(root)
    (workspace / "outside").touch()
    (root / "link").symlink_to(workspace)
    assert told(source) == {(b"link", Kind.CREATE)}
    (workspace / "outside").unlink()
    assert source.collect() is None


# -- directories that come and go -------------------------------------------------------------------------------------


def test_mkdir_p_in_a_loop_loses_nothing(root: Path, watch: Watch) -> None:
    source = watch(root)
    found: set[bytes] = set()
    for number in range(200):
        deep = root / f"{number}/a/b/c/d/e"
        deep.mkdir(parents=True)
        (deep / "file").touch()
        (deep.parent / "other").touch()
        if number % 7 == 0:
            found |= {change.path for change in changes(source)}
    found |= {change.path for change in changes(source)}
    assert found >= set(snapshot(root))
    assert watched_directories(source) == directories(root)
    (root / "199/a/b/c/d/e/file").unlink()
    assert told(source) == {(b"199/a/b/c/d/e/file", Kind.DELETE)}


def test_files_in_a_directory_that_appears_are_told_once_a_batch(root: Path, watch: Watch) -> None:
    source = watch(root)
    (root / "d").mkdir()
    (root / "d/file").touch()
    for batch in batches(source):
        paths = [change.path for change in batch.changes]
        assert len(paths) == len(set(paths))


def test_directories_created_and_deleted_in_a_loop_leave_no_watches(root: Path, watch: Watch) -> None:
    source = watch(root)
    found: set[bytes] = set()
    for number in range(500):
        (root / "d/e").mkdir(parents=True)
        (root / "d/e/file").touch()
        if number % 10 == 0:
            found |= {change.path for change in changes(source)}
        shutil.rmtree(root / "d")
    found |= {change.path for change in changes(source)}
    source.idle()
    changes(source)
    assert found >= {b"d", b"d/e", b"d/e/file"}
    assert watched_directories(source) == 1


def test_a_tree_moved_in_is_told_and_watched(workspace: Path, root: Path, watch: Watch) -> None:
    (workspace / "tree/a/b").mkdir(parents=True)
    (workspace / "tree/a/b/file").touch()
    source = watch(root)
    (workspace / "tree").rename(root / "tree")
    assert told(source) == {
        (b"tree", Kind.RENAME),
        (b"tree/a", Kind.CREATE),
        (b"tree/a/b", Kind.CREATE),
        (b"tree/a/b/file", Kind.CREATE),
    }
    (root / "tree/a/b/file").unlink()
    assert told(source) == {(b"tree/a/b/file", Kind.DELETE)}


def test_a_tree_moved_out_is_watched_no_longer(workspace: Path, root: Path, watch: Watch) -> None:
    (root / "tree/a/b").mkdir(parents=True)
    source = watch(root)
    (root / "tree").rename(workspace / "tree")
    assert told(source) == {(b"tree", Kind.RENAME)}
    source.idle()
    assert told(source) == set()
    (workspace / "tree/a/b/file").touch()
    assert source.collect() is None
    assert source.statistics() == {"watches": 1, "suspects": 0, "retired": 0}


def test_what_was_made_in_a_tree_while_it_was_out_is_told_when_it_is_back(
    workspace: Path, root: Path, watch: Watch
) -> None:
    (root / "tree/a").mkdir(parents=True)
    source = watch(root)
    (root / "tree").rename(workspace / "tree")
    (workspace / "tree/a/b").mkdir()
    changes(source)
    (workspace / "tree/a/b/file").touch()
    (workspace / "tree").rename(root / "tree")
    assert {b"tree/a/b", b"tree/a/b/file"} <= {change.path for change in changes(source)}
    (root / "tree/a/b/file").unlink()
    assert told(source) == {(b"tree/a/b/file", Kind.DELETE)}


def between(source: InotifySource, *happenings: Callable[[], object]) -> None:
    """Have these happen after the next readings and before what was read is looked at, one each."""
    read, left = source._read, iter(happenings)

    def read_first():  # type: ignore[no-untyped-def] # noqa: ANN202
        result = read()
        if result[0].records:
            next(left, bool)()
        return result

    source._read = read_first  # type: ignore[method-assign]


def test_a_directory_renamed_before_its_new_child_was_watched_is_walked_again(root: Path, watch: Watch) -> None:
    """The batch with the child's creation is read before the rename and looked at after it."""
    (root / "a").mkdir()
    source = watch(root)
    batches(source)
    (root / "a/child").mkdir()
    (root / "a/child/file").touch()
    between(source, lambda: (root / "a").rename(root / "b"))
    found = {change.path: change.exists for change in changes(source)}
    assert found == {b"a": False, b"b": True, b"b/child": True, b"b/child/file": True}
    (root / "b/child/file").unlink()
    assert told(source) == {(b"b/child/file", Kind.DELETE)}


def test_what_came_into_a_directory_that_was_renamed_before_the_look_is_told_where_it_lives_on(
    root: Path, watch: Watch
) -> None:
    (root / "a/deep").mkdir(parents=True)
    (root / "tree/sub").mkdir(parents=True)
    (root / "tree/sub/leaf").touch()
    (root / "file").touch()
    source = watch(root)
    (root / "tree").rename(root / "a/deep/tree")
    (root / "file").rename(root / "a/deep/file")
    (root / "a/deep/new").touch()
    between(
        source,
        lambda: (root / "a").rename(root / "b"),
        lambda: (root / "b").rename(root / "c"),
        lambda: (root / "c/deep").rename(root / "d"),
    )
    found = {change.path: (change.exists, change.from_path) for change in changes(source)}
    lives_on = {b"d/tree": (True, b"tree"), b"d/file": (True, b"file"), b"d/new": (True, None), b"d": (True, b"c/deep")}
    gone = dict.fromkeys([b"tree", b"file", b"a", b"b", b"c/deep"], False)
    assert {path: told for path, told in found.items() if told[0]} == lives_on | {b"c": (True, b"b")}
    assert {path: told[0] for path, told in found.items() if not told[0]} == gone
    source.idle()
    assert source.collect() is None
    (root / "d/tree/sub/leaf").unlink()
    assert told(source) == {(b"d/tree/sub/leaf", Kind.DELETE)}


def test_what_is_found_in_a_directory_that_appeared_is_told_behind_it_though_it_was_renamed_meanwhile(
    root: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = watch(root)
    (root / "a/sub").mkdir(parents=True)
    (root / "a/sub/leaf").touch()
    watch_name_selves = source._name_selves

    def rename(names: dict[int, dict[bytes, int]]) -> None:  # after the walk and before the look
        monkeypatch.undo()
        watch_name_selves(names)
        (root / "a").rename(root / "b")

    monkeypatch.setattr(source, "_name_selves", rename)
    found = [(change.path, change.exists) for change in changes(source)]
    assert found[:3] == [(b"a", True), (b"a/sub", True), (b"a/sub/leaf", True)]
    assert set(found[3:]) == {(b"a", False), (b"b", True)}


def test_a_namesake_that_took_the_place_of_a_renamed_directory_is_not_taken_for_it(root: Path, watch: Watch) -> None:
    (root / "a").mkdir()
    source = watch(root)
    (root / "a/file").touch()
    (root / "a/tree/sub").mkdir(parents=True)

    def replace() -> None:
        (root / "a").rename(root / "b")
        (root / "a").mkdir()

    between(source, replace)
    existing = {change.path for change in changes(source) if change.exists}
    assert existing == {b"a", b"b", b"b/file", b"b/tree", b"b/tree/sub"}
    assert watched_directories(source) == directories(root)


def test_a_directory_that_was_elsewhere_just_while_it_was_looked_for_is_looked_at_again(
    root: Path, watch: Watch
) -> None:
    (root / "a").mkdir()
    source = watch(root)
    (root / "a/file").touch()
    (root / "a/tree/sub").mkdir(parents=True)
    between(source, lambda: (root / "a").rename(root / "b"), lambda: (root / "b").rename(root / "a"))
    found = {change.path: change.exists for change in changes(source)}
    assert found == {b"a": True, b"b": False, b"a/file": True, b"a/tree": True, b"a/tree/sub": True}
    assert watched_directories(source) == directories(root)


def test_a_directory_of_whose_rename_half_was_read_is_not_taken_for_gone(
    root: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a").mkdir()
    source = watch(root)
    (root / "a/file").touch()
    (root / "a").rename(root / "b")
    monkeypatch.setattr(inotify, "LONGEST_EVENT_BYTES", 0)
    monkeypatch.setattr(inotify, "BATCH_BYTES", 1)
    size = 3 * 32  # a file made, closed, and the first half of the rename
    monkeypatch.setattr(inotify, "READ_BYTES", size)
    first = source.collect()
    assert first is not None
    assert [(change.path, change.exists) for change in first.changes] == [(b"a", False)]
    assert [(change.path, change.exists) for change in changes(source)] == [(b"b", True), (b"b/file", True)]


def test_what_left_the_layer_before_the_look_is_told_as_gone_and_holds_up_nothing(
    workspace: Path, tmp_path: Path, root: Path, watch: Watch
) -> None:
    (root / "a/deep").mkdir(parents=True)
    (root / "removed").mkdir()
    source = watch(root)
    (root / "a/deep/file").touch()
    (root / "removed/file").touch()
    (tmp_path / "barrier/token").touch()

    def leave() -> None:
        (root / "a").rename(workspace / "a")
        shutil.rmtree(root / "removed")

    between(source, leave)
    first = source.collect()
    assert first is not None
    assert (first.changes, first.barriers, first.complete_ns) == ([], (), 0)
    rest = batches(source)
    source.idle()
    rest += batches(source)
    assert {(change.path, change.exists) for batch in rest for change in batch.changes} >= {
        (b"a", False),
        (b"removed/file", False),
        (b"removed", False),
    }
    assert [batch.barriers for batch in rest if batch.barriers] == [(b"token",)]
    assert not any(batch.overflow for batch in rest)


def test_a_barrier_waits_for_what_could_not_be_looked_at_before_it_only(
    tmp_path: Path, root: Path, watch: Watch
) -> None:
    for name in ("a", "x"):
        (root / name).mkdir()
    source = watch(root)
    (root / "a/file").touch()
    (tmp_path / "barrier/first").touch()

    def go_on() -> None:
        (root / "b").rename(root / "c")
        (root / "x/file").touch()

    between(source, lambda: (root / "a").rename(root / "b"), go_on, lambda: (root / "x").rename(root / "y"))
    seen: set[bytes] = set()
    barriers: tuple[bytes, ...] = ()
    while not barriers:
        batch = source.collect()
        assert batch is not None
        seen |= {change.path for change in batch.changes if change.exists}
        barriers = batch.barriers
    assert barriers == (b"first",)
    assert b"c/file" in seen
    assert b"y/file" not in seen
    assert b"y/file" in {change.path for change in changes(source)}


def test_a_directory_that_is_never_where_it_is_looked_for_counts_as_lost_and_not_as_gone(
    tmp_path: Path, root: Path, watch: Watch
) -> None:
    (root / "0").mkdir()
    source = watch(root)
    (root / "0/file").touch()
    (tmp_path / "barrier/token").touch()
    storm = [
        lambda number=number: (root / f"{number}").rename(root / f"{number + 1}") for number in range(2 * TRIES_MAX)
    ]
    between(source, *storm)
    got = batches(source)
    assert [batch.overflow for batch in got].count(True) == 1
    assert [batch.barriers for batch in got if batch.barriers] == [(b"token",)]
    assert not any(change.path.endswith(b"file") for batch in got for change in batch.changes)
    source.recover()
    (root / f"{2 * TRIES_MAX}/file").unlink()
    assert told(source) == {(b"%d/file" % (2 * TRIES_MAX), Kind.DELETE)}


def test_a_directory_that_went_without_an_event_counts_as_lost_when_nothing_is_queued(
    root: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network filesystem, where another host may rename."""
    (root / "a").mkdir()
    source = watch(root)
    (root / "a/file").touch()
    monkeypatch.setattr(source, "_open", lambda path: None)
    assert changes(source) == []
    assert source.collect() is None
    source.idle()
    assert [batch.overflow for batch in batches(source)] == [True]
    source.idle()
    assert source.collect() is None


def test_an_exchange_of_two_directories_is_followed(workspace: Path, root: Path, watch: Watch) -> None:
    for name in ("x/inner", "y/inner"):
        (root / name).mkdir(parents=True)
    source = watch(root)
    for _ in range(3):
        (root / "x").rename(root / "t")
        (root / "y").rename(root / "x")
        (root / "t").rename(root / "y")
        changes(source)
        (root / "x/inner/in-x").touch()
        (root / "y/inner/in-y").touch()
        assert {path for path, _ in told(source)} == {b"x/inner/in-x", b"y/inner/in-y"}
        (root / "x/inner/in-x").unlink()
        (root / "y/inner/in-y").unlink()
        changes(source)


def test_two_directories_that_changed_places_in_one_step_stay_watched(root: Path, watch: Watch) -> None:
    for name in ("x/inner", "y/inner"):
        (root / name).mkdir(parents=True)
    source = watch(root)
    x, y = os.fsencode(root / "x"), os.fsencode(root / "y")
    for _ in range(3):
        renameat2(AT_FDCWD, x, AT_FDCWD, y, flags=RENAME_EXCHANGE)
        assert {b"x", b"y"} <= {path for path, _ in told(source)}
        source.idle()
        changes(source)
        assert watched_directories(source) == directories(root)
        names = ("x/in-x", "y/in-y", "x/inner/in-x", "y/inner/in-y")
        for name in names:
            (root / name).touch()
        assert {path for path, _ in told(source)} == {os.fsencode(name) for name in names}
        for name in names:
            (root / name).unlink()
        changes(source)


def test_a_symlink_swapped_in_for_a_directory_leads_nowhere(workspace: Path, root: Path, watch: Watch) -> None:
    (workspace / "secret/inner").mkdir(parents=True)
    (root / "d").mkdir()
    source = watch(root)
    (root / "d/inner").mkdir()
    shutil.rmtree(root / "d")
    (root / "d").symlink_to(workspace / "secret")
    found = {change.path: change for change in changes(source)}
    assert found[b"d"].exists
    assert not found[b"d"].is_dir
    assert not found[b"d/inner"].exists
    (workspace / "secret/inner/file").touch()
    assert changes(source) == []
    assert watched_directories(source) == 1


def test_a_tree_larger_than_the_bound_is_handed_over_to_a_scan(
    workspace: Path, root: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inotify, "FOUND_LIMIT", 5)
    (workspace / "tree/sub").mkdir(parents=True)
    for number in range(10):
        (workspace / f"tree/sub/{number}").touch()
    source = watch(root)
    (workspace / "tree").rename(root / "tree")
    (batch,) = batches(source)
    assert [(moved.layer, moved.path) for moved in batch.moved_in] == [("base", b"tree")]
    assert {change.path for found in everything_below(layer_at(root), b"tree") for change in found} == {
        b"tree/sub",
        *(b"tree/sub/%d" % number for number in range(10)),
    }
    (root / "tree/sub/3").unlink()
    assert told(source) == {(b"tree/sub/3", Kind.DELETE)}


def test_renaming_a_large_directory_to_and_fro_does_not_walk_it(
    root: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        (root / f"large/{number}").mkdir(parents=True)
    source = watch(root)
    (root / "large").rename(root / "settles")
    changes(source)
    added = []
    add = source._instance.add
    monkeypatch.setattr(source._instance, "add", lambda descriptor, mask: added.append(mask) or add(descriptor, mask))
    for _ in range(3):
        (root / "settles").rename(root / "between")
        (root / "between").rename(root / "settles")
        assert {path for path, _ in told(source)} == {b"settles", b"between"}
    assert len(added) == 3 * 2


# -- overflow, limits, barriers ---------------------------------------------------------------------------------------


def overflow(root: Path) -> None:
    (root / "a").touch()
    (root / "b").touch()
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for _ in range(limit // 2 + 1):
        (root / "a").chmod(0o600)
        (root / "b").chmod(0o600)


def test_overflow_is_told_and_recovery_watches_what_was_missed_and_comes_to_rest(
    workspace: Path, root: Path, watch: Watch
) -> None:
    for name in ("gone/below", "stays", "out/below"):
        (root / name).mkdir(parents=True)
    source = watch(root)
    overflow(root)
    (root / "new/sub").mkdir(parents=True)
    (root / "new/sub/missed").touch()
    (root / "stays").rename(root / "renamed")
    (root / "out").rename(workspace / "out")
    shutil.rmtree(root / "gone")
    assert any(batch.overflow for batch in batches(source))
    source.recover()
    assert watched_directories(source) == directories(root)
    assert not any(batch.overflow for batch in batches(source))
    source.idle()
    assert source.collect() is None
    (workspace / "out/below/file").touch()
    assert source.collect() is None
    (root / "new/sub/file").touch()
    (root / "renamed/file").touch()
    assert {path for path, _ in told(source)} == {b"new/sub/file", b"renamed/file"}


def test_a_scan_after_the_overflow_finds_what_no_event_told(root: Path, watch: Watch) -> None:
    source = watch(root)
    batches(source)
    (root / "before").touch()
    (batch,) = batches(source)
    overflow(root)
    (root / "new/sub").mkdir(parents=True)
    (root / "new/sub/missed").touch()
    assert any(batch.overflow for batch in batches(source))
    found = {change.path for part in changed_since(layer_at(root), batch.complete_ns) for change in part}
    assert {b"new", b"new/sub", b"new/sub/missed"} <= found


def test_dropping_many_watches_does_not_overflow_the_queue(
    workspace: Path, root: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inotify, "RETIRE_SLICE", 100)
    for number in range(1000):
        (root / f"out/{number}").mkdir(parents=True)
    source = watch(root)
    (root / "out").rename(workspace / "out")
    batches(source)
    source.idle()
    sizes = [batch.records["base"] for batch in batches(source)]
    assert sum(sizes) == 1001
    assert max(sizes) == 100
    assert source.statistics()["retired"] == 0


def test_a_layer_that_came_near_the_limit_of_watches_is_not_called_watched(
    root: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(10):
        (root / f"{number}/sub").mkdir(parents=True)
    limit = Path("/proc/sys/fs/inotify/max_user_watches")
    source = InotifySource()
    add = source._instance.add
    left = iter(range(5))

    def full(descriptor: int, mask: int) -> int:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        return add(descriptor, mask)

    monkeypatch.setattr(source._instance, "add", full)
    with pytest.raises(LayerError) as caught:
        source.add(layer_at(root))
    assert f"fs.inotify.max_user_watches to {int(limit.read_text()) - 5 + 21 + 1} or more" in caught.value.remedy
    (root / "0/file").touch()
    assert changes(source) == []
    assert watched_directories(source) == 0
    source.close()


def test_running_out_of_instances_names_the_limit() -> None:
    sources = []
    limit = int(Path("/proc/sys/fs/inotify/max_user_instances").read_text())
    try:
        with pytest.raises(LayerError, match="max_user_instances"):
            sources.extend(InotifySource() for _ in range(limit + 1))
    finally:
        for source in sources:
            source.close()


def test_a_second_layer_is_refused(workspace: Path, root: Path, watch: Watch) -> None:
    source = watch(root)
    with pytest.raises(UnsupportedError):
        source.add(layer_at(workspace, name="other"))


def test_a_barrier_comes_no_earlier_than_what_happened_before_it(tmp_path: Path, root: Path, watch: Watch) -> None:
    source = watch(root)
    expected = set()
    for number in range(50):
        (root / f"{number}").touch()
        expected.add(b"%d" % number)
        (tmp_path / f"barrier/token-{number}").touch()
        (tmp_path / f"barrier/token-{number}").unlink()
    got = batches(source)
    assert [name for batch in got for name in batch.barriers] == [b"token-%d" % number for number in range(50)]
    assert {change.path for batch in got for change in batch.changes} == expected


def test_a_batch_is_complete_only_when_the_queue_was_emptied(
    root: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inotify, "READ_BYTES", 4096)
    monkeypatch.setattr(inotify, "LONGEST_EVENT_BYTES", 512)
    monkeypatch.setattr(inotify, "BATCH_BYTES", 4096)
    source = watch(root)
    for number in range(200):
        (root / f"{number}").touch()
    got = batches(source)
    assert len(got) > 1
    assert [bool(batch.complete_ns) for batch in got] == [False] * (len(got) - 1) + [True]
    assert {change.path for batch in got for change in batch.changes} == {b"%d" % number for number in range(200)}


# -- mounts -----------------------------------------------------------------------------------------------------------


def test_umount_succeeds_while_the_source_is_idle_and_the_loss_is_raised(workspace: Path, watch: Watch) -> None:
    (workspace / "a/b").mkdir(parents=True)
    source = watch(workspace)
    (workspace / "a/file").touch()
    changes(source)
    source.idle()
    umount(workspace)
    with pytest.raises(OSError, match="unmounted"):
        source.collect()


def test_umount_succeeds_while_the_source_holds_a_clone(workspace: Path, watch: Watch) -> None:
    (workspace / "a").mkdir()
    source = watch(workspace)
    (workspace / "a/file").touch()
    changes(source)
    umount(workspace)
    assert source.collect() is None
    source.idle()
    with pytest.raises(OSError, match="unmounted"):
        source.collect()


def test_the_end_of_the_root_is_the_end_of_the_source(root: Path, watch: Watch) -> None:
    source = watch(root)
    source.idle()
    root.rmdir()
    with pytest.raises(OSError, match="root directory is gone"):
        source.collect()


def test_a_mount_inside_the_layer_is_not_entered(root: Path, watch: Watch) -> None:
    (root / "mounted/covered").mkdir(parents=True)
    mount_tmpfs(root / "mounted")
    try:
        (root / "mounted/foreign").mkdir()
        source = watch(root)
        (root / "mounted/foreign/file").touch()
        assert changes(source) == []
        assert watched_directories(source) == 3
    finally:
        umount(root / "mounted")


def test_a_removed_layer_tells_nothing_more(root: Path, watch: Watch) -> None:
    (root / "a").mkdir()
    source = watch(root)
    source.remove("other")
    (root / "a/told").touch()
    assert told(source)
    source.remove("base")
    (root / "a/untold").touch()
    assert told(source) == set()
    source.add(layer_at(root))
    (root / "a/again").touch()
    assert {path for path, _ in told(source)} == {b"a/again"}


# -- churn ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_random_churn_leaves_no_difference_untold_and_no_directory_unwatched(
    workspace: Path, root: Path, watch: Watch, seed: int
) -> None:
    (workspace / "outside").mkdir()
    churn = Churn(root, workspace / "outside", seed)
    for _ in range(30):
        churn.step()
    source = watch(root)
    for _ in range(8):
        before = snapshot(root)
        seen: list[Change] = []
        for _ in range(churn.random.randrange(1, 60)):
            churn.step()
            if churn.random.random() < 0.1:
                batch = source.collect()
                seen += batch.changes if batch else []
            if churn.random.random() < 0.05:
                source.idle()
        seen += changes(source)
        assert missed(before, snapshot(root), seen) == set()
        source.idle()
        changes(source)
        assert watched_directories(source) == directories(root)


@pytest.mark.parametrize("seed", range(3))
def test_churn_while_the_source_walks_leaves_no_difference_untold(
    workspace: Path, root: Path, watch: Watch, seed: int
) -> None:
    """Renames race with the walks; every path and every watch must be right when it has come to rest."""
    (workspace / "outside").mkdir()
    churn = Churn(root, workspace / "outside", seed)
    source = watch(root)
    before = snapshot(root)
    writer = threading.Thread(target=lambda: [churn.step() for _ in range(600)])
    seen: list[Change] = []
    writer.start()
    while writer.is_alive():
        seen += changes(source)
    writer.join()
    seen += changes(source)
    assert missed(before, snapshot(root), seen) == set()
    source.idle()
    changes(source)
    assert watched_directories(source) == directories(root)
    for directory, _, _ in os.walk(root):
        (Path(directory) / "probe").touch()
    probed = {change.path for change in changes(source)}
    assert probed == {path for path in snapshot(root) if path.endswith(b"probe")}
