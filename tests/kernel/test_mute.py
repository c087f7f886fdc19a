"""Busy directories outside of all layers are muted in the kernel, and nothing that concerns a layer is."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Require
from watchd.records import Kind
from watchd.sources import mute
from watchd.sources.base import MovedIn
from watchd.sources.fanotify import FanotifySource

from .churn import Churn, missed, snapshot
from .conftest import umount
from .images import Images, has_tools_for
from .sandbox import MS_BIND, mount
from .test_fanotify_source import batches, changes, collected, layer_at, paths, told

FEW = 4


@pytest.fixture(autouse=True)
def hot_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory is hot after FEW names."""
    monkeypatch.setattr(mute, "HOT_EVENTS", FEW)


@pytest.fixture
def place(workspace: Path) -> Path:
    """The root of a filesystem."""
    for name in ("layer/d", "outside/sub", "barriers"):
        (workspace / name).mkdir(parents=True)
    return workspace


@pytest.fixture
def root(place: Path) -> Path:
    """The layer's."""
    return place / "layer"


@pytest.fixture
def outside(place: Path) -> Path:
    """A directory on the same filesystem."""
    return place / "outside"


@pytest.fixture
def source(place: Path, root: Path) -> Iterator[FanotifySource]:
    """Watches the layer, its barrier directory being on the same filesystem."""
    source = FanotifySource(barrier_directory=os.fsencode(place / "barriers"), content=True, unlimited_queue=True)
    with contextlib.closing(source):
        source.add(layer_at(root, mounted_at=place))
        yield source


def heat(source: FanotifySource, directory: Path) -> None:
    """Make it hot."""
    for number in range(2 * FEW):  # half of the count may be forgotten meanwhile
        (directory / f"hot-{number}").touch()
    batches(source)


def muted(source: FanotifySource, directory: Path) -> None:
    """Make it hot and see that nothing is heard of it any more."""
    heat(source, directory)
    (directory / "hot-0").chmod(0o600)
    (directory / "hot-0").write_text("x")
    (directory / "unheard").mkdir()
    (directory / "unheard").rmdir()
    assert not is_readable(source)


def is_readable(source: FanotifySource) -> bool:
    return bool(select.select([source], [], [], 0)[0])


# ---- what muting does -----------------------------------------------------------------------------------------------


def test_whoever_writes_one_file_outside_is_heard_of_a_few_times_only(source: FanotifySource, outside: Path) -> None:
    descriptor = os.open(outside / "database", os.O_RDWR | os.O_CREAT)
    woken = 0
    for number in range(20 * FEW):
        os.pwrite(descriptor, b"x", number)
        if is_readable(source):
            woken += 1
            batches(source)
    os.close(descriptor)
    assert 0 < woken <= 2 * FEW  # half of the count is forgotten each second
    assert (len(source.mutes), source.mutes.set) == (1, 1)


def test_what_is_below_a_muted_directory_is_heard(source: FanotifySource, outside: Path) -> None:
    muted(source, outside)
    (outside / "sub/file").touch()
    assert is_readable(source)


def test_nothing_of_a_layer_is_muted_however_busy(source: FanotifySource, root: Path) -> None:
    for _ in range(3):
        heat(source, root)
        heat(source, root / "d")
    assert len(source.mutes) == 0
    (root / "d/file").touch()
    assert paths(source) == {b"d/file"}


def test_barriers_are_never_muted(source: FanotifySource, place: Path) -> None:
    for number in range(3 * FEW):
        (place / f"barriers/{number}").touch()
        assert [name for batch in batches(source) for name in batch.barriers] == [b"%d" % number]


def test_the_directory_that_a_layer_lies_in_is_never_muted(source: FanotifySource, place: Path, root: Path) -> None:
    heat(source, place)
    root.chmod(0o700)
    assert told(source) == {(b"", Kind.ATTRIB)}


def test_there_are_never_more_marks_than_allowed(
    source: FanotifySource, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mute, "MUTED_MAX", 2)
    for name in "abc":
        (outside / name).mkdir()
        muted(source, outside / name)
    assert len(source.mutes) == 2
    (outside / "a/heard").touch()
    assert is_readable(source)


def test_the_directories_counted_have_a_bound(
    source: FanotifySource, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mute, "COUNTED_MAX", 10)
    for number in range(30):
        (outside / f"{number}").mkdir()
        (outside / f"{number}/file").touch()
        batches(source)
        assert len(source.mutes._counts) <= 11


