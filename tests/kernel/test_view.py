"""coherence.view on real overlays: what is said to be stale is, and what is not said to be is not."""

from __future__ import annotations

import errno
import functools
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.conftest import Require
from tests.kernel.images import READ_ONLY, WRITABLE, Images, has_tools_for
from tests.kernel.sandbox import Sandbox
from tests.kernel.views import open_view
from watchd.coherence.invalidate import invalidate
from watchd.coherence.target import LayerRoot, Target
from watchd.coherence.targets import CACHE_TELLS
from watchd.coherence.view import CACHED_TRIES, FEW, View
from watchd.kernel.files import CONFINED, RESOLVE_CACHED, try_openat2
from watchd.kernel.filesystems import filesystem_magic
from watchd.kernel.libc import AT_FDCWD
from watchd.kernel.mounts import open_tree_clone
from watchd.records import Kind

ANYTHING = int(sum(Kind))
STRUCTURE, ATTRIB = int(Kind.CREATE), int(Kind.ATTRIB)
NOT_CACHED = -errno.EAGAIN


class Busy:
    """Has something done before each listing of the layers, and counts these."""

    def __init__(self, view: View, happens: Callable[[int], None]) -> None:
        self._listing, self._happens, self.count = view.union.listing, happens, 0
        view.union.listing = self  # type: ignore[method-assign]

    def __call__(self, path: bytes) -> dict[bytes, bool]:
        self.count += 1
        self._happens(self.count)
        return self._listing(path)


class Merged:
    """An overlay, its layers, and watchd's view of it."""

    def __init__(self, path: bytes, *layers: bytes, upper: bool = False, cache_tells: bool = True) -> None:
        self.path = path
        self.layers = layers
        self.target = Target(
            "0:0",
            path,
            (path,),
            tuple(
                LayerRoot(layer, functools.partial(open_tree_clone, AT_FDCWD, layer), layer, cache_tells)
                for layer in layers
            ),
            functools.partial(open_tree_clone, AT_FDCWD, path),
            read_only=not upper,
            has_upper=upper,
        )

    def __call__(self, name: bytes) -> bytes:
        return self.path + b"/" + name

    def view(self) -> AbstractContextManager[View]:
        return open_view(self.target)

    def stale(self, suspects: dict[bytes, int], *, acted: bool = False) -> list[tuple[bytes, str]]:
        with self.view() as view:
            return [(stale.path, stale.kind) for stale in view.stale(suspects, acted=acted)]

    def kind(self, name: bytes, kinds: int = ANYTHING, *, acted: bool = False) -> str | None:
        found = self.stale({name: kinds}, acted=acted)
        assert found in ([], [(name, *(kind for _, kind in found))])
        return found[0][1] if found else None

    def invalidate(self) -> None:
        root = self.target.open()
        try:
            invalidate(root, read_only=self.target.read_only)
        finally:
            os.close(root)

    def cached(self, name: bytes) -> int:
        """0: it is in the cache, as there; else what openat2 says."""
        root = self.target.open()
        try:
            for _ in range(CACHED_TRIES):  # mounts elsewhere on the host make it miss
                descriptor = try_openat2(root, name, resolve=CONFINED | RESOLVE_CACHED)
                if descriptor != -errno.EAGAIN:
                    break
        finally:
            os.close(root)
        if descriptor < 0:
            return descriptor
        os.close(descriptor)
        return 0


def write(path: bytes, content: bytes = b"") -> bytes:
    """Like an editor or a package manager: a new file in the place of the old one."""
    with open(path + b".new", "wb") as file:
        file.write(content)
    os.rename(path + b".new", path)
    return path


# ---- filesystems whose cache tells ----------------------------------------------------------------------------------

FILESYSTEMS = (*WRITABLE, *READ_ONLY)


