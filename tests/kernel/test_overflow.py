"""A daemon that was stopped while more happened than the kernel keeps for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.kernel.running import Daemon
from tests.kernel.sandbox import Sandbox

FILES = 20_000
"""More than the 16 384 events that both kinds of queue hold by default."""


def create(directory: bytes, names: range) -> None:
    for number in names:
        os.close(os.open(os.path.join(directory, b"%d" % number), os.O_CREAT | os.O_WRONLY, 0o644))


@pytest.fixture(params=["fanotify", "inotify"])
def overflowed(request: pytest.FixtureRequest, sandbox: Sandbox, daemon: Daemon) -> Daemon:
    """A daemon that slept through 20 000 new files and a new subtree."""
    daemon.configure(sources={"backend": request.param, "queue": "default"})
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    assert not os.path.exists(merged + b"/0")
    assert not os.path.exists(merged + b"/tree")
    daemon.pause()
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text()) if request.param == "inotify" else 0
    create(sandbox.path(b"low"), range(max(FILES, limit + 1000)))
    os.makedirs(sandbox.path(b"low/tree/deep"))
    create(sandbox.path(b"low/tree/deep"), range(10))
    daemon.resume()
    return daemon


def test_an_overflow_is_told_and_healed_and_then_there_is_rest(sandbox: Sandbox, overflowed: Daemon) -> None:
    merged, low = sandbox.path(b"merged"), sandbox.path(b"low")
    assert overflowed.sync(merged) == []
    assert os.path.exists(merged + b"/0")
    assert len(os.listdir(merged + b"/tree/deep")) == 10

    at_rest = overflowed.status()["journal"]["last_seq"]
    for _ in range(2):
        assert overflowed.sync(merged) == []
        assert overflowed.status()["journal"]["last_seq"] == at_rest, "recovery feeds its own queue"

    assert not os.path.exists(merged + b"/tree/deep/later")
    create(low + b"/tree/deep", range(100, 101))
    os.rename(low + b"/tree/deep/100", low + b"/tree/deep/later")
    assert overflowed.sync(merged) == []
    assert os.path.exists(merged + b"/tree/deep/later")

    log = overflowed.log()
    told = {record["path"] for record in log if record["type"] == "change"}
    assert {os.fsdecode(os.path.relpath(path, low)) for path in _below(low)} <= told
    [desync] = [record for record in log if record["type"] == "desync"]
    [resync] = [record for record in log if record["type"] == "resync"]
    assert (desync["reason"], resync["closes"]) == ("overflow", desync["seq"])
    assert resync["differences"] > 0
    assert desync["seq"] < resync["seq"] <= at_rest


def _below(directory: bytes) -> list[bytes]:
    return [os.path.join(top, name) for top, dirs, files in os.walk(directory) for name in (*dirs, *files)]
