"""Fanotify groups that outlive the daemon: what a later process may conclude from one, and what it may not."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import Require
from watchd.records import Change, Kind
from watchd.service.ledger import SLOTS, SLOTS_AT, GroupLedger, Purpose
from watchd.sources import mute
from watchd.sources.base import MovedIn
from watchd.sources.fanotify import FanotifySource

from .churn import Churn, missed, snapshot
from .running import Daemon, Json, ManagerSocket
from .sandbox import Sandbox, mount, umount
from .stacks import Image, is_makeable
from .test_fanotify_source import batches, layer_at, paths
from .test_mute import FEW, muted

PURPOSE = Purpose(device=1, flags=2, mask=3)
EPOCH = "00112233aabbccdd"
STEPS = 60
ROUNDS = 3

# ---- a source that goes on with a group -----------------------------------------------------------------------------


def source_of(place: Path, *, inherited: int | None = None, unrecorded: Sequence[bytes] = ()) -> FanotifySource:
    (place / "barriers").mkdir(exist_ok=True)
    (place / "layer").mkdir(exist_ok=True)
    return FanotifySource(
        barrier_directory=os.fsencode(place / "barriers"),
        content=True,
        unlimited_queue=True,
        inherited=inherited,
        unrecorded=unrecorded,
    )


def left_behind(source: FanotifySource) -> int:
    """The source's process dies; somebody else has its group."""
    kept = os.dup(source.fileno())
    source.close()
    return kept


def test_an_inherited_group_tells_what_happened_meanwhile(workspace: Path) -> None:
    source, layer = source_of(workspace), workspace / "layer"
    source.add(layer_at(layer, mounted_at=workspace))
    (layer / "read").touch()
    assert paths(source) == {b"read"}
    kept = left_behind(source)
    (layer / "d").mkdir()
    (layer / "d/file").touch()
    with contextlib.closing(source_of(workspace, inherited=kept)) as source:
        assert source.resume(layer_at(layer, mounted_at=workspace))
        assert paths(source) == {b"d", b"d/file"}
        (workspace / "barriers/1").touch()
        assert [name for batch in batches(source) for name in batch.barriers] == [b"1"]


def test_a_group_that_did_not_mark_the_filesystem_does_not_pass_for_one_that_did(
    workspace: Path, tmp_path: Path
) -> None:
    kept = left_behind(source_of(workspace))
    with contextlib.closing(source_of(workspace, inherited=kept)) as source:
        layer = layer_at(workspace / "layer", mounted_at=workspace)
        assert not source.resume(layer)
        assert source.resume(layer), "by now it has the mark"


def test_what_was_muted_is_heard_again(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mute, "HOT_EVENTS", FEW)
    source, layer, outside = source_of(workspace), workspace / "layer", workspace / "outside"
    source.add(layer_at(layer, mounted_at=workspace))
    (outside / "sub").mkdir(parents=True)
    muted(source, outside)
    kept = left_behind(source)
    outside.rename(layer / "came")
    (layer / "came/unheard").touch()
    with contextlib.closing(source_of(workspace, inherited=kept)) as source:
        source.resume(layer_at(layer, mounted_at=workspace))
        (layer / "came/heard").touch()
        found = batches(source)
        assert {change.path for batch in found for change in batch.changes} >= {b"came", b"came/heard"}
        assert MovedIn("base", b"came") in [moved for batch in found for moved in batch.moved_in]


def test_what_was_read_and_not_recorded_is_told_again(workspace: Path) -> None:
    source, layer = source_of(workspace), workspace / "layer"
    source.ledger = ledger = GroupLedger.create(PURPOSE, EPOCH)
    source.add(layer_at(layer, mounted_at=workspace))
    (workspace / "outside").touch()
    assert batches(source)[0].is_nothing
    (layer / "recorded").touch()
    batches(source)
    ledger.recorded(ledger.told(), upto=1, scans=0)
    (layer / "lost").touch()
    batches(source)
    ledger.told()
    kept = left_behind(source)
    (layer / "queued").touch()
    after = GroupLedger(ledger.descriptor)
    unrecorded = after.go_on(EPOCH, 1)
    assert unrecorded is not None
    with contextlib.closing(source_of(workspace, inherited=kept, unrecorded=unrecorded)) as source:
        source.ledger = after
        source.resume(layer_at(layer, mounted_at=workspace))
        assert [{change.path for change in batch.changes} for batch in batches(source)] == [{b"lost"}, {b"queued"}]
    after.close()