@pytest.fixture(params=FILESYSTEMS)
def on_filesystem(
    request: pytest.FixtureRequest, sandbox: Sandbox, images: Images, require: Require
) -> Iterator[tuple[Merged, int]]:
    """An overlay of two layers on a filesystem of each kind, and that filesystem's magic number."""
    fstype = request.param
    require(has_tools_for(fstype), f"what makes a filesystem of type {fstype}")
    content = Path(os.fsdecode(sandbox.directory(b"content")))
    at = Path(os.fsdecode(sandbox.directory(b"filesystem")))
    with images.mounted(fstype, at, content=content_of(content) if fstype in READ_ONLY else None):
        if fstype in WRITABLE:
            content_of(at)
        one, two = os.fsencode(at / "one"), os.fsencode(at / "two")
        merged = sandbox.mount_overlay(b"merged", [(b"lowerdir+", one), (b"lowerdir+", two)])
        root = os.open(one, os.O_RDONLY)
        magic = filesystem_magic(root)
        os.close(root)
        yield Merged(merged, one, two), magic
        sandbox.umount(b"merged")


def content_of(root: Path) -> Path:
    for layer in ("one", "two"):
        (root / layer / "d").mkdir(parents=True)
    (root / "one/d/file").write_text("content")
    (root / "two/d/below").write_text("content")
    return root


def test_every_filesystem_that_is_trusted_is_tested(images: Images) -> None:
    assert len(FILESYSTEMS) == len(CACHE_TELLS)


def test_the_cache_tells_of_what_was_looked_up_and_of_nothing_after_an_invalidation(
    on_filesystem: tuple[Merged, int],
) -> None:
    merged, magic = on_filesystem
    assert magic in CACHE_TELLS
    names = {b"d": 0, b"d/file": 0, b"d/below": 0, b"d/none": -errno.ENOENT}
    assert {name: merged.cached(name) for name in names} == dict.fromkeys(names, NOT_CACHED)
    for name in names:
        os.path.exists(merged(name))
    assert {name: merged.cached(name) for name in names} == names
    merged.invalidate()
    assert {name: merged.cached(name) for name in names} == dict.fromkeys(names, NOT_CACHED)


@pytest.mark.parametrize("acted", [False, True])
@pytest.mark.parametrize("others", [0, FEW])
def test_a_name_that_nobody_looked_up_is_not_cached_by_looking_whether_it_is_stale(
    on_filesystem: tuple[Merged, int], acted: bool, others: int
) -> None:
    """Else verification would itself make what goes stale later."""
    merged, _ = on_filesystem
    names = [b"d", b"d/file", b"d/below", b"d/none", *(b"d/other-%d" % number for number in range(others))]
    assert merged.stale(dict.fromkeys(names, ANYTHING), acted=acted) == []
    assert {name: merged.cached(name) for name in names} == dict.fromkeys(names, NOT_CACHED)
    os.stat(merged(b"d"))
    assert merged.stale(dict.fromkeys(names[1:], ANYTHING), acted=acted) == []
    assert {name: merged.cached(name) for name in names[1:]} == dict.fromkeys(names[1:], NOT_CACHED)


def test_what_is_cached_and_right_is_not_called_stale(on_filesystem: tuple[Merged, int]) -> None:
    merged, _ = on_filesystem
    suspects = {b"d": STRUCTURE, b"d/file": ANYTHING, b"d/below": ANYTHING, b"d/none": ANYTHING}
    held = [os.open(merged(name), os.O_RDONLY) for name in (b"d", b"d/file", b"d/below")]
    os.listdir(held[0])
    os.path.exists(merged(b"d/none"))
    assert merged.stale(suspects, acted=True) == []
    for descriptor in held:
        os.close(descriptor)


# ---- what is stale, and how -----------------------------------------------------------------------------------------


@pytest.fixture
def merged(sandbox: Sandbox) -> Merged:
    """Two lowers; `d` is in both, `d/file` in the upper one and `d/below` in the lower one."""
    one, two = sandbox.directory(b"one"), sandbox.directory(b"two")
    for layer in (one, two):
        os.mkdir(layer + b"/d")
    write(one + b"/d/file", b"old")
    write(two + b"/d/below", b"old")
    return Merged(sandbox.overlay(b"merged", b"one", b"two"), one, two)


