"""Mount ids that are never used again, told without walking a path."""

from __future__ import annotations

import os

from tests.kernel.sandbox import Sandbox
from watchd.kernel.listmount import listmount, mount_namespace_id
from watchd.kernel.namespaces import Courier, mount_namespace
from watchd.kernel.statx import mount_of
from watchd.overlay.discovery import discover
from watchd.overlay.mountids import mount_ids_of, read_mount_ids


def test_they_are_those_of_statx_covered_mounts_included(sandbox: Sandbox) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    device, mount = mount_of(merged)
    sandbox.mount_tmpfs(b"merged")
    own = mount_namespace()
    assert read_mount_ids({own: os.getpid()})[own][device] == {mount}


def test_more_mounts_than_one_call_tells_are_all_told(sandbox: Sandbox) -> None:
    sandbox.directory(b"source")
    bound = [mount_of(sandbox.bind(b"source", b"target%d" % number))[1] for number in range(600)]
    assert set(bound) <= set(listmount(mount_namespace_id(os.getpid())))


def test_a_mount_that_only_another_namespace_has_is_told_and_where_nothing_is_known_it_is_looked_at(
    sandbox: Sandbox,
) -> None:
    inmate = sandbox.inmate()
    low, there = (os.fsdecode(sandbox.directory(name)) for name in (b"low", b"there"))
    inmate.run(f"mount -t overlay none -o lowerdir={low}:{os.fsdecode(sandbox.directory(b'other'))} {there}")
    [overlay] = [one for one in discover("all").overlays if one.mount_points[0].path == os.fsencode(there)]
    [point] = overlay.mount_points
    courier = Courier()
    try:
        known = mount_ids_of(overlay, read_mount_ids({point.namespace: point.pid}), courier)
        assert known == mount_ids_of(overlay, {}, courier)
        assert len(known) == 1
    finally:
        courier.close()
