"""Whatever happens, in whatever order, to the layers and through the mounts: after `sync` they show what fresh ones would.

The daemon sleeps (SIGSTOP) while things happen, so that nothing is healed before more has happened to it, and that the same
sequence is the same again. While somebody holds something open, a mount may be wrong about what `sync` reports with its
holders, and about nothing else. Writes through stale names damage the upper for good; the judge has that upper too.

One kind of damage no cache holds: a lower file that an upper one was copied up from and that has another name now. By its
origin the kernel gives both names one inode, in a fresh mount too, so one of them shows the other's content or says ESTALE,
whichever is looked up first. Such names are left out of the comparison.

WATCHD_RANDOM_EXAMPLES and WATCHD_RANDOM_SEED give longer runs and other ones; WATCHD_RANDOM_SHRINK=1 looks for the shortest
sequence that fails, for up to five minutes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.kernel.churning import IN_A_LOWER, PATHS, THROUGH_A_MOUNT, Operation, operate, plant
from tests.kernel.compare import Picture, look, names_below, open_root, open_twin
from tests.kernel.matrix import stale_of
from tests.kernel.running import Daemon, Json
from tests.kernel.sandbox import Options, Sandbox
from watchd.errors import WireError
from watchd.kernel.files import FileHandle
from watchd.overlay.access import handle_of
from watchd.wire.handles import OVL_FILEID_V1, parse_overlay_handle

EXAMPLES = int(os.environ.get("WATCHD_RANDOM_EXAMPLES", "100"))
SEED = int(os.environ.get("WATCHD_RANDOM_SEED", "1"))
PHASES = (Phase.generate, *((Phase.shrink,) if os.environ.get("WATCHD_RANDOM_SHRINK") else ()))
STEPS = 12

OPTIONS: dict[str, Options] = {
    "plain": (),
    "redirect_dir": ((b"redirect_dir", b"on"),),
    "metacopy": ((b"metacopy", b"on"), (b"redirect_dir", b"on")),
    "userxattr": ((b"userxattr", None),),
}

paths = st.sampled_from(PATHS)
numbers = st.integers(0, 9)


Happening = tuple[str, bytes, bytes, int]
LOOK_AT_ALL: Sequence[Happening] = [("look_at_all", b"", b"", 0)]


def happenings(operations: Iterable[str], *, most: int) -> st.SearchStrategy[list[Happening]]:
    """Some of these operations, one after the other."""
    return st.lists(
        st.tuples(st.sampled_from(list(operations)), paths, paths, numbers), min_size=most // 2, max_size=most
    )


@dataclass(frozen=True)
class Layout:
    lowers: int
    planted: int
    """So many layers, from the first lower on, have something in them."""
    has_upper: bool
    is_nested: bool
    options: str


layouts = st.builds(
    Layout, st.integers(1, 3), st.integers(1, 4), st.booleans(), st.booleans(), st.sampled_from(list(OPTIONS))
).filter(
    lambda layout: layout.has_upper or layout.lowers > 1  # the kernel takes no overlay of one layer
)


@dataclass(frozen=True)
class Mounted:
    path: bytes
    layers: Sequence[bytes]
    options: Options


class Sequences(RuleBasedStateMachine):
    """One stack of layers, mounted, and one daemon for all of them."""

    daemon: ClassVar[Daemon]
    home: ClassVar[Path]

    @initialize(
        layout=layouts, before=st.lists(st.tuples(st.integers(0, 3), happenings(IN_A_LOWER, most=4)), max_size=4)
    )
    def mount(self, layout: Layout, before: list[tuple[int, list[Happening]]]) -> None:
        self.sandbox = Sandbox(self.home)
        options = OPTIONS[layout.options]
        self.lowers = [self.sandbox.directory(b"low%d" % number) for number in range(layout.lowers)]
        upper = [self.sandbox.directory(b"up")] if layout.has_upper else []
        self.held: list[int] = []
        layers = [*self.lowers, *upper]
        for planted in layers[: layout.planted]:
            plant(planted)
        for which, happening in before:
            self._happen(IN_A_LOWER, layers[which % len(layers)], happening)
        self.mounts = [self._mount(b"merged", upper, self.lowers, options)]
        if layout.is_nested:
            inner = self.mounts[0].path
            self.mounts.append(self._mount(b"outer", [self.sandbox.directory(b"outer-up")], [inner], options))
        assert self.daemon.sync(self.mounts[-1].path) == []
        self.daemon.pause()

    def _mount(self, name: bytes, upper: list[bytes], lowers: list[bytes], options: Options) -> Mounted:
        chosen: list[tuple[bytes, bytes | None]] = [*options, *((b"lowerdir+", lower) for lower in lowers)]
        if upper:
            chosen += [(b"upperdir", upper[0]), (b"workdir", self.sandbox.directory(name + b"-work"))]
        return Mounted(self.sandbox.mount_overlay(name, chosen), [*upper, *lowers], options)

    @rule(which=st.integers(0, 2), look_before=st.booleans(), happening=happenings(IN_A_LOWER, most=10))
    def change_a_lower(self, which: int, look_before: bool, happening: list[Happening]) -> None:
        if look_before:
            for mounted in self.mounts:
                self._happen(THROUGH_A_MOUNT, mounted.path, LOOK_AT_ALL)
        self._happen(IN_A_LOWER, self.lowers[which % len(self.lowers)], happening)

    @rule(which=st.integers(0, 1), happening=happenings(THROUGH_A_MOUNT, most=4))
    def use_a_mount(self, which: int, happening: list[Happening]) -> None:
        self._happen(THROUGH_A_MOUNT, self.mounts[which % len(self.mounts)].path, happening)

    @rule(which=st.integers(0, 1), path=paths)
    def hold(self, which: int, path: bytes) -> None:
        with contextlib.suppress(OSError):
            self.held.append(os.open(self.mounts[which % len(self.mounts)].path + b"/" + path, os.O_RDONLY))

    @precondition(lambda self: self.held)
    @rule()
    def release(self) -> None:
        os.close(self.held.pop(0))

    @rule()
    def settle(self) -> None:
        self.daemon.resume()
        paths = [os.fsdecode(mounted.path) for mounted in self.mounts]
        answer = self.daemon.ask("sync", mounts=paths, timeout=20.0)
        for mounted in self.mounts:
            self._compare(mounted, _of(answer["mounts"], mounted.path))
        self.daemon.assert_calm()
        self.daemon.pause()

    def _happen(self, operations: Mapping[str, Operation], root: bytes, happening: Iterable[Happening]) -> None:
        for name, path, other, number in happening:
            operate(operations[name], root, path, other, number)

    def _compare(self, mounted: Mounted, told: Json) -> None:
        at = self.sandbox.directory(os.path.basename(mounted.path) + b".twin")
        stale = {os.fsencode(entry["path"]): entry for entry in stale_of(told)}
        with open_root(mounted.path) as root, open_twin(at, mounted.layers, options=mounted.options) as twin:
            asked = [*PATHS, *sorted(names_below(twin) - set(PATHS))]
            shown, true = look(root, asked), look(twin, asked)
        shown, true = _without_lost_content(shown, true), _without_lost_content(true, true)
        aliases = _aliases(mounted)
        wrong = {
            path: (shown[path], true[path])
            for path in shown
            if shown[path] != true[path] and path not in aliases and not _leads_through_link(path, shown, true)
        }
        if not self.held:
            assert (stale, wrong) == ({}, {}), told["state"]
        reported = {path for path, entry in stale.items() if entry["pinned_by"]}
        unreported = {path: what for path, what in wrong.items() if not _is_covered(path, reported)}
        assert unreported == {}, stale

    def teardown(self) -> None:
        if not hasattr(self, "mounts"):
            return
        try:
            while self.held:
                os.close(self.held.pop())
            self.settle()
        finally:
            self.daemon.resume()
            for descriptor in self.held:
                os.close(descriptor)
            self.sandbox.tidy_up()


PADDING = bytes(3)
"""That a handle has and the xattr has not."""


def _of(mounts: Sequence[Json], path: bytes) -> Json:
    return next(m for m in mounts if any(point["path"] == os.fsdecode(path) for point in m["mount_points"]))


def _without_lost_content(picture: Picture, true: Picture) -> Picture:
    """Files whose content is another's that is gone give EIO; a directory that the upper has part in does not list them."""
    lost = {path for path, what in true.items() if path and what[0] == os.strerror(errno.EIO)}

    def listed(directory: bytes, names: list[bytes] | None) -> list[bytes] | None:
        prefix = directory + b"/" if directory else b""
        return names if names is None else [name for name in names if prefix + name not in lost]

    changed = {b"": listed(b"", picture[b""])}
    for path, what in picture.items():
        if path:
            seen, tried = what
            is_directory = isinstance(seen, tuple) and seen[0] == stat.S_IFDIR
            changed[path] = ((*seen[:-1], listed(path, seen[-1])), tried) if is_directory else what
    return changed