@pytest.fixture
def writable(sandbox: Sandbox) -> Merged:
    """The same over one lower, with an upper above."""
    upper, lower = sandbox.directory(b"upper"), sandbox.directory(b"lower")
    os.mkdir(lower + b"/d")
    write(lower + b"/d/file", b"old")
    return Merged(sandbox.overlay(b"merged", b"lower", upper=b"upper"), upper, lower, upper=True)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_name_that_came_after_it_was_looked_for_is_missing(merged: Merged, layer: int) -> None:
    assert not os.path.exists(merged(b"d/new"))
    write(merged.layers[layer] + b"/d/new")
    assert not os.path.exists(merged(b"d/new"))
    assert merged.kind(b"d/new") == "missing"
    merged.invalidate()
    assert merged.kind(b"d/new", acted=True) is None
    assert os.path.exists(merged(b"d/new"))


def test_a_name_that_went_is_a_ghost(merged: Merged) -> None:
    held = os.open(merged(b"d/file"), os.O_RDONLY)
    os.unlink(merged.layers[0] + b"/d/file")
    assert merged.kind(b"d/file") == "ghost"
    merged.invalidate()
    assert merged.kind(b"d/file", acted=True) == "ghost"
    os.close(held)
    merged.invalidate()
    assert merged.kind(b"d/file", acted=True) is None


def test_a_whiteout_that_appears_makes_a_ghost(merged: Merged) -> None:
    os.stat(merged(b"d/below"))
    os.mknod(merged.layers[0] + b"/d/below", 0o020000, 0)
    assert merged.kind(b"d/below") == "ghost"


def test_another_file_of_the_same_name_is_replaced(merged: Merged) -> None:
    os.stat(merged(b"d/file"))
    write(merged.layers[0] + b"/d/file", b"new")
    assert merged.kind(b"d/file") == "replaced"
    merged.invalidate()
    assert merged.kind(b"d/file", acted=True) is None


def test_a_file_that_covers_another_one_replaces_it(merged: Merged) -> None:
    os.stat(merged(b"d/below"))
    write(merged.layers[0] + b"/d/below", b"covers")
    assert merged.kind(b"d/below") == "replaced"


def test_a_directory_made_anew_is_replaced_and_so_is_all_below_it(merged: Merged) -> None:
    os.stat(merged(b"d/file"))
    os.rename(merged.layers[0] + b"/d", merged.layers[0] + b"/old")
    os.mkdir(merged.layers[0] + b"/d")
    write(merged.layers[0] + b"/d/file", b"old")
    assert merged.stale({b"d": ANYTHING, b"d/file": ANYTHING}) == [(b"d", "replaced"), (b"d/file", "replaced")]


def test_a_directory_that_became_a_file_and_back_is_replaced(merged: Merged) -> None:
    os.stat(merged(b"d/file"))
    os.rename(merged.layers[0] + b"/d", merged.layers[0] + b"/old")
    write(merged.layers[0] + b"/d", b"a file now")
    assert merged.kind(b"d") == "replaced"
    assert merged.kind(b"d/file") == "ghost"
    merged.invalidate()
    assert not os.path.exists(merged(b"d/file"))
    os.unlink(merged.layers[0] + b"/d")
    os.rename(merged.layers[0] + b"/old", merged.layers[0] + b"/d")
    assert merged.kind(b"d") == "replaced"


def test_writing_in_place_makes_nothing_stale(merged: Merged) -> None:
    held = os.open(merged(b"d/file"), os.O_RDONLY)
    with open(merged.layers[0] + b"/d/file", "ab") as file:
        file.write(b"more")
    os.utime(merged.layers[0] + b"/d/file", (1, 1))
    assert merged.kind(b"d/file", acted=True) is None
    assert os.read(held, 100) == b"oldmore"
    os.close(held)


# ---- permissions ----------------------------------------------------------------------------------------------------


def readable_by_nobody(path: bytes) -> bool:
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "test", "-r", os.fsdecode(path)]
    return subprocess.run(command, check=False).returncode == 0


@pytest.fixture
def visible(sandbox: Sandbox, merged: Merged) -> Iterator[None]:
    """Strangers may come as far as the sandbox."""
    path = Path(os.fsdecode(sandbox.root))
    ours = [parent for parent in path.parents if parent.stat().st_mode & 0o777 == 0o700]
    for parent in ours:
        parent.chmod(0o711)
    yield
    for parent in ours:
        parent.chmod(0o700)


