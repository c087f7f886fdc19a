"""`coherence.mode: observe`: everything that is stale is seen, named and counted, and nothing is done about it."""

from __future__ import annotations

import os
import socket
from http.client import HTTPConnection

import pytest

from tests.kernel.accidents import replace, write
from tests.kernel.running import Daemon
from tests.kernel.sandbox import Sandbox
from tests.kernel.test_pinned import held


@pytest.fixture
def low(sandbox: Sandbox) -> bytes:
    """A lower layer with two files."""
    low = sandbox.directory(b"low")
    for name in (b"/file", b"/held"):
        write(low + name, b"old")
    return low


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_what_an_earlier_replacement_left_in_the_workdir_stays(sandbox: Sandbox, daemon: Daemon, low: bytes) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    left = sandbox.path(b"up.work/watchd-replaced-0:1048575")
    for mode, stays in (("observe", True), ("repair", False)):
        os.makedirs(left, exist_ok=True)
        daemon.configure(coherence={"mode": mode, "actions": ["invalidate", "replace"]})
        daemon.start()
        daemon.sync(merged)
        assert os.path.exists(left) == stays
        daemon.stop()


def test_what_is_stale_is_told_everywhere_and_stays_as_it_is(sandbox: Sandbox, daemon: Daemon, low: bytes) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    port = free_port()
    daemon.configure(
        coherence={"mode": "observe", "actions": ["invalidate", "evict", "replace", "drop_caches"]},
        metrics={"listen": f"127.0.0.1:{port}"},
    )
    daemon.start()
    assert [mount["state"] for mount in daemon.sync()] == ["observed"]
    assert daemon.verb("sync", merged).returncode == 0
    os.stat(merged + b"/file")
    with held(merged + b"/held") as holder:
        replace(low + b"/file", b"new")
        replace(low + b"/held", b"new")
        done = daemon.verb("sync", merged)
        assert done.returncode == 1
        assert f"{os.fsdecode(merged)}/file: replaced" in done.stdout
        assert f"{os.fsdecode(merged)}/held: replaced, held by " in done.stdout
        mount = daemon.mount(merged)
        assert (mount["state"], mount["actions"]) == ("stale", {})
        held_by = {entry["path"]: [holder["pid"] for holder in entry["pinned_by"]] for entry in mount["stale"]}
        assert held_by == {"file": [], "held": [holder]}
        told = metrics(port)
        device = mount["device"]
        assert f'watchd_mount_stale_entries{{mount="{device}"}} 2.0' in told
        assert f'watchd_mount_pinned_entries{{mount="{device}"}} 1.0' in told
        assert 'watchd_mounts{state="stale"} 1.0' in told
        assert "watchd_actions_total{" not in told
        for name in (b"/file", b"/held"):
            with open(merged + name, "rb") as file:
                assert file.read() == b"old", "somebody acted"
        wait_for(daemon, f"{device}: 2 names are stale: file replaced; held replaced, held by {holder} (sh, open)")
        assert not [record for record in daemon.log() if record["type"] == "action"]


def test_what_goes_away_by_itself_is_observed_as_gone(sandbox: Sandbox, daemon: Daemon, low: bytes) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.configure(coherence={"mode": "observe"})
    daemon.start()
    with held(merged + b"/held"):
        replace(low + b"/held", b"new")
        os.stat(merged + b"/file")
        os.unlink(low + b"/file")
        assert [mount["state"] for mount in daemon.sync()] == ["stale"]
        assert daemon.verb("invalidate", merged).returncode == 1
        [mount] = daemon.sync()
        assert (mount["state"], [entry["path"] for entry in mount["stale"]]) == ("pinned", ["held"])
    assert daemon.verb("invalidate", merged).returncode == 0
    assert [(mount["state"], mount["stale"]) for mount in daemon.sync()] == [("observed", [])]
    assert daemon.verb("sync", merged).returncode == 0
    assert daemon.mount(merged)["actions"] == {}
    wait_for(daemon, "nothing is stale any more")


def wait_for(daemon: Daemon, words: str) -> None:
    """Returns when the log has them."""
    while words not in daemon.errors():
        os.sched_yield()


def metrics(port: int) -> str:
    """What a scrape gets."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()