# ---- the daemon under a manager that keeps --------------------------------------------------------------------------


@pytest.fixture
def kept(daemon: Daemon) -> Daemon:
    """Its manager keeps what it is given."""
    daemon.manager.keeps = True
    return daemon


def died(daemon: Daemon) -> None:
    """Killed when it had nothing to do."""
    daemon.kill()
    daemon.manager.forget()


def since_restart(log: list[Json], kind: str) -> list[Json]:
    """The records of this type since the last start."""
    [*_, start] = [record["seq"] for record in log if record["type"] == "start"]
    return [record for record in log[start:] if record["type"] == kind]


def as_change(record: Json) -> Change:
    kinds = sum(Kind[kind.upper()] for kind in record["kinds"])
    return Change(0, record["layer"], os.fsencode(record["path"]), kinds, record["exists"], record["is_dir"])


def layers_told(log: list[Json], kind: str) -> list[str]:
    return sorted(record["layer"].rpartition("-")[2] for record in since_restart(log, kind))


def touch(path: bytes) -> None:
    with open(path, "wb"):
        pass


def test_a_daemon_goes_on_where_the_dead_one_was(sandbox: Sandbox, kept: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"first", b"second", upper=b"up")
    kept.start()
    assert kept.sync(merged) == []
    for number in range(3):
        died(kept)
        assert kept.manager.store.keys() == {"watchd-group-1", "watchd-ledger-1"}
        assert not os.path.exists(merged + b"/%d" % number)
        touch(sandbox.path(b"second/%d" % number))
        kept.start()
        assert kept.sync(merged) == []
        assert os.path.exists(merged + b"/%d" % number)
    log = kept.log()
    assert [record for record in log if record["type"] == "desync"] == []
    assert {"0", "1", "2"} <= {record["path"] for record in log if record["type"] == "change"}


