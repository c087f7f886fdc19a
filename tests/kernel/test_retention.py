"""The journal of a running daemon stays within its limits, and who reads it is not left behind before that."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from tests.kernel.running import Daemon
from tests.kernel.sandbox import Sandbox

SMALL = {"segment_size": "4KiB", "retain_size": "16KiB", "max_delay": "1ms"}
"""Less than 4 KiB no segment may be; one commit may be larger."""


def burst(sandbox: Sandbox, daemon: Daemon, number: int) -> None:
    """Some 100 records, on disk."""
    for name in range(50):
        with open(sandbox.path(b"low/%d-%d" % (number, name)), "wb"):
            pass
    assert daemon.sync() == []


def journal(daemon: Daemon) -> dict[str, int]:
    found = daemon.status()["journal"]
    assert isinstance(found, dict)
    return found


def fill_until_something_goes(sandbox: Sandbox, daemon: Daemon, *, at_most: int = 40) -> int:
    """How many bursts that took."""
    for number in range(at_most):
        burst(sandbox, daemon, number)
        if journal(daemon)["first_seq"] > 1:
            return number
    raise AssertionError(f"nothing went: {journal(daemon)}")


def test_old_segments_go_while_the_daemon_runs_and_everything_says_so(sandbox: Sandbox, daemon: Daemon) -> None:
    daemon.configure(journal=SMALL)
    sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    fill_until_something_goes(sandbox, daemon)
    daemon.stop()
    directory = Path(daemon.settings["state_directory"]) / "journal"
    firsts = sorted(int(path.stem) for path in directory.glob("*.wal"))
    lines = [json.loads(line) for line in daemon.verb("log", "--json").stdout.splitlines()]
    assert [line["seq"] for line in lines] == list(range(firsts[0], lines[-1]["seq"] + 1))
    assert firsts[0] > 1
    assert daemon.verb("journal", "verify").returncode == 0
    daemon.start()
    now = journal(daemon)
    firsts = sorted(int(path.stem) for path in directory.glob("*.wal"))
    assert now["first_seq"] == firsts[0]
    assert "removed" in daemon.errors()


def test_a_named_cursor_holds_its_records_until_the_limit_and_is_told_to_start_over_then(
    sandbox: Sandbox, daemon: Daemon
) -> None:
    daemon.configure(journal=SMALL | {"retain_limit": "1GiB"})
    sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    state = Path(daemon.settings["state_directory"])
    epoch, seq = daemon.status()["journal"]["epoch"], journal(daemon)["last_seq"]
    (state / "cursors").mkdir(exist_ok=True)
    (state / "cursors" / "mirror").write_text(f"{epoch}:{seq}\n")
    for number in range(12):
        burst(sandbox, daemon, number)
    assert journal(daemon)["first_seq"] <= seq + 1
    assert journal(daemon)["bytes"] > 32 << 10
    daemon.configure(journal=SMALL)
    daemon.signal_and_wait(signal.SIGHUP, "READY=1")
    while journal(daemon)["first_seq"] <= seq + 1:
        os.sched_yield()
    assert daemon.errors().count("cursor mirror had not read up to record") == 1
    assert "is not part of this version" not in daemon.errors()
