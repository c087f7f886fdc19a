"""What was written through a stale name is told; what somebody did on purpose is not."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from tests.kernel.accidents import replace
from tests.kernel.sandbox import Options, Sandbox
from tests.kernel.views import open_view
from watchd.coherence.damage import (
    GONE,
    MOVED,
    REMOVED,
    REPLACED,
    RETURNED,
    TICK_NS,
    WRITTEN,
    Window,
    find_damage,
    remaining,
    upper_paths,
)
from watchd.coherence.invalidate import invalidate
from watchd.coherence.target import LayerRoot, Target
from watchd.coherence.view import View
from watchd.kernel.libc import AT_FDCWD
from watchd.kernel.mounts import open_tree_clone

CLOCK_REALTIME_COARSE = 5
"""include/uapi/linux/time.h; Python does not name it."""

METACOPY: dict[str, Options] = {
    "metacopy": [(b"redirect_dir", b"on"), (b"metacopy", b"on")],
    "plain": [(b"metacopy", b"off")],
    "userxattr": [(b"userxattr", None)],
}


class Scene:
    """A lower with `f` and `g`, of which the merged mount has everything cached."""

    def __init__(self, sandbox: Sandbox, options: Options) -> None:
        self.low, self.up, self.merged = (sandbox.directory(name) for name in (b"low", b"up", b"merged"))
        for name in (b"/f", b"/g", b"/d/inside"):
            os.makedirs(os.path.dirname(self.low + name), exist_ok=True)
            with open(self.low + name, "wb") as file:
                file.write(b"old content of " + name)
        layers = [(b"lowerdir+", self.low), (b"upperdir", self.up), (b"workdir", sandbox.directory(b"work"))]
        sandbox.mount_overlay(b"merged", [*layers, *options])
        for name in (b"/f", b"/g", b"/d/inside", b"/new"):
            os.path.exists(self.merged + name)
        self.target = Target(
            "0:0",
            self.merged,
            (self.merged,),
            tuple(
                LayerRoot(layer, functools.partial(open_tree_clone, AT_FDCWD, layer), layer)
                for layer in (self.up, self.low)
            ),
            functools.partial(open_tree_clone, AT_FDCWD, self.merged),
            has_upper=True,
            userxattr=(b"userxattr", None) in options,
        )

    def view(self) -> AbstractContextManager[View]:
        return open_view(self.target)

    def on_disk(self) -> dict[bytes, str]:
        """What is found without having watched."""
        with self.view() as view:
            return {entry.path: entry.reason for batch in upper_paths(view) for entry in find_damage(view, batch)}

    def seen(self, *names: bytes, since_ns: int, until_ns: int | None = None) -> dict[bytes, str]:
        """What is found when these names were known to be stale."""
        with self.view() as view:
            windows = dict.fromkeys(names, Window(since_ns, until_ns))
            return {entry.path: entry.reason for entry in find_damage(view, [], windows=windows)}

    def invalidate(self) -> None:
        with self.view() as view:
            invalidate(view.merged, read_only=False)


@pytest.fixture(params=METACOPY)
def scene(request: pytest.FixtureRequest, sandbox: Sandbox) -> Scene:
    return Scene(sandbox, METACOPY[request.param])


@pytest.fixture
def plain(sandbox: Sandbox) -> Scene:
    return Scene(sandbox, METACOPY["plain"])


@pytest.fixture
def metacopy(sandbox: Sandbox) -> Scene:
    return Scene(sandbox, METACOPY["metacopy"])


def wait_a_tick() -> int:
    """Until the clock that files are stamped with has gone on; the time by then."""
    begun_ns = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)
    while time.clock_gettime_ns(CLOCK_REALTIME_COARSE) - begun_ns < 2 * TICK_NS:
        os.sched_yield()
    return time.time_ns()


@contextlib.contextmanager
def pinned(path: bytes) -> Iterator[None]:
    """Whoever drops the host's caches does not unmake what is stale."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield
    finally:
        os.close(descriptor)


def append(path: bytes) -> None:
    with open(path, "ab") as file:
        file.write(b" and more")