def test_a_daemon_that_stopped_in_good_order_is_followed_without_a_gap(sandbox: Sandbox, kept: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    kept.start()
    for number in range(3):
        touch(sandbox.path(b"low/before-%d" % number))
        kept.stop()
        touch(sandbox.path(b"low/after-%d" % number))
        kept.start()
    assert kept.sync(merged) == []
    assert [record for record in kept.log() if record["type"] == "desync"] == []
    assert kept.changed() >= {f"{when}-{number}" for when in ("before", "after") for number in range(3)}


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_while_nobody_reads_is_told(sandbox: Sandbox, kept: Daemon, seed: int) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    low, outside = (Path(os.fsdecode(sandbox.directory(name))) for name in (b"low", b"outside"))
    churn = Churn(low, outside, seed)
    churn.steps(STEPS)
    kept.start()
    assert kept.sync(merged) == []
    for _ in range(ROUNDS):
        churn.steps(STEPS)
        assert kept.sync(merged) == []
        died(kept)
        before = snapshot(low)
        churn.steps(STEPS)
        kept.start()
        assert kept.sync(merged) == []
        log = kept.log()
        assert since_restart(log, "desync") == []
        assert missed(before, snapshot(low), map(as_change, since_restart(log, "change"))) == set()


def test_what_was_read_and_may_not_be_recorded_is_looked_for(sandbox: Sandbox, kept: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    kept.start()
    assert kept.sync(merged) == []
    died(kept)
    with mmap.mmap(kept.manager.store["watchd-ledger-1"], 0) as ledger:
        struct.pack_into("=Q", ledger, 16, 1)  # as it is while more is being read than can be kept
    touch(sandbox.path(b"low/new"))
    kept.start()
    assert kept.sync(merged) == []
    assert layers_told(kept.log(), "desync") == layers_told(kept.log(), "resync") == ["low"]
    assert "new" in kept.changed()
    died(kept)
    kept.start()
    assert kept.sync(merged) == []
    assert layers_told(kept.log(), "desync") == []


def test_what_was_read_last_is_told_even_if_nothing_happens_any_more(sandbox: Sandbox, kept: Daemon) -> None:
    sandbox.mount_tmpfs(b"quiet")  # the daemon's own files are elsewhere
    merged = sandbox.overlay(b"merged", b"quiet/low", upper=b"up")
    kept.start()
    assert kept.sync(merged) == []
    touch(sandbox.path(b"quiet/low/last"))
    while "last" not in kept.changed():
        os.sched_yield()
    died(kept)
    with mmap.mmap(kept.manager.store["watchd-ledger-1"], 0) as ledger:
        [number] = struct.unpack_from("=Q", ledger, 40)
        struct.pack_into("=Q", ledger, 48, number - 1)  # as if the journal did not have it
        struct.pack_into("=Q", ledger, SLOTS_AT + number % SLOTS * 32 + 24, 0)
    kept.start()
    while not any(record["path"] == "last" for record in since_restart(kept.log(), "change")):
        os.sched_yield()
    assert layers_told(kept.log(), "desync") == []


def test_a_ledger_that_says_nothing_is_not_believed(sandbox: Sandbox, kept: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    kept.start()
    assert kept.sync(merged) == []
    died(kept)
    with mmap.mmap(kept.manager.store["watchd-ledger-1"], 0) as ledger:
        ledger[:4096] = b"\xff" * 4096
    kept.start()
    assert kept.sync(merged) == []
    assert layers_told(kept.log(), "desync") == ["low"]
    died(kept)
    assert kept.manager.store.keys() == {"watchd-group-2", "watchd-ledger-2"}


def test_a_journal_that_lost_its_end_is_behind_the_ledger(sandbox: Sandbox, kept: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    kept.start()
    assert kept.sync(merged) == []
    touch(sandbox.path(b"low/new"))
    assert kept.sync(merged) == []
    died(kept)
    [segment] = (kept.home / "state/journal").glob("*.wal")
    content = segment.read_bytes()
    segment.write_bytes(content[: content.rindex(b"new")])
    kept.start()
    assert kept.sync(merged) == []
    assert layers_told(kept.log(), "desync") == ["low"]
    assert "new" in kept.changed()


def test_another_journal_knows_nothing_of_what_was_read(sandbox: Sandbox, kept: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    state, other = kept.home / "state", kept.home / "other"
    kept.start()
    for number in range(20):
        touch(sandbox.path(b"low/%d" % number))
        assert kept.sync(merged) == []
    kept.stop()
    state.rename(other)
    kept.manager.close()
    kept.manager = ManagerSocket()
    kept.manager.keeps = True
    kept.start()
    assert kept.sync(merged) == []
    died(kept)
    shutil.rmtree(state)
    other.rename(state)
    touch(sandbox.path(b"low/new"))
    kept.start()
    assert kept.sync(merged) == []
    assert layers_told(kept.log(), "desync") == ["low"]
    died(kept)
    touch(sandbox.path(b"low/newer"))
    kept.start()
    assert kept.sync(merged) == []
    assert layers_told(kept.log(), "desync") == []
    assert {"new", "newer"} <= kept.changed()


def test_only_layers_that_were_heard_are_without_a_gap(sandbox: Sandbox, kept: Daemon) -> None:
    sandbox.overlay(b"one", b"always", upper=b"up-1")
    other = sandbox.overlay(b"two", b"sometimes", upper=b"up-2")
    kept.start()
    assert kept.sync() == []
    sandbox.umount(b"two")
    assert kept.sync() == []
    died(kept)
    assert other == sandbox.overlay(b"two", b"sometimes", upper=b"up-2")
    sandbox.overlay(b"three", b"never", upper=b"up-3")
    kept.start()
    assert kept.sync() == []
    assert layers_told(kept.log(), "desync") == []
    assert layers_told(kept.log(), "resync") == ["sometimes"], "of the desync that was told when its mount went"


def test_nothing_stays_in_the_store_that_nobody_needs(sandbox: Sandbox, kept: Daemon) -> None:
    sandbox.overlay(b"one", b"low", upper=b"up-1")
    sandbox.mount_tmpfs(b"filesystem")
    sandbox.overlay(b"two", b"filesystem/low", upper=b"up-2")
    kept.start()
    assert kept.sync() == []
    kept.manager.forget()
    assert len(kept.manager.store) == 4
    sandbox.umount(b"two")
    assert kept.sync() == []
    kept.manager.forget()
    assert len(kept.manager.store) == 2
    died(kept)
    sandbox.umount(b"one")
    kept.start()
    kept.sync()
    kept.manager.forget()
    assert kept.manager.store == {}


def test_a_filesystem_that_was_away_meanwhile_was_not_heard(
    sandbox: Sandbox, kept: Daemon, tmp_path_factory: pytest.TempPathFactory, require: Require
) -> None:
    require(is_makeable("ext4"), "mkfs.ext4")
    image = Image(tmp_path_factory.mktemp("away"), "ext4")
    low, options = os.path.join(image.path, b"low"), (b"upperdir", b"workdir")
    os.mkdir(low)
    device, inode = os.stat(low).st_dev, os.stat(low).st_ino
    layers = [(b"lowerdir+", low), *((option, sandbox.directory(option)) for option in options)]
    merged = sandbox.mount_overlay(b"merged", layers)
    kept.start()
    assert kept.sync(merged) == []
    died(kept)
    sandbox.umount(b"merged")
    umount(image.path)
    mount(os.fsencode(image.device), image.path, b"ext4")
    assert (device, inode) == (os.stat(low).st_dev, os.stat(low).st_ino), "it looks the same"
    touch(os.path.join(low, b"unheard"))
    sandbox.mount_overlay(b"merged", layers)
    kept.start()
    assert kept.sync(merged) == []
    assert layers_told(kept.log(), "desync") == ["low"]
    assert "unheard" in kept.changed()
    kept.stop()
    sandbox.umount(b"merged")
    image.close()


def test_a_gap_that_was_open_stays_open_until_it_is_scanned(sandbox: Sandbox, kept: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    kept.configure(sources={"queue": "default"})
    kept.start()
    assert kept.sync(merged) == []
    kept.pause()
    for number in range(17_000):
        touch(sandbox.path(b"low/%d" % number))
    kept.resume()
    while not any(record["type"] == "desync" for record in kept.log()):
        os.sched_yield()
    died(kept)
    kept.start()
    assert kept.sync(merged) == []
    log = kept.log()
    desyncs = [record["seq"] for record in log if record["type"] == "desync"]
    assert [record["closes"] for record in log if record["type"] == "resync"][-1] == desyncs[-1]
    assert kept.changed() >= {str(number) for number in range(17_000)}


def test_other_settings_need_another_group(sandbox: Sandbox, kept: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    kept.start()
    assert kept.sync(merged) == []
    died(kept)
    kept.configure(sources={"content": False})
    kept.start()
    assert kept.sync(merged) == []
    assert layers_told(kept.log(), "desync") == ["low"]
    kept.manager.forget()
    assert kept.manager.store.keys() == {"watchd-group-2", "watchd-ledger-2"}


def test_a_reload_with_other_settings_gives_the_old_group_back(sandbox: Sandbox, kept: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    kept.start()
    assert kept.sync(merged) == []
    kept.configure(sources={"content": False})
    kept.ask("reload")
    assert kept.sync(merged) == []
    died(kept)
    assert kept.manager.store.keys() == {"watchd-group-2", "watchd-ledger-2"}
    touch(sandbox.path(b"low/new"))
    kept.start()
    assert kept.sync(merged) == []
    assert layers_told(kept.log(), "desync") == []
    assert "new" in kept.changed()


def test_what_the_manager_passes_and_nobody_knows_is_closed_and_said(sandbox: Sandbox, kept: Daemon) -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    kept.manager.store["somebody-s"] = writer
    kept.start()
    os.close(kept.manager.store.pop("somebody-s"))
    assert os.read(reader, 1) == b"", "nobody has the other end"
    os.close(reader)
    assert "somebody-s" in kept.errors()