def test_a_directory_that_is_seldom_heard_of_stays_unmuted(source: FanotifySource, outside: Path) -> None:
    now_ns = time.monotonic_ns()
    for seconds in range(3 * FEW):
        (outside / f"{seconds}").touch()
        batches(source)
        source.mutes.update(now_ns + (1 + seconds) * 2 * mute.HALF_LIFE_NS)
    assert len(source.mutes) == 0


# ---- what must be heard all the same --------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "sub"], ids=["itself", "below the one that moves"])
def test_a_muted_directory_that_moves_into_a_layer_is_heard_scanned_and_doubted(
    source: FanotifySource, root: Path, outside: Path, below: str
) -> None:
    (outside / "tree/sub").mkdir(parents=True)
    muted(source, outside / "tree" / below)
    (outside / "tree").rename(root / "d/came")
    (root / "d/came" / below / "before-anybody-looked").touch()
    (batch,) = batches(source)
    assert batch.moved_in == (MovedIn("base", b"d/came"),)
    assert batch.linked == {"base"}
    assert len(source.mutes) == 0
    (root / "d/came" / below / "after").touch()
    assert [os.path.basename(path) for path in paths(source)] == [b"after"]


def test_a_muted_directory_moved_in_before_the_one_it_came_from_is_scanned_too(
    source: FanotifySource, root: Path, outside: Path
) -> None:
    muted(source, outside / "sub")
    (outside / "sub").rename(root / "came")
    outside.rename(root / "source")
    told_of = [moved for batch in batches(source) for moved in batch.moved_in]
    assert {MovedIn("base", b"came"), MovedIn("base", b"source")} <= set(told_of)
    (root / "came/after").touch()
    assert paths(source) == {b"came/after"}


def test_files_that_move_between_a_muted_directory_and_a_layer_are_told(
    source: FanotifySource, root: Path, outside: Path
) -> None:
    muted(source, outside)
    (outside / "hot-0").rename(root / "in")
    assert told(source) == {(b"in", Kind.RENAME)}
    (root / "in").rename(outside / "out")
    assert told(source) == {(b"in", Kind.RENAME)}
    (outside / "hot-1").rename(root / "d/replaced")
    (outside / "hot-2").rename(root / "d/replaced")
    assert told(source) == {(b"d/replaced", Kind.RENAME)}


def test_a_file_that_was_opened_in_a_muted_directory_is_heard_where_it_is_now(
    source: FanotifySource, root: Path, outside: Path
) -> None:
    muted(source, outside)
    descriptor = os.open(outside / "hot-0", os.O_WRONLY)
    (outside / "hot-0").rename(root / "in")
    batches(source)
    os.write(descriptor, b"more")
    os.close(descriptor)
    assert told(source) == {(b"in", Kind.MODIFY)}


def test_the_name_in_a_layer_of_a_muted_file_is_heard(source: FanotifySource, root: Path, outside: Path) -> None:
    muted(source, outside)
    os.link(outside / "hot-0", root / "linked")
    assert told(source) == {(b"linked", Kind.CREATE)}
    (root / "linked").chmod(0o640)
    (root / "linked").write_text("through the layer")
    assert told(source) == {(b"linked", Kind.ATTRIB | Kind.MODIFY)}
    (root / "linked").unlink()
    assert told(source) == {(b"linked", Kind.DELETE)}


@pytest.mark.parametrize("layer", ["outside", "outside/sub", "."], ids=["the muted one", "one in it", "one around it"])
def test_a_layer_that_is_added_later_is_heard(source: FanotifySource, place: Path, outside: Path, layer: str) -> None:
    muted(source, outside)
    source.add(layer_at(place / layer, mounted_at=place, name="later"))
    (place / layer).chmod(0o700)
    (outside / "sub/file").touch()
    (outside / "file").touch()
    expected = {
        os.path.relpath(path, os.fsencode(place / layer)) if path != os.fsencode(place / layer) else b""
        for path in (os.fsencode(p) for p in (place / layer, outside / "sub/file", outside / "file"))
        if path.startswith(os.fsencode((place / layer).resolve()))
    }
    assert paths(source, layer="later") == expected


def test_a_muted_directory_that_is_bind_mounted_and_becomes_a_layer_is_heard(
    source: FanotifySource, place: Path, outside: Path, tmp_path: Path
) -> None:
    muted(source, outside)
    (tmp_path / "bound").mkdir()
    mount(os.fsencode(outside), os.fsencode(tmp_path / "bound"), flags=MS_BIND)
    try:
        source.add(layer_at(tmp_path / "bound", mounted_at=tmp_path / "bound", name="later"))
        (outside / "file").touch()
        (tmp_path / "bound/other").touch()
        assert paths(source, layer="later") == {b"file", b"other"}
        source.remove("later")
        source.idle()
    finally:
        umount(tmp_path / "bound")