def _aliases(mounted: Mounted) -> set[bytes]:
    """Names that share an inode because one was copied up from what has the other name now."""
    upper, *lowers = mounted.layers
    names: dict[FileHandle | None, set[bytes]] = {}
    for lower in lowers:
        for path in _files(lower):
            with contextlib.suppress(OSError):  # a directory of one layer lists whiteouts, too
                names.setdefault(_handle(lower + b"/" + path), set()).add(path)
    found = set()
    for path in _files(upper):
        if (origin := _origin(upper + b"/" + path)) is not None and (others := names.get(origin, set()) - {path}):
            found |= {path, *others}
    return found


def _files(layer: bytes) -> Iterator[bytes]:
    for directory, _, files in os.walk(layer):
        yield from (os.path.relpath(os.path.join(directory, file), layer) for file in files)


def _handle(path: bytes) -> FileHandle | None:
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        return handle_of(descriptor)
    finally:
        os.close(descriptor)


def _origin(path: bytes) -> FileHandle | None:
    for namespace in ("trusted", "user"):
        with contextlib.suppress(OSError, WireError):
            value = os.getxattr(path, f"{namespace}.overlay.origin", follow_symlinks=False)
            origin = parse_overlay_handle(OVL_FILEID_V1, PADDING + value)
            return FileHandle(origin.type, origin.fid)
    return None


def _leads_through_link(path: bytes, *pictures: Picture) -> bool:
    """Then it is not the name of what is found there."""
    above = path.rpartition(b"/")[0]
    while above:
        if any(isinstance(what := picture[above][0], tuple) and what[0] == stat.S_IFLNK for picture in pictures):
            return True
        above = above.rpartition(b"/")[0]
    return False


def _is_covered(path: bytes, reported: set[bytes]) -> bool:
    while path:
        if path in reported:
            return True
        path = path.rpartition(b"/")[0]
    return b"" in reported


@pytest.mark.timeout(400 + EXAMPLES * 2)
def test_random_sequences_end_in_the_truth(running: Daemon, tmp_path: Path) -> None:
    Sequences.daemon, Sequences.home = running, tmp_path
    run_state_machine_as_test(
        seed(SEED)(Sequences),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            phases=PHASES,
            suppress_health_check=list(HealthCheck),
        ),
    )
