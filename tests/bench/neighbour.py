"""`neighbour`: a warm walk through files elsewhere on the host, while names of a lower go stale and are healed."""

from __future__ import annotations

import functools
import os
import statistics
import time
from pathlib import Path

from tests.bench.background import stale_names
from tests.bench.daemon import WatchdFanotify
from tests.bench.report import WATCHD, Row, Target
from tests.bench.session import Session
from tests.bench.subjects import DropCachesLoop, Nobody, Subject

NOBODY = "nobody"
SUBJECTS: dict[str, type[Subject]] = {NOBODY: Nobody, WATCHD: WatchdFanotify, "drop_caches loop": DropCachesLoop}
FILES_IN_DIRECTORY = 100
RATIO_TARGET = Target(1.05, is_ratio=True)


def measure(session: Session) -> list[Row]:
    """One row: medians of walks that alternate between the subjects."""
    files = session.scale.neighbour_files
    walks: dict[str, list[float]] = {name: [] for name in session.selected(SUBJECTS)}
    with session.workspace.scratch() as tree:
        _populate(tree, files)
        for _ in range(session.scale.neighbour_turns):
            for name, taken in walks.items():
                kind = SUBJECTS[name]
                seconds = session.attempt(f"walk with {name}", functools.partial(_observe, session, kind, tree))
                taken += seconds or []
    values: dict[str, float | None] = {
        name: statistics.median(taken) if taken else None for name, taken in walks.items()
    }
    return [Row("neighbour", f"walk of {files:,} files", "s", values, NOBODY, RATIO_TARGET)]


def _populate(tree: Path, files: int) -> None:
    for number in range(files):
        if number % FILES_IN_DIRECTORY == 0:
            directory = tree / str(number)
            directory.mkdir()
        (directory / str(number)).touch()


def _observe(session: Session, kind: type[Subject], tree: Path) -> list[float]:
    arena, scale = session.small_arena, session.scale
    with kind(session.workspace, arena):
        _walk(tree)
        with stale_names(arena, scale.neighbour_rate):
            return [_walk(tree) for _ in range(scale.neighbour_walks)]


def _walk(tree: Path) -> float:
    """Look at every file; the seconds that it took."""
    started = time.perf_counter()
    pending = [os.fspath(tree)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    entry.stat()
    return time.perf_counter() - started