@pytest.mark.parametrize(("before", "after"), [(0o644, 0o600), (0o600, 0o644)])
def test_what_others_may_is_stale_until_it_is_what_the_layer_grants(
    merged: Merged, visible: None, before: int, after: int
) -> None:
    lower = merged.layers[0] + b"/d/file"
    os.chmod(lower, before)
    held = os.open(merged(b"d/file"), os.O_RDONLY)
    os.chmod(lower, after)
    assert readable_by_nobody(merged(b"d/file")) == bool(before & 0o004)
    for acted in (False, True):
        assert merged.kind(b"d/file", ATTRIB, acted=acted) == "permission"
    os.close(held)
    merged.invalidate()
    assert merged.kind(b"d/file", ATTRIB, acted=True) is None
    assert readable_by_nobody(merged(b"d/file")) == bool(after & 0o004)


def test_a_new_owner_is_noticed(merged: Merged) -> None:
    lower = merged.layers[0] + b"/d/file"
    os.chmod(lower, 0o600)
    held = os.open(merged(b"d/file"), os.O_RDONLY)
    os.chown(lower, 1234, 1234)
    assert merged.kind(b"d/file", ATTRIB, acted=True) == "permission"
    os.close(held)


@pytest.mark.parametrize("mode", [0o755, 0o4755, 0o700])
def test_an_executable_in_use_whose_attributes_changed_is_not_called_coherent(merged: Merged, mode: int) -> None:
    """It may still be setuid, which shows at execve only."""
    lower = merged.layers[0] + b"/d/file"
    os.chmod(lower, 0o4755)
    held = os.open(merged(b"d/file"), os.O_RDONLY)
    os.chmod(lower, mode)
    merged.invalidate()
    assert merged.kind(b"d/file", ATTRIB, acted=True) == "permission"
    os.close(held)
    merged.invalidate()
    assert merged.kind(b"d/file", ATTRIB, acted=True) is None


# ---- directories ----------------------------------------------------------------------------------------------------


def test_a_listing_that_somebody_holds_is_stale_for_everybody(merged: Merged) -> None:
    held = os.open(merged(b"d"), os.O_RDONLY)
    os.listdir(held)
    write(merged.layers[1] + b"/d/new")
    assert b"new" not in os.listdir(merged(b"d"))
    assert merged.kind(b"d", STRUCTURE, acted=False) == "listing"
    merged.invalidate()
    assert merged.kind(b"d", STRUCTURE, acted=True) == "listing"
    os.close(held)
    merged.invalidate()
    assert merged.kind(b"d", STRUCTURE, acted=True) is None
    assert b"new" in os.listdir(merged(b"d"))


def test_a_directory_that_changes_while_it_is_compared_is_neither_stale_nor_compared_again(merged: Merged) -> None:
    os.listdir(merged(b"d"))
    with merged.view() as view:
        busy = Busy(view, lambda count: os.close(os.open(merged.layers[0] + b"/d/%d" % count, os.O_CREAT)))
        assert not view.lists_otherwise(b"d")
        assert busy.count == 1
        os.unlink(merged.layers[0] + b"/d/1")
        busy = Busy(view, lambda count: None)
        assert not view.lists_otherwise(b"d")
        assert busy.count == 1


def test_a_held_listing_is_found_stale_at_one_comparison_though_its_directory_goes_on_changing(merged: Merged) -> None:
    held = os.open(merged(b"d"), os.O_RDONLY)
    os.listdir(held)
    write(merged.layers[0] + b"/d/new")
    with merged.view() as view:
        busy = Busy(view, lambda count: os.unlink(write(merged.layers[0] + b"/d/passing")))
        assert view.lists_otherwise(b"d")
        assert busy.count == 1
    os.close(held)


def test_a_directory_in_use_whose_listing_is_right_is_not_called_stale(merged: Merged) -> None:
    held = os.open(merged(b"d"), os.O_RDONLY)
    assert merged.kind(b"d", ANYTHING, acted=True) is None
    os.close(held)


def test_a_directory_in_use_that_the_upper_shares_is_not_called_replaced(writable: Merged) -> None:
    """Of a directory that upper and lower share the kernel reveals the lower one."""
    write(writable(b"d/in-upper"))
    held = os.open(writable(b"d"), os.O_RDONLY)
    assert writable.kind(b"d", ANYTHING, acted=True) is None
    assert writable.kind(b"", ANYTHING, acted=True) is None
    os.close(held)