def move_away(scene: Scene) -> None:
    os.rename(scene.low + b"/f", scene.low + b"/moved")
    replace(scene.low + b"/f", b"NEW")


DEEDS: dict[str, Callable[[bytes], object]] = {
    "appended": append,
    "attributes changed": lambda path: os.chmod(path, 0o600),
    "removed": os.unlink,
    "renamed over": lambda path: replace(path, b"mine"),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_what_is_done_to_a_name_that_is_known_to_be_stale_is_damage(scene: Scene, deed: str) -> None:
    with pinned(scene.merged + b"/f"):
        replace(scene.low + b"/f", b"NEW")
        since_ns = wait_a_tick()
        DEEDS[deed](scene.merged + b"/f")
        assert scene.seen(b"f", since_ns=since_ns) == {b"f": _expected(scene, deed)}
        assert scene.seen(b"f", since_ns=since_ns, until_ns=wait_a_tick()) == {b"f": _expected(scene, deed)}


def _expected(scene: Scene, deed: str) -> str:
    if deed == "attributes changed" and "trusted.overlay.metacopy" in os.listxattr(scene.up + b"/f"):
        return REPLACED
    return REMOVED if deed == "removed" else WRITTEN


@pytest.mark.parametrize("deed", DEEDS)
def test_what_was_done_before_a_name_went_stale_is_not(plain: Scene, deed: str) -> None:
    DEEDS[deed](plain.merged + b"/f")
    since_ns = wait_a_tick()
    replace(plain.low + b"/f", b"NEW")
    assert plain.seen(b"f", since_ns=since_ns) == {}
    assert plain.on_disk() == {}


@pytest.mark.parametrize("deed", DEEDS)
def test_what_was_done_after_it_was_healed_is_not(scene: Scene, deed: str) -> None:
    replace(scene.low + b"/f", b"NEW")
    since_ns = time.time_ns()
    scene.invalidate()
    until_ns = time.time_ns()
    DEEDS[deed](scene.merged + b"/f")
    assert scene.seen(b"f", since_ns=since_ns, until_ns=until_ns) == {}
    assert scene.on_disk() == {}


def test_a_write_to_what_the_lower_has_now_is_not_damage_though_the_name_was_stale_before(scene: Scene) -> None:
    """Its dentry went by itself, under memory pressure."""
    replace(scene.low + b"/f", b"NEW")
    since_ns = time.time_ns()
    scene.invalidate()
    append(scene.merged + b"/f")
    assert scene.seen(b"f", since_ns=since_ns) == {}


def test_a_new_file_over_one_that_the_mount_did_not_show_is_damage(scene: Scene) -> None:
    replace(scene.low + b"/new", b"of the lower")
    since_ns = wait_a_tick()
    assert scene.on_disk() == {}
    os.close(os.open(scene.merged + b"/new", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    assert scene.seen(b"new", since_ns=since_ns) == {b"new": WRITTEN}


def test_old_content_that_comes_back_is_damage_and_its_removal_is_not(plain: Scene) -> None:
    with pinned(plain.merged + b"/f"), pinned(plain.merged + b"/g"):
        os.unlink(plain.low + b"/f")
        os.unlink(plain.low + b"/g")
        since_ns = wait_a_tick()
        append(plain.merged + b"/f")
        os.unlink(plain.merged + b"/g")
        assert plain.seen(b"f", b"g", since_ns=since_ns) == {b"f": RETURNED}


def test_writes_below_a_stale_directory_are_damage(plain: Scene) -> None:
    with pinned(plain.merged + b"/d/inside"):
        os.rename(plain.low + b"/d", plain.low + b"/d.old")
        os.mkdir(plain.low + b"/d")
        replace(plain.low + b"/d/inside", b"NEW")
        since_ns = wait_a_tick()
        append(plain.merged + b"/d/inside")
        assert plain.seen(b"d", since_ns=since_ns) == {b"d/inside": WRITTEN}


# ---- from the disk alone --------------------------------------------------------------------------------------------


def test_a_metacopy_over_replaced_data_is_damage(metacopy: Scene) -> None:
    os.chmod(metacopy.merged + b"/f", 0o600)
    assert metacopy.on_disk() == {}
    replace(metacopy.low + b"/f", b"NEW")
    assert metacopy.on_disk() == {b"f": REPLACED}


def test_a_metacopy_made_through_a_stale_name_is_damage(metacopy: Scene) -> None:
    with pinned(metacopy.merged + b"/f"):
        replace(metacopy.low + b"/f", b"NEW")
        os.chmod(metacopy.merged + b"/f", 0o600)
        assert metacopy.on_disk() == {b"f": REPLACED}


def test_a_metacopy_whose_data_is_gone_is_damage(metacopy: Scene) -> None:
    os.chmod(metacopy.merged + b"/f", 0o600)
    os.unlink(metacopy.low + b"/f")
    assert metacopy.on_disk() == {b"f": GONE}
    metacopy.invalidate()
    with pytest.raises(OSError, match="Input/output error"), open(metacopy.merged + b"/f", "rb"):
        pass


@pytest.mark.parametrize("to", [b"/renamed", b"/d/renamed"])
def test_a_renamed_metacopy_is_judged_by_where_its_data_is(metacopy: Scene, to: bytes) -> None:
    os.rename(metacopy.merged + b"/f", metacopy.merged + to)
    assert metacopy.on_disk() == {}
    replace(metacopy.low + b"/f", b"NEW")
    assert metacopy.on_disk() == {to[1:]: REPLACED}


def test_a_layer_that_was_copied_elsewhere_is_not_damage(metacopy: Scene) -> None:
    os.chmod(metacopy.merged + b"/f", 0o600)
    status = os.stat(metacopy.low + b"/f")
    with open(metacopy.low + b"/f", "rb") as file:
        replace(metacopy.low + b"/f", file.read())
    os.utime(metacopy.low + b"/f", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert metacopy.on_disk() == {}


def test_a_copy_of_what_the_lower_had_moved_away_is_damage(plain: Scene) -> None:
    with pinned(plain.merged + b"/f"), pinned(plain.merged):
        move_away(plain)
        os.stat(plain.low + b"/moved")
        wait_a_tick()
        append(plain.merged + b"/f")
        assert plain.on_disk() == {b"f": MOVED}


def test_a_copy_of_what_the_lower_moved_away_later_is_not(plain: Scene) -> None:
    append(plain.merged + b"/f")
    wait_a_tick()
    move_away(plain)
    assert plain.on_disk() == {}


def test_a_rename_in_the_merged_mount_is_not_damage(scene: Scene) -> None:
    wait_a_tick()
    os.rename(scene.merged + b"/g", scene.merged + b"/f")
    assert scene.on_disk() == {}


def test_a_directory_of_the_lower_that_was_swapped_as_a_whole_damages_nothing(plain: Scene) -> None:
    """Its files are older than the copy, and came to their place after it."""
    os.mkdir(plain.low + b"/d.new")
    replace(plain.low + b"/d.new/inside", b"NEW")
    wait_a_tick()
    append(plain.merged + b"/d/inside")
    wait_a_tick()
    os.rename(plain.low + b"/d", plain.low + b"/d.old")
    os.rename(plain.low + b"/d.new", plain.low + b"/d")
    assert plain.on_disk() == {}


@pytest.mark.parametrize("deed", ["renamed over", "removed"])
def test_what_users_do_on_purpose_is_not_damage(plain: Scene, deed: str) -> None:
    DEEDS[deed](plain.merged + b"/f")
    assert plain.on_disk() == {}
    wait_a_tick()
    replace(plain.low + b"/f", b"NEW")
    assert plain.on_disk() == {}


def test_damage_is_remembered_until_its_upper_entry_is_gone(metacopy: Scene) -> None:
    os.chmod(metacopy.merged + b"/f", 0o600)
    os.unlink(metacopy.low + b"/f")
    with metacopy.view() as view:
        damage = find_damage(view, [b"f", b"g", b"none/such"])
        assert [entry.path for entry in damage] == [b"f"]
        assert remaining(view, damage) == damage
        os.unlink(metacopy.up + b"/f")
        assert remaining(view, damage) == []
