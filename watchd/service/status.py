"""What status, sync and the metrics say: the books as plain values in the shapes of the contract."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from watchd import __version__
from watchd.coherence.engine import Engine
from watchd.coherence.report import mount_report, name
from watchd.coherence.view import Stale
from watchd.journal.writer import Journal
from watchd.kernel import filesystems
from watchd.metrics import Snapshot
from watchd.overlay.servers import servers_of
from watchd.service.layers import Layer, LayerBook
from watchd.service.mounts import Mount, MountBook, layer_waiting
from watchd.service.patience import Waiting

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


def status(books: MountBook, layers: LayerBook, engine: Engine, journal: Journal) -> dict[str, Any]:
    """All of `status --json`."""
    return {
        "version": __version__,
        "pid": os.getpid(),
        "mounts": mounts_status(books.mounts.values(), engine),
        "layers": [_layer(layer) for layer in layers.layers.values()],
        "journal": {
            "path": str(journal.directory),
            "epoch": journal.epoch,
            "first_seq": journal.first_seq,
            "last_seq": journal.last_seq,
            "bytes": journal.bytes,
        },
        "cursors": [],
        "problems": list(books.problems),
    }


def snapshot(books: MountBook, layers: LayerBook, engine: Engine, journal: Journal) -> Snapshot:
    """What a scrape shows; called in the metrics server's threads, and copies before it looks."""
    mounts = list(books.mounts.values())
    return Snapshot(
        layer_states=[layer.state for layer in list(layers.layers.values())],
        mount_states=[state_of(mount, engine)[0] for mount in mounts],
        stale_entries={mount.overlay.device: len(state_of(mount, engine)[2]) for mount in mounts},
        pinned_entries={
            mount.overlay.device: sum(bool(entry.pinned_by) for entry in state_of(mount, engine)[2]) for mount in mounts
        },
        journal_last_sequence=journal.last_seq,
        journal_bytes=journal.bytes,
        queue_bytes=layers.queue_bytes(),
        muted_directories=layers.muted_directories(),
    )


def state_of(mount: Mount, engine: Engine) -> tuple[str, str, tuple[Stale, ...], dict[str, int]]:
    """State, reason, what is stale, and how often which action was taken."""
    known = engine.state(mount.overlay.device)
    waiting = mount.waiting()
    if known is None:
        return "failed", waiting or "not kept any more", (), {}
    if waiting:
        return "failed", waiting, known.stale, {**known.actions}
    if known.waiting_since_ns is not None and (servers := servers_of(mount.overlay)):
        # With no server on the way it is a long round, and what was known last still holds.
        waiting = f"waiting for {servers} {Waiting(known.waiting_since_ns / 1e9)}"
        return "failed", waiting, known.stale, {**known.actions}
    if mount.unknown:
        return (
            "failed",
            f"{os.fsdecode(mount.unknown[0].path)}: {mount.unknown[0].error}",
            known.stale,
            {**known.actions},
        )
    if known.displaced:
        return known.state, known.error, known.stale, {**known.actions}
    for layer in mount.layers:
        if layer.state == "failed":
            return "failed", f"layer {layer.name}: {layer.reason}", known.stale, {**known.actions}
    return known.state, known.error, known.stale, {**known.actions}


def _mount(mount: Mount, engine: Engine) -> dict[str, Any]:
    state, reason, stale, actions = state_of(mount, engine)
    known = engine.state(mount.overlay.device)
    damage = known.damage if known else ()
    return mount_report(mount.overlay, state=state, reason=reason, stale=(*stale, *damage), actions=actions)


def _layer(layer: Layer) -> dict[str, Any]:
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
    }
