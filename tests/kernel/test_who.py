"""Who made a change, as the journal tells it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.kernel.running import Daemon, Json
from tests.kernel.sandbox import Sandbox


class Actor:
    """A shell under a name of its own, which does what it is told and stays."""

    def __init__(self, home: bytes, name: bytes) -> None:
        self.name = name
        path = home + b"/" + name
        os.symlink("/bin/dash", path)
        self.process = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def run(self, command: bytes) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + b"\necho done\n")
        assert self.process.stdout.readline() == b"done\n"

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture
def actors(sandbox: Sandbox) -> Iterator[list[Actor]]:
    home = sandbox.directory(b"bin")
    cast = [Actor(home, name) for name in (b"smith", b"jones", b"\xff (x) 1")]
    yield cast
    for actor in cast:
        actor.end()


@pytest.fixture
def low(sandbox: Sandbox) -> bytes:
    sandbox.overlay(b"merged", b"low", upper=b"up")
    return sandbox.path(b"low")


def who_did(daemon: Daemon) -> dict[str, tuple[int | None, str | None]]:
    return {
        record["path"]: (record.get("pid"), record.get("command"))
        for record in daemon.log()
        if record["type"] == "change"
    }


def test_the_log_names_the_process_that_made_each_change(low: bytes, daemon: Daemon, actors: list[Actor]) -> None:
    daemon.start()
    for number, actor in enumerate(actors):
        actor.run(b"echo 1 >%s/%d" % (low, number))
    daemon.sync()
    smith, jones, strange = actors
    assert who_did(daemon) == {
        "0": (smith.process.pid, "smith"),
        "1": (jones.process.pid, "jones"),
        "2": (strange.process.pid, "\N{REPLACEMENT CHARACTER} (x) 1"),
    }
    assert {record["command_b64"] for record in daemon.log() if "command_b64" in record} == {"/yAoeCkgMQ=="}
    lines = daemon.verb("log", "--type", "change").stdout.splitlines()
    # A file may be read about twice: when it was made, and when it was written.
    assert list(dict.fromkeys(line.rpartition(" by ")[2] for line in lines)) == [
        f"smith[{smith.process.pid}]",
        f"jones[{jones.process.pid}]",
        f"\\xff (x) 1[{strange.process.pid}]",
    ]


def test_changes_read_at_once_keep_each_its_own_process(low: bytes, daemon: Daemon, actors: list[Actor]) -> None:
    smith, jones, _ = actors
    daemon.start()
    daemon.pause()
    for number in range(20):
        actors[number % 2].run(b"echo 1 >%s/%d" % (low, number))
    smith.run(b"echo 1 >%s/both" % low)
    jones.run(b"echo 2 >>%s/both" % low)
    daemon.resume()
    daemon.sync()
    told = who_did(daemon)
    for number in range(20):
        assert told[str(number)] == (actors[number % 2].process.pid, os.fsdecode(actors[number % 2].name))
    assert told["both"] == (smith.process.pid, "smith"), "of several the first"


def test_one_that_has_ended_is_told_by_its_number_and_never_by_the_name_of_another(low: bytes, daemon: Daemon) -> None:
    daemon.start()
    daemon.pause()
    pids = {}
    for number in range(20):
        with subprocess.Popen(["/bin/dash", "-c", 'echo 1 >"$0"', low + b"/%d" % number]) as process:
            pids[str(number)] = process.pid
    daemon.resume()
    daemon.sync()
    assert who_did(daemon) == {name: (pid, None) for name, pid in pids.items()}


def test_inotify_knows_nobody_and_says_nothing(low: bytes, daemon: Daemon, actors: list[Actor]) -> None:
    daemon.configure(sources={"backend": "inotify"})
    daemon.start()
    actors[0].run(b"echo 1 >%s/file" % low)
    daemon.sync()
    changes: list[Json] = [record for record in daemon.log() if record["type"] == "change"]
    assert {record["path"] for record in changes} == {"file"}
    assert not {"pid", "command"} & {key for record in changes for key in record}