def test_a_layer_that_moves_into_a_muted_directory_is_heard(source: FanotifySource, root: Path, outside: Path) -> None:
    muted(source, outside)
    root.rename(outside / "layer")
    batches(source)
    (outside / "layer").chmod(0o700)
    assert (b"", Kind.ATTRIB) in told(source)


def test_after_an_overflow_everything_is_heard_again(place: Path, root: Path, outside: Path) -> None:
    (outside / "tree").mkdir()
    source = FanotifySource(barrier_directory=None, content=False, unlimited_queue=False)
    with contextlib.closing(source):
        source.add(layer_at(root, mounted_at=place))
        muted(source, outside / "tree")
        limit = int(Path("/proc/sys/fs/fanotify/max_queued_events").read_text())
        for number in range(limit + 10):
            os.mknod(os.fsencode(root / f"{number}"), 0o100600)
        (outside / "tree").rename(root / "came")
        assert any(batch.overflow for batch in batches(source))
        (root / "came/lost").touch()
        assert b"came/lost" not in paths(source)
        source.recover()
        (root / "came/told").touch()
        assert paths(source) == {b"came/told"}


@pytest.fixture(params=["tmpfs", "ext4", "xfs", "btrfs"])
def arena(request: pytest.FixtureRequest, tmp_path: Path, images: Images, require: Require) -> Iterator[Path]:
    """A filesystem with a layer and a directory beside it."""
    require(has_tools_for(request.param), f"what makes a filesystem of type {request.param}")
    (tmp_path / "arena").mkdir()
    with images.mounted(request.param, tmp_path / "arena") as path:
        for name in ("layer", "outside"):
            (path / name).mkdir()
        yield path


def test_every_kind_of_filesystem_can_be_muted_and_heard_again(arena: Path) -> None:
    with contextlib.closing(FanotifySource(barrier_directory=None, content=True, unlimited_queue=True)) as source:
        source.add(layer_at(arena / "layer", mounted_at=arena))
        muted(source, arena / "outside")
        (arena / "outside").rename(arena / "layer/came")
        batches(source)
        (arena / "layer/came/after").touch()
        assert paths(source) == {b"came/after"}


def test_marks_that_the_kernel_dropped_are_set_again(tmp_path: Path, images: Images, require: Require) -> None:
    require(has_tools_for("ext4"), "mkfs.ext4")
    (tmp_path / "arena").mkdir()
    with images.mounted("ext4", tmp_path / "arena") as arena:
        (arena / "layer").mkdir()
        (arena / "outside").mkdir()
        with contextlib.closing(FanotifySource(barrier_directory=None, content=True, unlimited_queue=True)) as source:
            source.add(layer_at(arena / "layer", mounted_at=arena))
            muted(source, arena / "outside")
            os.sync()  # a dirty inode stays in memory
            source.idle()
            Path("/proc/sys/vm/drop_caches").write_text("2")
            muted(source, arena / "outside")
            assert (len(source.mutes), source.mutes.set) == (1, 2)


@pytest.mark.parametrize("seed", range(10))
def test_random_churn_that_mutes_at_once_leaves_no_difference_untold(
    place: Path, root: Path, outside: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mute, "HOT_EVENTS", 1)
    churn = Churn(root, outside, seed)
    churn.steps(30)
    with contextlib.closing(FanotifySource(barrier_directory=None, content=True, unlimited_queue=True)) as source:
        source.add(layer_at(root, mounted_at=place))
        for _ in range(8):
            before = snapshot(root)
            seen, scanned = [], set()
            for _ in range(churn.random.randrange(1, 60)):
                churn.step()
                if churn.random.random() < 0.3:
                    more, left = collected(source)
                    seen, scanned = seen + more, scanned | left
                for entry in outside.iterdir():
                    if entry.is_dir() and churn.random.random() < 0.3:
                        (entry / "stir").touch()
            more, left = collected(source)
            assert missed(before, snapshot(root), seen + more, scanned=scanned | left) == set()
            for directory, _, _ in os.walk(root):
                probe = Path(directory) / "probe"
                probe.touch()
                assert paths(source) == {os.fsencode(probe.relative_to(root))}
                probe.unlink()
                changes(source)
        assert source.mutes.set > 0
