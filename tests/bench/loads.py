"""What happens to a lower while it is measured.

`Churn` is the heavy load: plain system calls from processes of their own. `LightLoad` is the light one: single
changes that leave the merged mount stale, each followed by a wait for the truth.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from tests.bench.arena import Arena, directory_of

WORKERS = 2
REPOSITORY = Path(__file__).resolve().parents[2]
POLL_S = 20e-6


def _churn_slice(lower: str, directories: int, files: int, worker: int) -> None:
    for index in range(worker, files, WORKERS):
        directory = f"{lower}/{directory_of(index % directories)}"
        created, renamed = f"{directory}/{index}", f"{directory}/{files + index}"
        fd = os.open(created, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.write(fd, b"watchd")
        os.close(fd)
        os.rename(created, renamed)
        os.unlink(renamed)


class Churn:
    """Processes that create, write, rename and delete `files` files, spread evenly over all directories.

    File i is first called `i`, then `files + i`. They wait for `run`, so that their start is not measured.
    """

    def __init__(self, arena: Arena, files: int) -> None:
        command = [sys.executable, "-m", "tests.bench.loads", str(arena.lower), str(arena.directories), str(files)]
        self._workers = [
            subprocess.Popen([*command, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY)
            for worker in range(WORKERS)
        ]

    def __enter__(self) -> Churn:
        for worker in self._workers:
            assert worker.stdout is not None
            worker.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
            with worker:  # closes its pipes and waits
                pass

    def run(self) -> float:
        """Do it all and return the seconds that it took. Raises RuntimeError if a process failed."""
        started = time.perf_counter()
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.close()
        statuses = [worker.wait() for worker in self._workers]
        if any(statuses):
            raise RuntimeError("the load failed")
        return time.perf_counter() - started


class Healed(msgspec.Struct, frozen=True):
    """Seconds from a change until it was seen, None if it was not in time."""

    asked_s: float | None
    """In the mount that was looked at first, another one each round."""
    all_s: float | None
    """In all of them."""


class Round:
    """One change of a lower that the merged mounts do not show by themselves."""

    def __init__(self, arena: Arena, number: int) -> None:
        name = f"{directory_of(number % arena.directories)}/latency-{number}"
        self.lower = arena.lower / name
        self.replacement = arena.lower / f"{name}.new"
        asked = number % len(arena.all_merged)
        self.merged = [merged / name for merged in (*arena.all_merged[asked:], *arena.all_merged[:asked])]

    def prepare(self) -> None:
        """Make what the change needs."""
        self.lower.write_bytes(b"old")

    def change(self) -> None:
        """Change the lower."""
        raise NotImplementedError

    def is_true(self, size: int | None) -> bool:
        """Whether the size of the file, None for no file, is what the lower holds after the change."""
        raise NotImplementedError

    def is_seen(self, merged: Path) -> bool:
        """Whether that mount shows what the lower holds after the change. Leaves the name cached either way."""
        try:
            return self.is_true(os.stat(merged).st_size)
        except FileNotFoundError:
            return self.is_true(None)

    def clean(self) -> None:
        """Remove what the round made."""
        self.lower.unlink(missing_ok=True)
        self.replacement.unlink(missing_ok=True)


class Create(Round):
    """A file appears whose absence is cached."""

    def prepare(self) -> None:
        """Nothing: the file must not be there."""

    def change(self) -> None:
        self.lower.touch()

    def is_true(self, size: int | None) -> bool:
        return size is not None


class Replace(Round):
    """A cached file is replaced by rename, as editors and package managers write."""

    def prepare(self) -> None:
        super().prepare()
        self.replacement.write_bytes(b"replaced")

    def change(self) -> None:
        self.replacement.rename(self.lower)

    def is_true(self, size: int | None) -> bool:
        return size == len(b"replaced")


class Unlink(Round):
    """A cached file is deleted."""

    def change(self) -> None:
        self.lower.unlink()

    def is_true(self, size: int | None) -> bool:
        return size is None


KINDS = (Create, Replace, Unlink)


class LightLoad:
    """Rounds at a steady rate. Everything is prepared beforehand, so that a round is one change and nothing else."""

    def __init__(self, arena: Arena, *, rounds: int, interval_s: float, patience_s: float) -> None:
        self._rounds: list[Round] = [KINDS[number % len(KINDS)](arena, number) for number in range(rounds)]
        for round_ in self._rounds:
            round_.prepare()
        self._interval_s = interval_s
        self._patience_s = patience_s

    def run(self) -> list[Healed]:
        """What became of each round."""
        return [self._one(round_) for round_ in self._rounds]

    def clean(self) -> None:
        """Remove all files."""
        for round_ in self._rounds:
            round_.clean()

    def _one(self, round_: Round) -> Healed:
        for merged in round_.merged:
            if round_.is_seen(merged):
                raise RuntimeError(f"{merged} shows a change that was not made yet")
        round_.change()
        changed = time.perf_counter()
        asked = last = self._wait(round_, round_.merged[0], changed)
        for merged in round_.merged[1:]:
            last = self._wait(round_, merged, changed) if last is not None else None
        time.sleep(max(0.0, changed + self._interval_s - time.perf_counter()))
        return Healed(asked, last)

    def _wait(self, round_: Round, merged: Path, changed: float) -> float | None:
        while time.perf_counter() - changed < self._patience_s:
            if round_.is_seen(merged):
                return time.perf_counter() - changed
            time.sleep(POLL_S)
        return None


@contextlib.contextmanager
def light_load(arena: Arena, *, rounds: int, interval_s: float, patience_s: float = 1.0) -> Iterator[LightLoad]:
    """A prepared light load, whose files go when it is done."""
    load = LightLoad(arena, rounds=rounds, interval_s=interval_s, patience_s=patience_s)
    try:
        yield load
    finally:
        load.clean()


def main() -> None:
    """One process of the heavy load. Usage: loads LOWER DIRECTORIES FILES WORKER; starts when stdin closes."""
    lower, directories, files, worker = sys.argv[1], *map(int, sys.argv[2:5])
    print("prepared", flush=True)
    sys.stdin.read()
    _churn_slice(lower, directories, files, worker)


if __name__ == "__main__":
    main()