def test_a_directory_in_use_that_only_the_upper_has_is_not_called_replaced(writable: Merged) -> None:
    os.mkdir(writable(b"only-upper"))
    held = os.open(writable(b"only-upper"), os.O_RDONLY)
    assert writable.kind(b"only-upper", ANYTHING, acted=True) is None
    os.close(held)


@pytest.mark.parametrize("again", [False, True])
def test_the_lower_part_of_a_directory_is_missed_when_it_goes(writable: Merged, again: bool) -> None:
    write(writable(b"d/in-upper"))
    os.stat(writable(b"d"))
    os.rename(writable.layers[1] + b"/d", writable.layers[1] + b"/old")
    if again:
        os.mkdir(writable.layers[1] + b"/d")
    assert writable.kind(b"d", STRUCTURE) == "replaced"
    writable.invalidate()
    assert writable.kind(b"d", STRUCTURE, acted=True) is None
    assert os.listdir(writable(b"d")) == [b"in-upper"]


def test_a_directory_that_comes_into_being_below_one_of_the_upper_is_noticed(writable: Merged) -> None:
    os.mkdir(writable(b"only-upper"))
    held = os.open(writable(b"only-upper"), os.O_RDONLY)
    os.listdir(held)
    os.mkdir(writable.layers[1] + b"/only-upper")
    write(writable.layers[1] + b"/only-upper/new")
    assert writable.kind(b"only-upper", STRUCTURE) is not None
    assert writable.kind(b"only-upper", STRUCTURE, acted=True) is not None
    os.close(held)


def test_a_copied_up_file_in_use_is_not_called_replaced_whatever_becomes_of_the_lower_one(writable: Merged) -> None:
    """The kernel reveals what it was copied from."""
    held = os.open(writable(b"d/file"), os.O_RDWR | os.O_APPEND)
    os.write(held, b"copied up")
    assert writable.kind(b"d/file", ANYTHING, acted=True) is None
    write(writable.layers[1] + b"/d/file", b"of no concern")
    assert writable.kind(b"d/file", ANYTHING, acted=True) is None
    os.unlink(writable.layers[1] + b"/d/file")
    assert writable.kind(b"d/file", ANYTHING, acted=True) is None
    os.close(held)


def test_a_file_made_in_the_upper_is_not_called_replaced(writable: Merged) -> None:
    held = os.open(writable(b"d/new"), os.O_CREAT | os.O_WRONLY, 0o755)
    assert writable.kind(b"d/new", ANYTHING, acted=True) is None
    os.close(held)


# ---- overlays that tell less ----------------------------------------------------------------------------------------


@pytest.fixture
def nested(sandbox: Sandbox, merged: Merged) -> Merged:
    """An overlay over an overlay, whose objects have no handles."""
    outer, extra = sandbox.overlay(b"outer", b"merged", b"extra"), sandbox.path(b"extra")
    return Merged(outer, merged.path, extra, cache_tells=False)


def test_in_an_overlay_over_an_overlay_what_is_right_is_not_called_stale(nested: Merged) -> None:
    held = [os.open(nested(name), os.O_RDONLY) for name in (b"d", b"d/file")]
    assert nested.stale({b"d": STRUCTURE, b"d/file": ANYTHING, b"d/none": ANYTHING}, acted=True) == []
    for descriptor in held:
        os.close(descriptor)


def test_in_an_overlay_over_an_overlay_what_went_stale_is_found(nested: Merged, merged: Merged) -> None:
    held = os.open(nested(b"d/file"), os.O_RDONLY)
    write(merged.layers[0] + b"/d/file", b"something new")
    merged.invalidate()
    assert nested.kind(b"d/file") is not None
    os.close(held)


# ---- all that is cached ---------------------------------------------------------------------------------------------


def test_the_names_that_are_cached_are_those_that_were_looked_up(merged: Merged) -> None:
    write(merged.layers[0] + b"/d/other")
    os.mkdir(merged.layers[1] + b"/unseen")
    write(merged.layers[1] + b"/unseen/file")
    os.stat(merged(b"d/file"))
    with merged.view() as view:
        assert {path for path, _ in view.cached_names()} == {b"", b"d", b"d/file"}
        assert merged.cached(b"unseen") == NOT_CACHED
