"""A writer that is killed at any moment loses nothing that it acknowledged."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.journal import judge
from tests.unit.journal.support import write
from watchd.journal.reader import Follower, read

ROUNDS = 16
ROOT = Path(__file__).parents[2]


def start(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.crash.writing_process", str(directory), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def acknowledged(process: subprocess.Popen[str]) -> int:
    assert process.stdout
    word, number = process.stdout.readline().split()
    assert word == "acknowledged"
    return int(number)


def test_sigkill_at_any_moment_loses_no_acknowledged_record(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    seen = before = 0
    for _ in range(ROUNDS):
        process = start(tmp_path)
        last = acknowledged(process)
        assert last >= before, f"seed {seed}"
        for _ in range(chance.randrange(60)):
            last = acknowledged(process)
        with Follower(tmp_path, seen) as follower:
            while records := follower.poll():
                seen = records[-1][0]
        process.kill()
        process.communicate()
        before = max(last, seen)
    write(tmp_path, [])
    count = len(judge.records(tmp_path))
    assert count >= before, f"seed {seed}"
    assert [seq for seq, _ in read(tmp_path)] == list(range(1, count + 1))


def test_a_full_disk_fails_the_journal_once_and_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    process = start(tmp_path, "20000")
    lines = process.communicate()[0].splitlines()
    assert process.returncode == 0
    *acknowledgements, failed, closed = lines
    assert "File too large; make room on its filesystem" in failed
    assert closed == "closed"
    last = int(acknowledgements[-1].split()[1])
    with pytest.raises(AssertionError):
        judge.records(tmp_path)
    write(tmp_path, [])
    assert last <= len(judge.records(tmp_path)) < last + 9
    assert len(list(tmp_path.glob("*.torn"))) == 1
