"""`sync` is a barrier: what was done before it was asked for is in the journal when it answers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.kernel.running import Daemon
from tests.kernel.sandbox import Sandbox

WRITERS = 3
SYNCS = 10

ARRIVALS = 500

# Creates files for ever; the last one that is there for certain is the number in the shared counter.
WRITER = """
import os, sys
directory, counter = os.fsencode(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY)
print(flush=True)
number = 0
while True:
    os.close(os.open(os.path.join(directory, b"%d" % number), os.O_CREAT | os.O_WRONLY, 0o644))
    os.pwrite(counter, b"%12d" % number, 0)
    number += 1
    if number % 50 == 0:
        os.makedirs(os.path.join(directory, b"dir%d" % number))
        directory = os.path.join(directory, b"dir%d" % number)
"""


@pytest.mark.parametrize("backend", ["fanotify", "inotify"])
def test_no_file_that_was_there_before_sync_is_missing_from_the_log(
    sandbox: Sandbox, daemon: Daemon, backend: str
) -> None:
    daemon.configure(sources={"backend": backend})
    merged = sandbox.overlay(b"merged", b"low", b"low2", upper=b"up")
    daemon.start()
    homes = [sandbox.directory(b"low%s/writer%d" % (b"2" if number % 2 else b"", number)) for number in range(WRITERS)]
    counters = [sandbox.path(b"counter%d" % number) for number in range(WRITERS)]
    for counter in counters:
        with open(counter, "wb"):
            pass
    writers = [
        subprocess.Popen([sys.executable, "-I", "-S", "-c", WRITER, home, counter], stdout=subprocess.PIPE)
        for home, counter in zip(homes, counters, strict=True)
    ]
    promised: list[tuple[list[int], int]] = []
    try:
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        for _ in range(SYNCS):
            before = [_read(counter) for counter in counters]
            assert daemon.sync(merged) == []
            promised.append((before, daemon.status()["journal"]["last_seq"]))
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert daemon.sync(merged) == []
    told: dict[tuple[str, int], int] = {}
    for record in daemon.log():
        if record["type"] == "change" and not record["is_dir"]:
            writer_name, _, rest = record["path"].partition("/")
            told.setdefault((writer_name, int(rest.rpartition("/")[2])), record["seq"])
    for counts, last_seq in promised:
        for number, count in enumerate(counts):
            late = [one for one in range(count + 1) if told.get((f"writer{number}", one), last_seq + 1) > last_seq]
            assert not late


def _read(counter: bytes) -> int:
    with open(counter, "rb") as file:
        return int(file.read() or b"-1")


@pytest.mark.parametrize("backend", ["fanotify", "inotify"])
def test_all_that_is_in_a_directory_that_came_in_is_in_the_log(sandbox: Sandbox, daemon: Daemon, backend: str) -> None:
    daemon.configure(sources={"backend": backend})
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    for number in range(ARRIVALS):
        os.mkdir(os.path.join(sandbox.directory(b"outside/%d" % number), b"deep"))
    for number in range(ARRIVALS):
        os.rename(sandbox.path(b"outside/%d" % number), sandbox.path(b"low/%d" % number))
    assert daemon.sync(merged) == []
    daemon.kill()  # lest it goes on to write what had been promised
    assert {f"{number}/deep" for number in range(ARRIVALS)} <= daemon.changed()


def test_a_deadline_of_nothing_is_over_at_once(sandbox: Sandbox, daemon: Daemon) -> None:
    sandbox.directory(b"low")
    sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    assert daemon.verb("sync", "--timeout", "0").returncode == 3
