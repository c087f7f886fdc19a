"""Look for overlay mounts and their layers. Everything here waits for filesystems, so it runs in a thread.

Facts: device numbers of overlays are used again at once, and a mount that was unmounted and mounted again with the same options
looks the same in mountinfo. Mount ids of statx(2) are never used again (6.8), so they tell; where they cannot be had, mountinfo
has to do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from watchd.config.schema import Discovery
from watchd.errors import WatchdError
from watchd.kernel.namespaces import Courier
from watchd.kernel.statx import mount_id
from watchd.overlay.access import in_view
from watchd.overlay.discovery import Namespaces, is_selected, read_overlays
from watchd.overlay.layers import resolve
from watchd.overlay.model import Overlay, ResolvedStack, device_number


@dataclass(frozen=True)
class Sighting:
    """An overlay that is mounted now."""

    overlay: Overlay
    mount_ids: frozenset[int]
    stack: ResolvedStack | None
    """None: known already, and not looked up again."""


@dataclass(frozen=True)
class Survey:
    """One look at the host."""

    sightings: Mapping[str, Sighting] = field(default_factory=dict)
    """By device."""
    problems: tuple[str, ...] = ()


def survey(
    namespaces: Namespaces, selection: Discovery, known: Mapping[str, frozenset[int]], courier: Courier
) -> Survey:
    """All selected overlays. `known`: mount ids of those whose layers need not be looked up again, by device."""
    found = read_overlays(namespaces)
    sightings = {}
    for overlay in found.overlays:
        if not is_selected(overlay, include=selection.include, exclude=selection.exclude):
            continue
        ids = _mount_ids(overlay, courier)
        same = ids & known.get(overlay.device, frozenset())
        sightings[overlay.device] = Sighting(overlay, ids, None if same else resolve(overlay, courier))
    return Survey(sightings, found.problems)


def _mount_ids(overlay: Overlay, courier: Courier) -> frozenset[int]:
    device = device_number(overlay.device)
    ids = set()
    for point in overlay.mount_points:
        try:
            ids.add(in_view(point.view, lambda path=point.path: _mount_id(path, device), courier=courier))  # type: ignore[misc]
        except (OSError, WatchdError):
            continue
    return frozenset(ids)


def _mount_id(path: bytes, device: int) -> int:
    if os.stat(path).st_dev != device:
        raise FileNotFoundError(path)
    return mount_id(path)
