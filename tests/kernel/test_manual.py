"""`watchd invalidate`: every method by hand, without a daemon."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.kernel.accidents import populate, replace
from tests.kernel.running import Daemon
from tests.kernel.sandbox import Sandbox
from tests.kernel.test_pinned import held


@pytest.fixture
def merged(sandbox: Sandbox) -> bytes:
    populate(sandbox.directory(b"low"))
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    os.stat(merged + b"/d/file")
    return merged


def act(daemon: Daemon, merged: bytes, method: str) -> tuple[int, dict[str, Any]]:
    done = daemon.verb("invalidate", "--method", method, "--json", merged)
    [outcome] = json.loads(done.stdout)["actions"]
    return done.returncode, outcome


@pytest.mark.parametrize("method", ["invalidate", "evict", "replace", "drop_caches"])
def test_each_method_heals_what_nobody_holds(sandbox: Sandbox, daemon: Daemon, merged: bytes, method: str) -> None:
    replace(sandbox.path(b"low/d/file"), b"new")
    status, outcome = act(daemon, merged, method)
    counts = outcome["result"], outcome["stale_before"], outcome["stale_after"]
    assert (status, counts) == (0, ("coherent", 1, 0))
    with open(merged + b"/d/file", "rb") as file:
        assert file.read() == b"new"


@pytest.mark.parametrize("method", ["invalidate", "evict", "replace"])
def test_what_is_held_is_healed_or_named(sandbox: Sandbox, daemon: Daemon, merged: bytes, method: str) -> None:
    with held(merged + b"/d/file") as holder:
        replace(sandbox.path(b"low/d/file"), b"new")
        status, outcome = act(daemon, merged, method)
        if method == "invalidate":
            [stale] = outcome["stale"]
            assert (status, stale["path"], stale["kind"]) == (1, "d/file", "replaced")
            assert {"pid": holder, "command": "sh", "how": "open"} in stale["pinned_by"]
            done = daemon.verb("invalidate", merged)
            assert f"d/file: replaced, held by {holder} (sh, open)" in done.stdout
        else:
            assert (status, outcome["result"]) == (0, "coherent")
            with open(merged + b"/d/file", "rb") as file:
                assert file.read() == b"new"


def test_a_refusal_says_why_and_changes_nothing(sandbox: Sandbox, daemon: Daemon, merged: bytes) -> None:
    read_only = sandbox.overlay(b"read-only", b"low", b"other")
    with held(read_only + b"/d/file"):
        replace(sandbox.path(b"low/d/file"), b"new")
        status, outcome = act(daemon, read_only, "evict")
        assert (status, outcome["result"]) == (1, "stale")
        assert "no upper" in outcome["stale"][0]["reason"]


def test_a_layer_that_was_made_anew_is_shown_by_a_new_mount(sandbox: Sandbox, daemon: Daemon, merged: bytes) -> None:
    os.rename(sandbox.path(b"low"), sandbox.path(b"away"))
    replace(sandbox.directory(b"low") + b"/new", b"new")
    assert daemon.verb("check", merged).returncode == 1
    status, outcome = act(daemon, merged, "invalidate")
    assert (status, outcome["result"]) == (1, "stale"), "it looked up anew what is as wrong as before"
    assert act(daemon, merged, "replace")[1]["result"] == "coherent"
    assert os.listdir(merged) == [b"new"]
    assert daemon.verb("check", merged).returncode == 0
