"""`audit`: `watchd check` of one mount, first with nothing cached, then with everything."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.bench.arena import Arena
from tests.bench.loads import REPOSITORY
from tests.bench.report import WATCHD, Row, Target
from tests.bench.session import Session
from tests.bench.subjects import SubjectError

TARGET = Target(150.0)
MIB_IN_KIB = 1 << 10
NAMES = 1000
"""In each directory."""


class Observation(NamedTuple):
    """One check."""

    seconds: float
    peak_kib: int
    names: int
    """How many it looked at: what is not cached is passed over."""


def measure(session: Session) -> list[Row]:
    """Nothing stands beside it: no other program does this."""
    if not session.with_watchd:
        return []
    entries = session.scale.audited
    arena = Arena(session.workspace.base, max(1, entries // NAMES))
    try:
        arena.build()
        _fill(arena, entries)
        cold = session.attempt("audit of what is not cached", functools.partial(_check, arena.merged))
        _cache(arena.merged)
        cached = session.attempt("audit of what is cached", functools.partial(_check, arena.merged))
    finally:
        arena.dismantle()
        arena.merged.rmdir()
        arena.layers.rmdir()
    name = f"{entries:,} entries"
    rate = cached and cached.names / cached.seconds

    def row(what: str, unit: str, value: float | None, target: Target | None = None) -> Row:
        return Row("audit", f"{name}, {what}", unit, {WATCHD: value}, None, target)

    return [
        row("none cached", "s", cold and cold.seconds),
        row("all cached", "s", cached and cached.seconds),
        row("all cached, names looked at", "", cached and cached.names),
        row("all cached, names per second", "/s", rate),
        row("peak RSS", "MiB", cached and cached.peak_kib / MIB_IN_KIB, TARGET),
    ]


def _fill(arena: Arena, entries: int) -> None:
    directories = [path for parent in arena.lower.iterdir() for path in parent.iterdir()]
    for number, path in enumerate(directories):
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        for name in range(number, entries, len(directories)):
            os.mknod(f"file-{name}", dir_fd=directory)
        os.close(directory)


def _cache(merged: Path) -> None:
    for root, _, files in os.walk(merged):
        for name in files:
            os.stat(f"{root}/{name}")


def _check(merged: Path) -> Observation:
    command = [sys.executable, "-m", "watchd", "check", "--json", str(merged)]
    started = time.monotonic()
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        answer = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SubjectError(f"watchd check ended with status {process.returncode}")
    seconds = time.monotonic() - started
    return Observation(seconds, usage.ru_maxrss, json.loads(answer)["mounts"][0]["names"])
