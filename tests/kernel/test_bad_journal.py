"""A journal that cannot be used is told in one clear line with what to do, by every verb, and nothing is changed."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel.accidents import write
from tests.kernel.running import Daemon
from tests.kernel.sandbox import Sandbox
from tests.kernel.test_bad_input import assert_one_line
from tests.unit.journal import support
from watchd.journal.segments import list_segments, segment_path

VERBS = (("log",), ("journal", "verify"), ("journal", "repair"))


def digest(state: Path) -> dict[str, bytes | None]:
    """Everything below but who locked it last."""
    found = {path for path in state.rglob("*") if path.name != "lock"} if state.is_dir() else {state}
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(found)}


def segments(daemon: Daemon) -> list[Path]:
    """A journal of several segments that a daemon may have left."""
    journal = Path(daemon.settings["state_directory"]) / "journal"
    if not journal.exists():
        commits = [support.changes(5, 1 + 5 * number) for number in range(12)]
        support.write(journal, commits, support.SMALL_SEGMENTS)
        assert len(list_segments(journal)) > 3
    return [segment_path(journal, first) for first in list_segments(journal)]


def newer_format(daemon: Daemon) -> None:
    path = segments(daemon)[-1]
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, 8, 2)
    struct.pack_into("<I", data, 36, zlib.crc32(data[:36]))
    path.write_bytes(data)


def two_journals(daemon: Daemon) -> None:
    here = segments(daemon)[2]
    other = daemon.home / "other"
    support.write(other, [support.changes(5, 1 + 5 * number) for number in range(12)], support.SMALL_SEGMENTS)
    here.write_bytes((other / here.name).read_bytes())


def renamed(daemon: Daemon) -> None:
    path = segments(daemon)[-1]
    path.rename(segment_path(path.parent, 4711))


def a_file(daemon: Daemon) -> None:
    state = Path(daemon.settings["state_directory"])
    state.mkdir()
    (state / "journal").write_bytes(b"precious")


def something_else(daemon: Daemon) -> None:
    journal = Path(daemon.settings["state_directory"]) / "journal"
    journal.mkdir(parents=True)
    (journal / "precious.txt").write_bytes(b"precious")


@pytest.mark.parametrize(
    ("spoil", "run", "others"),
    [
        (newer_format, "format 2.*use the watchd that wrote it", "format 2.*use the watchd that wrote it"),
        (two_journals, "belongs to another journal.*watchd journal verify", "belongs to another journal"),
        (renamed, "begins with record .* what its name says", "begins with record"),
        (a_file, "cannot use the journal directory .*(File exists|Not a directory)", "Not a directory; .*correct state_dir"),
        (something_else, "is no journal, it holds 'precious.txt'; move away", "there is no journal in"),
    ],
)  # fmt: skip
def test_what_is_no_journal_of_ours_is_refused_and_left_alone(
    daemon: Daemon, spoil: Callable[[Daemon], None], run: str, others: str
) -> None:
    spoil(daemon)
    state = Path(daemon.settings["state_directory"])
    before = digest(state)
    status, said = daemon.fails()
    assert status == 1
    assert_one_line(said)
    assert re.search(run, said), said
    assert digest(state) == before
    for words in VERBS:
        done = daemon.verb(*words)
        assert done.returncode == 1, words
        assert re.search(others, done.stdout + done.stderr), done
        if words != ("journal", "verify"):
            assert_one_line(done.stderr)
        assert digest(state) == before


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    os.truncate(path, 55)


def garbage(path: Path) -> None:
    path.write_bytes(b"x" * 5000)


@pytest.mark.parametrize("spoil", [empty, truncated, garbage])
@pytest.mark.parametrize("which", [1, -1])
def test_a_damaged_segment_is_told_and_repaired(daemon: Daemon, spoil: Callable[[Path], None], which: int) -> None:
    path = segments(daemon)[which]
    spoil(path)
    state = Path(daemon.settings["state_directory"])
    before = digest(state)
    if which == -1:
        status, said = daemon.fails()
        assert status == 1
        assert_one_line(said, str(path), "watchd journal verify")
    else:
        assert daemon.verb("log").returncode == 1
    done = daemon.verb("journal", "verify")
    assert done.returncode == 1
    assert str(path) in done.stdout
    assert "watchd journal repair" in done.stdout
    assert digest(state) == before
    assert daemon.verb("journal", "repair").returncode == 0
    assert daemon.verb("journal", "verify").returncode == 0
    daemon.start()


def test_a_state_directory_that_is_a_file_is_told_by_every_verb(sandbox: Sandbox, daemon: Daemon) -> None:
    write(sandbox.path(b"file"), b"precious")
    daemon.configure(state_directory=os.fsdecode(sandbox.path(b"file")))
    for words in VERBS:
        done = daemon.verb(*words)
        assert (done.returncode, done.stdout) == (1, "")
        assert_one_line(done.stderr, os.fsdecode(sandbox.path(b"file")), "Not a directory", "correct state_directory")
    assert Path(os.fsdecode(sandbox.path(b"file"))).read_bytes() == b"precious"


def test_a_journal_that_is_being_written_is_verified_but_not_repaired(sandbox: Sandbox, daemon: Daemon) -> None:
    sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    daemon.sync()
    assert daemon.verb("journal", "verify").returncode == 0
    done = daemon.verb("journal", "repair")
    assert done.returncode == 1
    assert_one_line(done.stderr, "is being written by process", str(daemon.process.pid), "stop it")
    assert daemon.sync() == []


def test_what_was_lost_is_looked_for_when_the_daemon_starts_again(sandbox: Sandbox, daemon: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    for name in (b"one", b"two", b"three"):
        write(sandbox.path(b"low/" + name), b"")
        assert daemon.sync(merged) == []
    daemon.stop()
    log = daemon.log()
    lost = next(record["seq"] for record in log if record.get("path") == "two")
    [path] = segments(daemon)
    support.flip(path, path.read_bytes().index(b"two"))
    status, said = daemon.fails()
    assert status == 1
    assert_one_line(said, "is damaged at byte", f"behind record {lost - 1}", "watchd journal verify")

    done = daemon.verb("journal", "repair")
    assert done.returncode == 0
    assert f"lost: {lost}" in done.stdout
    write(sandbox.path(b"low/four"), b"")
    daemon.start()
    assert daemon.sync(merged) == []
    assert os.path.exists(merged + b"/four")

    after = daemon.log()
    assert [record for record in after[: len(log)] if record["seq"] != lost] == [
        record for record in log if record["seq"] != lost
    ]
    told = after[lost - 1]
    assert (told["type"], told["layer"], told["reason"]) == ("desync", "", "source-lost")
    desync = after[len(log)]
    assert (desync["type"], desync["layer"], desync["reason"]) == ("desync", "", "restart")
    [resync] = [record for record in after if record["type"] == "resync"]
    assert resync["closes"] == desync["seq"]
    scanned = {record["path"] for record in after[len(log) :] if record["type"] == "change"}
    assert {"two", "three", "four"} <= scanned
