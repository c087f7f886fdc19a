"""Loads that go on at a steady rate beside what is measured, each in a process of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import msgspec

from tests.bench.arena import Arena, directory_of
from tests.bench.loads import REPOSITORY

TICK_S = 0.001
STALE_NAMES = 5000
"""So many names take turns at becoming stale."""
CREATED_IN = 64
RECORD = b"r" * 512
RECORDS = 1000


class Done(msgspec.Struct, frozen=True):
    """What a background load came to."""

    steps: int
    seconds: float

    @property
    def per_second(self) -> float:
        """Its rate as it was."""
        return self.steps / self.seconds


class Background:
    """A load that begins when the `with` block is entered, and ends with it; `done` says then what it came to."""

    done: Done

    def __init__(self, kind: str, *arguments: object, rate: int) -> None:
        """`rate`: steps a second, as far as the machine goes."""
        self._command = [sys.executable, "-m", "tests.bench.background", kind, str(rate), *map(str, arguments)]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY, start_new_session=True
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        with self._process as process:
            answer, _ = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"the load ended with status {process.returncode}")
        self.done = msgspec.json.decode(answer, type=Done)


def stale_names(arena: Arena, rate: int) -> Background:
    """Names of the lower that come and go after the merged mount was asked for them: each is stale until it is healed."""
    return Background("stale", arena.lower, arena.merged, arena.directories, rate=rate)


def database(file: Path, rate: int) -> Background:
    """Writes records of a file in place, each followed by fdatasync."""
    return Background("write", file, rate=rate)


def creations(directory: Path, rate: int) -> Background:
    """Makes files in a number of new directories, which it leaves behind."""
    return Background("create", directory, rate=rate)


def _stale(lower: str, merged: str, directories: str) -> Iterator[None]:
    names = [f"{directory_of(number % int(directories))}/stale-{number}" for number in range(STALE_NAMES)]
    in_lower, in_merged = ([f"{root}/{name}" for name in names] for root in (lower, merged))
    for ours in in_lower:  # an earlier load ended in the middle
        with contextlib.suppress(FileNotFoundError):
            os.unlink(ours)
    for turn in itertools.count():
        for ours, theirs in zip(in_lower, in_merged, strict=True):
            os.access(theirs, os.F_OK)
            if turn % 2:
                os.unlink(ours)
            else:
                os.mknod(ours)
            yield


def _write(file: str) -> Iterator[None]:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for number in itertools.count():
        os.pwrite(descriptor, RECORD, number % RECORDS * len(RECORD))
        os.fdatasync(descriptor)
        yield


def _create(directory: str) -> Iterator[None]:
    for number in range(CREATED_IN):
        os.makedirs(f"{directory}/{number}")
    for number in itertools.count():
        os.close(os.open(f"{directory}/{number % CREATED_IN}/{number}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC))
        yield


KINDS: dict[str, Callable[..., Iterator[None]]] = {"stale": _stale, "write": _write, "create": _create}


def main() -> None:
    """Usage: background KIND RATE ARGUMENT...; until stdin closes."""
    kind, rate, *arguments = sys.argv[1:]
    at_once = max(1, round(int(rate) * TICK_S))
    tick_s = at_once / int(rate)
    steps = KINDS[kind](*arguments)
    next(steps)
    print("begun", flush=True)
    started = due = time.perf_counter()
    taken = 0
    while not select.select([sys.stdin], [], [], max(0.0, due - time.perf_counter()))[0]:
        for _ in range(at_once):
            next(steps)
        taken += at_once
        due = max(due + tick_s, time.perf_counter() - tick_s)  # what a slow machine did not manage is not made up for
    print(msgspec.json.encode(Done(taken, time.perf_counter() - started)).decode())


if __name__ == "__main__":
    main()
