from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Require
from watchd.sources import who
from watchd.sources.who import Commands, read_stat, shows_our_ids

REPOSITORY = Path(__file__).parents[2]


def boottime_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@pytest.fixture
def cat() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for its end."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"here")
        process.stdin.flush()
        assert process.stdout.read(4) == b"here"  # it is what it is going to be
        yield process


def test_a_process_is_called_what_it_calls_itself(cat: subprocess.Popen[bytes]) -> None:
    assert Commands().of(cat.pid) == b"cat"


def test_one_that_began_after_the_events_were_read_made_none_of_them(cat: subprocess.Popen[bytes]) -> None:
    found = read_stat(cat.pid)
    assert found is not None
    assert Commands(read_ns=found[1]).of(cat.pid) == b"cat"
    assert Commands(read_ns=found[1] - 1).of(cat.pid) is None


def test_one_that_is_gone_has_no_command_and_one_that_nobody_waited_for_has(cat: subprocess.Popen[bytes]) -> None:
    cat.kill()
    os.waitid(os.P_PID, cat.pid, os.WEXITED | os.WNOWAIT)
    assert Commands().of(cat.pid) == b"cat"
    cat.wait()
    assert Commands().of(cat.pid) is None
    assert Commands().of(1 << 30) is None


def test_no_name_can_pass_for_a_field_of_another(tmp_path: Path) -> None:
    name = b"a) R 1 (\n\xff"
    os.symlink("/bin/sleep", os.fsencode(tmp_path) + b"/" + name)
    before = boottime_ns()
    with subprocess.Popen([os.fsencode(tmp_path) + b"/" + name, b"1000"]) as process:
        found = read_stat(process.pid)
        process.kill()
    assert found is not None
    assert found[0] == name
    assert before - 10_000_000 <= found[1] <= boottime_ns()


def test_each_process_is_looked_up_once_and_no_more_than_the_bound(
    cat: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counting(pid: int) -> tuple[bytes, int]:
        asked.append(pid)
        return b"%d" % pid, 0

    monkeypatch.setattr(who, "read_stat", counting)
    commands = Commands()
    for _ in range(3):
        assert commands.of(cat.pid) == b"%d" % cat.pid
    assert asked == [cat.pid]
    for pid in range(1 << 30, (1 << 30) + 2 * who.LOOKUPS_MAX):
        commands.of(pid)
    assert len(asked) == who.LOOKUPS_MAX


def test_what_watchd_does_itself_is_called_watchd() -> None:
    assert Commands().of(os.getpid()) == b"watchd"


def test_the_proc_of_another_pid_namespace_is_not_taken_for_ours(require: Require) -> None:
    require(os.geteuid() == 0, "root")
    assert shows_our_ids()
    program = "from watchd.sources.who import shows_our_ids; print(shows_our_ids())"
    for options, answer in (((), b"False"), (("--mount-proc",), b"True")):
        command = ["unshare", "--pid", "--fork", "--mount", *options, sys.executable, "-c", program]
        assert subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout.strip() == answer
