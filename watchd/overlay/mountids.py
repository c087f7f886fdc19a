"""Which mount is which: ids that are never used again, by namespace and device."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial

from watchd.errors import WatchdError
from watchd.kernel.listmount import listmount, mount_namespace_id, statmount_device
from watchd.kernel.namespaces import Courier
from watchd.kernel.statx import mount_of
from watchd.overlay.access import in_view
from watchd.overlay.model import Overlay, device_number

MountIds = Mapping[int, Mapping[int, frozenset[int]]]
"""Namespace (inode number) -> st_dev -> mounts."""


def read_mount_ids(pids: Mapping[int, int]) -> MountIds:
    """The mounts of these namespaces (inode number -> a process in it). What cannot be told so (6.11) is left out."""
    found: dict[int, Mapping[int, frozenset[int]]] = {}
    for namespace, pid in pids.items():
        with contextlib.suppress(OSError):
            number = mount_namespace_id(pid)
            found[namespace] = _by_device(listmount(number), number)
    return found


def _by_device(mounts: Iterable[int], namespace: int) -> Mapping[int, frozenset[int]]:
    devices: defaultdict[int, set[int]] = defaultdict(set)
    for mount in mounts:
        with contextlib.suppress(FileNotFoundError):  # unmounted meanwhile
            devices[statmount_device(mount, namespace)].add(mount)
    return {device: frozenset(ids) for device, ids in devices.items()}


def mount_ids_of(overlay: Overlay, known: MountIds, courier: Courier) -> frozenset[int]:
    """The mounts of an overlay. In a namespace that is not known its mount points are looked at, which waits for what they lie
    in, and only those that nothing covers are found."""
    device = device_number(overlay.device)
    ids: set[int] = set()
    for point in overlay.mount_points:
        if point.namespace in known:
            ids |= known[point.namespace].get(device, frozenset())
            continue
        try:
            shown, mount = in_view(point.view, partial(mount_of, point.path), courier=courier)
        except (OSError, WatchdError):
            continue
        if shown == device:
            ids.add(mount)
    return frozenset(ids)
