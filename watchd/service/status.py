"""What status, sync and the metrics say: the books as plain values in the shapes of the contract."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

from watchd import __version__
from watchd.coherence.drop_caches import DropCaches
from watchd.coherence.engine import Engine, MountState
from watchd.coherence.report import mount_report, name
from watchd.coherence.view import Stale
from watchd.errors import JournalError
from watchd.journal.cursors import Cursor, Cursors, lag
from watchd.journal.writer import Journal
from watchd.kernel import filesystems
from watchd.metrics import Snapshot
from watchd.overlay.servers import servers_of
from watchd.service.layer import Layer
from watchd.service.layers import LayerBook
from watchd.service.mounts import Mount, MountBook, layer_waiting
from watchd.service.patience import Waiting

CURSORS_SHOWN_MAX = 100
"""Series of metrics: of more cursors the first by name are shown."""

FILESYSTEMS = {
    filesystems.EXT4_SUPER_MAGIC: "ext4",
    filesystems.XFS_SUPER_MAGIC: "xfs",
    filesystems.BTRFS_SUPER_MAGIC: "btrfs",
    filesystems.TMPFS_MAGIC: "tmpfs",
    filesystems.SQUASHFS_MAGIC: "squashfs",
    filesystems.EROFS_SUPER_MAGIC: "erofs",
    filesystems.FUSE_SUPER_MAGIC: "fuse",
    filesystems.OVERLAYFS_SUPER_MAGIC: "overlay",
    filesystems.CGROUP2_SUPER_MAGIC: "cgroup2",
    filesystems.CGROUP_SUPER_MAGIC: "cgroup",
    filesystems.NFS_SUPER_MAGIC: "nfs",
}


def mounts_status(mounts: Iterable[Mount], engine: Engine) -> list[dict[str, Any]]:
    """The list `mounts` of status and sync."""
    return [_mount(mount, engine) for mount in mounts]


def status(
    books: MountBook, layers: LayerBook, engine: Engine, journal: Journal, *, cursors: Mapping[str, Cursor]
) -> dict[str, Any]:
    """All of `status --json`."""
    return {
        "version": __version__,
        "pid": os.getpid(),
        "mounts": mounts_status(books.mounts.values(), engine),
        "layers": [_layer(layer, known=layers.is_known(layer)) for layer in layers.layers.values()],
        "journal": {
            "path": str(journal.directory),
            "epoch": journal.epoch,
            "first_seq": journal.first_seq,
            "last_seq": journal.last_seq,
            "bytes": journal.bytes,
            "state": "failed" if journal.failure else "ok",
            "reason": str(journal.failure or ""),
        },
        "cursors": [
            {"name": name, "cursor": str(cursor), "lag": lag(cursor, journal.epoch, journal.last_seq)}
            for name, cursor in cursors.items()
        ],
        "problems": list(books.problems),
    }


def all_cursors(cursors: Cursors) -> dict[str, Cursor]:
    """None when they cannot be read: that their disk fails is told elsewhere, and all else can be shown. May block."""
    try:
        return cursors.all()
    except JournalError:
        return {}


def snapshot(
    books: MountBook,
    layers: LayerBook,
    engine: Engine,
    journal: Journal,
    drop_caches: DropCaches,
    *,
    cursors: Cursors,
) -> Snapshot:
    """What a scrape shows; called in the metrics server's threads, and copies before it looks."""
    named = all_cursors(cursors)
    standings = {mount.overlay.device: state_of(mount, engine) for mount in list(books.mounts.values())}
    return Snapshot(
        layer_states=[layer.state for layer in list(layers.layers.values())],
        mount_states=[now.state for now in standings.values()],
        stale_entries={device: len(now.stale) for device, now in standings.items()},
        pinned_entries={device: sum(bool(one.pinned_by) for one in now.stale) for device, now in standings.items()},
        journal_last_sequence=journal.last_seq,
        journal_bytes=journal.bytes,
        journal_failed=journal.failure is not None,
        cursor_lags={
            name: lag(cursor, journal.epoch, journal.last_seq)
            for name, cursor in islice(named.items(), CURSORS_SHOWN_MAX)
        },
        queue_bytes=layers.queue_bytes(),
        muted_directories=layers.muted_directories(),
        drop_caches=drop_caches.count,
        drop_caches_refused=drop_caches.refused,
    )


class Standing(NamedTuple):
    """How a mount stands, as it is shown."""

    state: str
    """The contract's word."""
    reason: str
    stale: tuple[Stale, ...] = ()
    actions: Mapping[str, int] = {}
    """How often which action was taken."""


def state_of(mount: Mount, engine: Engine) -> Standing:
    """What the engine knows of a mount, unless what lies below it is in trouble."""
    known = engine.state(mount.overlay.device)
    if known is None:
        return Standing("failed", mount.waiting() or "not kept any more")
    trouble = _trouble(mount, known)
    state, reason = ("failed", trouble) if trouble else (known.state, known.error)
    return Standing(state, reason, known.stale, known.actions)


def _trouble(mount: Mount, known: MountState) -> str:
    """Why what the engine knows does not count; "" if it does."""
    if waiting := mount.waiting():
        return waiting
    if known.waiting_since_ns is not None and (servers := servers_of(mount.overlay)):
        # With no server on the way it is a long round, and what was known last still holds.
        return f"waiting for {servers} {Waiting(known.waiting_since_ns / 1e9)}"
    if mount.unknown:
        return f"{os.fsdecode(mount.unknown[0].path)}: {mount.unknown[0].error}"
    if known.displaced:
        return ""
    failed = next((layer for layer in mount.layers if layer.state == "failed"), None)
    return f"layer {failed.name}: {failed.reason}" if failed else ""


def _mount(mount: Mount, engine: Engine) -> dict[str, Any]:
    now = state_of(mount, engine)
    known = engine.state(mount.overlay.device)
    stale = (*now.stale, *(known.damage if known else ()))
    return mount_report(mount.overlay, state=now.state, reason=now.reason, stale=stale, actions=now.actions)


def _layer(layer: Layer, *, known: bool) -> dict[str, Any]:
    waiting = layer_waiting(layer)
    state = "failed" if waiting and layer.state == "live" else layer.state
    return {
        "name": layer.name,
        **name(layer.directory.path),
        "fstype": FILESYSTEMS.get(layer.directory.magic, f"{layer.directory.magic:#x}"),
        "backend": layer.worker.source.backend if layer.worker else None,
        "state": state,
        "reason": waiting or layer.reason,
        "mounts": sorted(layer.devices | layer.data_of),
        "known": known,
    }
