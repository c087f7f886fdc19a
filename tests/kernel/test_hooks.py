"""`after` hooks of a real daemon: they run when a mount was healed, once for a burst, and keep nobody waiting."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.accidents import replace, write
from tests.kernel.running import REPOSITORY, Daemon, Json
from tests.kernel.sandbox import Sandbox, mount, umount
from tests.kernel.test_pinned import held


class Hook:
    """A command that says into a FIFO what it was told, and so waits until somebody hears it."""

    def __init__(self, home: Path, name: str) -> None:
        self.fifo = home / name
        os.mkfifo(self.fifo)

    def rule(self, match: bytes, script: str = "", **more: str) -> Json:
        """Tells, then does `script`."""
        tell = f'paths=$(cat); {{ env | grep WATCHD; echo "$paths"; }} >{self.fifo}; {script}'
        return {"match": os.fsdecode(match), "after": ["sh", "-c", tell], **more}

    def told(self) -> tuple[dict[str, str], list[str]]:
        """Environment and paths of the run that is under way or comes next."""
        lines = self.fifo.read_text().splitlines()
        environment = dict(line.split("=", 1) for line in lines if line.startswith("WATCHD"))
        return environment, [line for line in lines if not line.startswith("WATCHD")]


@pytest.fixture
def hook(sandbox: Sandbox) -> Hook:
    return Hook(Path(os.fsdecode(sandbox.root)), "told")


@pytest.fixture
def low(sandbox: Sandbox) -> bytes:
    """A lower layer with a file."""
    low = sandbox.directory(b"low")
    write(low + b"/file", b"old")
    return low


def started(daemon: Daemon) -> None:
    """Every mount is invalidated once at the start; what is cached from here on stays so."""
    daemon.start()
    daemon.sync()


def heal(merged: bytes, low: bytes, daemon: Daemon) -> None:
    """Have `file` go stale, and healed."""
    look_at(merged)
    replace(low + b"/file", b"new")
    assert daemon.sync() == []


def look_at(merged: bytes) -> None:
    """Have `file` cached."""
    os.stat(merged + b"/file")


def test_a_thousand_healed_names_are_one_run_that_gets_them_all(
    sandbox: Sandbox, daemon: Daemon, hook: Hook, low: bytes
) -> None:
    names = sorted(b"n%d" % number for number in range(1000))
    for name in names:
        write(low + b"/" + name, b"old")
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.configure(mounts=[hook.rule(merged)])
    started(daemon)
    for name in names:
        os.stat(merged + b"/" + name)
    daemon.pause()
    for name in names:
        replace(low + b"/" + name, b"new")
    daemon.resume()
    environment, paths = hook.told()
    assert paths == [os.fsdecode(name) for name in names]
    assert environment["WATCHD_MOUNT"] == os.fsdecode(merged)
    assert environment["WATCHD_DEVICE"] == daemon.mount(merged)["device"]
    assert 0 < int(environment["WATCHD_SEQ"]) <= daemon.status()["journal"]["last_seq"]
    heal(merged, low, daemon)
    assert hook.told()[1] == ["file"]


def test_creations_that_nobody_missed_run_nothing(sandbox: Sandbox, daemon: Daemon, hook: Hook, low: bytes) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.configure(mounts=[hook.rule(merged)])
    started(daemon)
    for number in range(100):
        write(low + b"/unheard-of-%d" % number, b"")
    assert daemon.sync() == []
    heal(merged, low, daemon)
    assert hook.told()[1] == ["file"]


def test_a_hook_that_hangs_keeps_neither_status_nor_other_mounts_waiting(
    sandbox: Sandbox, daemon: Daemon, hook: Hook, low: bytes
) -> None:
    hanging = sandbox.overlay(b"hanging", b"low", upper=b"up")
    other = sandbox.overlay(b"other", b"low", upper=b"up2")
    never_read = Hook(Path(os.fsdecode(sandbox.root)), "never-read")
    daemon.configure(mounts=[never_read.rule(hanging, after_timeout="1d"), hook.rule(other)])
    started(daemon)
    heal(hanging, low, daemon)
    for _ in range(3):
        heal(other, low, daemon)
        assert hook.told()[1] == ["file"]
    assert daemon.mount(hanging)["state"] == "coherent"
    daemon.stop()  # ends it


def test_at_the_deadline_the_command_and_its_children_end(
    sandbox: Sandbox, daemon: Daemon, hook: Hook, low: bytes
) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.configure(mounts=[hook.rule(merged, "sleep 1000; :", after_timeout="500ms")])
    started(daemon)
    heal(merged, low, daemon)
    hook.told()
    while "was ended at its deadline of 500ms" not in daemon.errors():
        os.sched_yield()
    children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children").read_text()
    assert children == ""
    heal(merged, low, daemon)
    assert hook.told()[1] == ["file"], "and the next run comes all the same"


@pytest.mark.parametrize("settings", [{"mode": "observe"}, {"actions": []}])
def test_who_only_observes_runs_nothing(
    sandbox: Sandbox, daemon: Daemon, hook: Hook, low: bytes, settings: Json
) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.configure(mounts=[{**hook.rule(merged), **settings}])
    started(daemon)
    look_at(merged)
    replace(low + b"/file", b"new")
    assert [one["state"] for one in daemon.sync()] == ["stale"]
    assert daemon.verb("invalidate", merged).returncode == 0
    assert [one["state"] for one in daemon.sync()] == ["observed"]
    daemon.configure(mounts=[hook.rule(merged)])
    daemon.ask("reload")
    write(low + b"/other", b"old")
    os.stat(merged + b"/other")
    replace(low + b"/other", b"new")
    assert hook.told()[1] == ["other"], "this is the first run"


def test_what_is_pinned_is_told_when_it_is_let_go(sandbox: Sandbox, daemon: Daemon, hook: Hook, low: bytes) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.configure(mounts=[hook.rule(merged)])
    write(low + b"/second", b"old")
    started(daemon)
    with held(merged + b"/file"):
        replace(low + b"/file", b"new")
        assert [one["state"] for one in daemon.sync()] == ["pinned"]
        os.stat(merged + b"/second")
        replace(low + b"/second", b"new")
        assert [entry["path"] for one in daemon.sync() for entry in one["stale"]] == ["file"]
        assert "`after`" not in daemon.errors()
    assert daemon.sync() == []
    assert hook.told()[1] == ["file", "second"]


@pytest.mark.parametrize("pinned", ["file", "directory"])
def test_what_is_healed_though_it_is_held_is_told_like_anything_else(
    sandbox: Sandbox, daemon: Daemon, hook: Hook, low: bytes, pinned: str
) -> None:
    os.makedirs(low + b"/directory")
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.configure(mounts=[{**hook.rule(merged), "actions": ["invalidate", "evict", "replace"]}])
    started(daemon)
    path = merged + b"/" + os.fsencode(pinned)
    with held(path):
        if pinned == "file":  # what evict heals
            replace(low + b"/file", b"new")
        else:  # what replace heals
            os.rmdir(low + b"/directory")
        environment, paths = hook.told()
        assert paths == [pinned]
        assert environment["WATCHD_MOUNT"] == os.fsdecode(merged)
        assert os.path.exists(path) == (pinned == "file")


def test_a_changed_rule_holds_after_a_reload_and_a_missing_program_is_said(
    sandbox: Sandbox, daemon: Daemon, hook: Hook, low: bytes
) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.configure(mounts=[{"match": os.fsdecode(merged), "after": ["/no/such/program"]}])
    started(daemon)
    while "mounts[0].after: /no/such/program is no program" not in daemon.errors():
        os.sched_yield()
    heal(merged, low, daemon)
    while "failed with status 127" not in daemon.errors():
        os.sched_yield()
    assert "`after` says: /no/such/program: No such file or directory" in daemon.errors()
    daemon.configure(mounts=[hook.rule(merged)])
    daemon.ask("reload")
    heal(merged, low, daemon)
    assert hook.told()[1] == ["file"]


def test_a_command_may_ask_the_daemon_that_runs_it(sandbox: Sandbox, daemon: Daemon, hook: Hook, low: bytes) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    sync = f"PYTHONPATH={REPOSITORY} {sys.executable} -m watchd sync --config {daemon.config}; echo $? >{hook.fifo}"
    daemon.configure(mounts=[hook.rule(merged, sync)])
    started(daemon)
    heal(merged, low, daemon)
    assert hook.told()[1] == ["file"]
    assert hook.told()[1] == ["0"]


def test_a_command_on_a_dead_filesystem_keeps_nobody_waiting(
    sandbox: Sandbox, daemon: Daemon, hook: Hook, low: bytes
) -> None:
    dead = sandbox.directory(b"dead")
    hanging = sandbox.overlay(b"hanging", b"low", upper=b"up")
    other = sandbox.overlay(b"other", b"low", upper=b"up2")
    unheard = {"match": os.fsdecode(hanging), "after": [os.fsdecode(dead + b"/command")], "after_timeout": "500ms"}
    daemon.configure(mounts=[unheard, hook.rule(other)])
    with dead_filesystem(dead):
        started(daemon)
        for merged in (hanging, other):
            look_at(merged)
        heal(hanging, low, daemon)
        assert hook.told()[1] == ["file"]
        while "was ended at its deadline" not in daemon.errors():
            os.sched_yield()
        daemon.stop()


@contextlib.contextmanager
def dead_filesystem(path: bytes) -> Iterator[None]:
    """A FUSE mount whose server never answers."""
    server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        mount(b"dead", path, b"fuse", data=b"fd=%d,rootmode=40000,user_id=0,group_id=0" % server)
        yield
    finally:
        os.close(server)
    umount(path)
