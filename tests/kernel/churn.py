"""Random changes of a tree, and whether a source told of all of them."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from watchd.records import Change, Kind

Snapshot = dict[bytes, tuple[int, ...]]


def snapshot(root: Path) -> Snapshot:
    """Every path below `root` with what tells whether it changed."""
    result: Snapshot = {}
    for directory, subdirectories, files in os.walk(os.fsencode(root)):
        for name in subdirectories + files:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            # The times and the size of a directory change with its names, which are compared themselves.
            content = (0, 0) if os.path.isdir(path) else (status.st_size, status.st_ctime_ns)
            result[os.path.relpath(path, os.fsencode(root))] = (status.st_ino, status.st_mode, *content)
    return result


def missed(
    before: Mapping[bytes, object],
    after: Mapping[bytes, object],
    seen: Iterable[Change],
    *,
    scanned: Iterable[bytes] = (),
) -> set[bytes]:
    """Entries that differ and that neither a record of their own nor one of a renamed directory above tells of; `scanned`:
    directories of which all is known."""
    changes = list(seen)
    paths = {change.path for change in changes}
    known = {change.path for change in changes if change.kinds & Kind.RENAME} | set(scanned)

    def is_told(path: bytes) -> bool:
        parts = path.split(b"/")
        return path in paths or any(b"/".join(parts[:end]) in known for end in range(1, len(parts)))

    differing = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    return {path for path in differing if not is_told(path)}


class Churn:
    """Random changes in a layer and in a directory beside it, which trees move to and come from."""

    def __init__(self, root: Path, outside: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.root = root
        self.outside = outside

    def any_directory(self) -> Path:
        found = [Path(directory) for directory, _, _ in os.walk(self.root)]
        return self.random.choice(found)

    def any_entry(self) -> Path | None:
        found = [
            Path(directory) / name
            for directory, subdirectories, files in os.walk(self.root)
            for name in subdirectories + files
        ]
        return self.random.choice(found) if found else None

    def new_name(self) -> str:
        return f"n{self.random.randrange(12)}"

    def step(self) -> None:
        # Names that exist and directories moved into themselves are refused, and that is fine.
        with contextlib.suppress(OSError):
            self.random.choice(
                [self.make, self.make, self.tree, self.write, self.remove, self.move, self.move, self.out, self.back]
            )()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def make(self) -> None:
        (self.any_directory() / self.new_name()).mkdir()

    def tree(self) -> None:
        deep = self.any_directory() / self.new_name() / "p/q/r"
        deep.mkdir(parents=True)
        (deep / "leaf").write_text("leaf")

    def write(self) -> None:
        (self.any_directory() / f"file{self.random.randrange(12)}").write_text("x" * self.random.randrange(9))

    def remove(self) -> None:
        entry = self.any_entry()
        if entry is not None:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def move(self) -> None:
        entry = self.any_entry()
        if entry is not None:
            entry.rename(self.any_directory() / self.new_name())

    def out(self) -> None:
        entry = self.any_entry()
        if entry is not None:
            entry.rename(self.outside / self.new_name())

    def back(self) -> None:
        entries = sorted(self.outside.iterdir())
        if not entries:
            return
        entry = self.random.choice(entries)
        if entry.is_dir():
            (entry / f"added{self.random.randrange(9)}").mkdir()
        entry.rename(self.any_directory() / self.new_name())
