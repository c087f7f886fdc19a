"""A writer that is killed at any moment loses nothing that it acknowledged."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.soak import rounds
from tests.unit.journal import judge
from watchd.journal.reader import Follower, read
from watchd.journal.recovery import lock, recover

ROUNDS_IN_ONE_DIRECTORY = 10
OPERATIONS = 200
"""A start, and some segments with what is left of the one before."""
ROOT = Path(__file__).parents[2]


class Writers:
    """Has writers begun, one after the other, and hears what they say."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.crash.writing_process"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._writer = 0

    def begin(self, directory: Path, *, operations: int = -1, limit: int = 0) -> Iterator[tuple[str, str]]:
        """What the writer says until it has ended, as word and the rest."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{directory} {operations} {limit}\n")
        self._process.stdin.flush()
        self._writer = int(self._process.stdout.readline().removeprefix("process "))
        while (line := self._process.stdout.readline().rstrip("\n")) != "ended":
            word, _, rest = line.partition(" ")
            yield word, rest

    def kill(self) -> None:
        """SIGKILL of the writer, which is waited for by its parent and nobody else."""
        os.kill(self._writer, signal.SIGKILL)

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


@pytest.fixture(scope="module")
def writers(own_mount_namespace: None) -> Iterator[Writers]:
    writers = Writers()
    yield writers
    writers.close()


class Witness:
    """What was acknowledged in a directory: the writer said so, or a reader saw it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.acknowledged = 0
        self._seen = 0

    def hears(self, number: int) -> None:
        self.acknowledged = max(self.acknowledged, number)

    def looks(self) -> None:
        """While it is being written."""
        with Follower(self.directory, self._seen) as follower:
            while records := follower.poll():
                self._seen = records[-1][0]
        self.hears(self._seen)

    def judges(self) -> None:
        """After a crash: recovers, and counts the records, each of which says which it is."""
        with lock(self.directory):
            recover(self.directory)
        found = judge.records(self.directory)
        assert len(found) >= self.acknowledged
        assert [value[1] for _, value in found] == list(range(1, len(found) + 1))
        assert [seq for seq, _ in read(self.directory)] == [seq for seq, _ in found]
        self.acknowledged = len(found)


def test_sigkill_at_any_file_operation_loses_no_acknowledged_record(workspace: Path, writers: Writers) -> None:
    for number in range(rounds(120)):
        witness = Witness(workspace / str(number // ROUNDS_IN_ONE_DIRECTORY))
        for word, rest in writers.begin(witness.directory, operations=number % OPERATIONS):
            assert word == "acknowledged"
            witness.hears(int(rest))
        witness.judges()


def test_sigkill_at_any_moment_loses_no_acknowledged_record(workspace: Path, writers: Writers) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    for number in range(rounds(80)):
        if number % ROUNDS_IN_ONE_DIRECTORY == 0:
            witness = Witness(workspace / str(number))
        left, spin = chance.randrange(1, 40), chance.randrange(2000)
        for word, rest in writers.begin(witness.directory):
            assert word == "acknowledged", f"seed {seed}"
            witness.hears(int(rest))
            left -= 1
            if left % 16 == 1:
                witness.looks()
            if left == 0:
                sum(range(spin * 50))  # in the midst of something
                writers.kill()
        witness.judges()


def test_a_full_disk_fails_the_journal_once_and_it_goes_on_when_there_is_room(
    workspace: Path, writers: Writers
) -> None:
    directory, said = workspace / "journal", []
    for word, rest in writers.begin(directory, limit=20010):
        said.append((word, rest))
        if word == "failed":
            with pytest.raises((AssertionError, struct.error)):
                judge.records(directory)
    failed = [number for number, (word, _) in enumerate(said) if word == "failed"]
    assert len(failed) == 1
    [number] = failed
    assert "File too large; make room on its filesystem" in said[number][1]
    before, after, end = (int(said[index][1]) for index in (number - 1, number + 1, number + 2))
    assert before <= after < before + 9
    assert end == after + 5
    assert len(said) == number + 3
    assert [value[1] for _, value in judge.records(directory)] == list(range(1, end + 1))
    assert list(directory.glob("*.torn")) == [], "what this very process left undone is of use to nobody"
