"""Look for overlay mounts and their layers. Whatever waits for a filesystem is asked with patience.

Facts
* Device numbers of overlays are used again at once, and a mount that was unmounted and mounted again with the same options
  looks the same in mountinfo. Mount ids of listmount(2) and statx(2) are never used again (6.8), so they tell; where they
  cannot be had, mountinfo has to do.
* /proc, mountinfo included, waits for no filesystem.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial

from watchd.config.schema import Discovery as Selection
from watchd.kernel.namespaces import Courier
from watchd.overlay.discovery import Discovery, is_selected
from watchd.overlay.layers import resolve
from watchd.overlay.model import Overlay, ResolvedStack
from watchd.overlay.mountids import MountIds, mount_ids_of
from watchd.service.patience import Patience, Waiting


@dataclass(frozen=True)
class Sighting:
    """An overlay that is mounted now."""

    overlay: Overlay
    mount_ids: frozenset[int] = frozenset()
    stack: ResolvedStack | None = None
    """None: known already, and not looked up again; or nobody answered."""
    waiting: Waiting | None = None
    """Since when it is waited for what the rest would say."""


@dataclass(frozen=True)
class Survey:
    """One look at the host."""

    sightings: Mapping[str, Sighting] = field(default_factory=dict)
    """By device."""
    problems: tuple[str, ...] = ()


_Seen = tuple[frozenset[int], ResolvedStack | None]


async def survey(
    found: Discovery,
    selection: Selection,
    known: Mapping[str, frozenset[int]],
    mount_ids: MountIds,
    courier: Courier,
    patience: Patience,
) -> Survey:
    """All selected overlays of those found. `known`: mount ids of those whose layers need not be looked up again, by device."""
    selected = [
        overlay
        for overlay in found.overlays
        if is_selected(overlay, include=selection.include, exclude=selection.exclude)
    ]
    questions = {
        _key(overlay): partial(_look, overlay, known.get(overlay.device, frozenset()), mount_ids, courier)
        for overlay in selected
    }
    answers = await patience.ask(questions)
    return Survey({overlay.device: _sighting(overlay, answers[_key(overlay)]) for overlay in selected}, found.problems)


def _key(overlay: Overlay) -> Hashable:
    """What an overlay is told by, lest an answer be taken for that of another one with the same number."""
    return overlay.device, overlay.lowerdir, overlay.upperdir


def _sighting(overlay: Overlay, answer: _Seen | Waiting) -> Sighting:
    if isinstance(answer, Waiting):
        return Sighting(overlay, waiting=answer)
    return Sighting(overlay, *answer)


def _look(overlay: Overlay, known: frozenset[int], mount_ids: MountIds, courier: Courier) -> _Seen:
    ids = mount_ids_of(overlay, mount_ids, courier)
    return ids, None if ids & known else resolve(overlay, courier)
