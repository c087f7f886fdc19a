"""Where the benchmarks happen: overlays of their own, on a tmpfs, in a mount namespace that ends with them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

CLONE_NEWNS = 0x20000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 2
FANOUT = 1000

libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), what)


def _mount(source: str, target: Path, fstype: str, options: str) -> None:
    arguments = (os.fsencode(source), os.fsencode(target), os.fsencode(fstype))
    _check(libc.mount(*arguments, 0, os.fsencode(options)), f"mount {fstype}")


def enter_private_mount_namespace() -> None:
    """Give this process and its children mounts that nobody else sees. Raises OSError (EPERM unless root)."""
    _check(libc.unshare(CLONE_NEWNS), "unshare")
    _check(libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None), "make mounts private")


def directory_of(index: int) -> str:
    """Directory number `index` of a tree, relative to its root. No part of it is a number, unlike a load's names."""
    return f"d{index // FANOUT}/d{index % FANOUT}"


class Arena:
    """A tmpfs that holds one tree of directories, and overlays whose lower that tree is."""

    def __init__(self, base: Path, directories: int, overlays: int = 1) -> None:
        self.directories = directories
        self.layers = base / f"layers-{directories}-{overlays}"
        self.lower = self.layers / "lower"
        self.outside = self.layers / "outside"
        """On the same filesystem, in no layer."""
        self._mounts = base / f"merged-{directories}-{overlays}"
        self.all_merged = [self._mounts / str(number) for number in range(overlays)]
        self.merged = self.all_merged[0]
        self.pattern = f"{self._mounts}/*"
        """A glob for all of them and nothing else."""

    def build(self) -> None:
        """Mount and fill it. The parents of the directories, one for each 1 000, come on top of their number."""
        self.layers.mkdir()
        _mount("watchd-bench", self.layers, "tmpfs", "nr_inodes=0")
        for path in (self.lower, self.outside, self._mounts):
            path.mkdir()
        for index in range(self.directories):
            if index % FANOUT == 0:
                (self.lower / directory_of(index)).parent.mkdir()
            os.mkdir(f"{self.lower}/{directory_of(index)}")
        for merged in self.all_merged:
            upper, work = self.layers / f"upper-{merged.name}", self.layers / f"work-{merged.name}"
            for path in (merged, upper, work):
                path.mkdir()
            _mount("watchd-bench", merged, "overlay", f"lowerdir={self.lower},upperdir={upper},workdir={work}")

    def dismantle(self) -> None:
        """Unmount what `build` mounted, as far as it came."""
        for path in (*self.all_merged, self.layers):
            libc.umount2(os.fsencode(path), MNT_DETACH)


class Workspace:
    """Hands out arenas, each made once a run, and scratch directories on the real disk."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._arenas: dict[tuple[int, int], Arena] = {}

    def arena(self, directories: int, overlays: int = 1) -> Arena:
        """The arena whose lower has this many directories and this many overlays."""
        key = directories, overlays
        if key not in self._arenas:
            arena = self._arenas[key] = Arena(self.base, directories, overlays)
            arena.build()
        return self._arenas[key]

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A directory for one process, not on the watched tmpfs: what it writes is no load, and an fsync costs."""
        path = Path(tempfile.mkdtemp(dir=self.base))
        try:
            yield path
        finally:
            shutil.rmtree(path)

    def dismantle(self) -> None:
        """Unmount every arena."""
        for arena in self._arenas.values():
            arena.dismantle()


@contextlib.contextmanager
def workspace() -> Iterator[Workspace]:
    """A workspace that leaves nothing behind. Raises OSError if this process may not mount."""
    enter_private_mount_namespace()
    base = Path(tempfile.mkdtemp(prefix="watchd-bench-"))
    space = Workspace(base)
    try:
        yield space
    finally:
        space.dismantle()
        shutil.rmtree(base)
