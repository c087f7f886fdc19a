"""Overlays for a verb that works without the daemon: those that MOUNT arguments mean, as targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from watchd.coherence.target import Target
from watchd.coherence.targets import build_target, cache_tells, layers_of
from watchd.config import schema as config
from watchd.errors import UsageError
from watchd.kernel.namespaces import Courier
from watchd.overlay.discovery import discover, is_selected, matches
from watchd.overlay.layers import resolve
from watchd.overlay.model import Overlay, ResolvedStack, device_name, device_number

DEFAULT = config.Discovery()


def targets(patterns: Sequence[str], courier: Courier, *, discovery: config.Discovery = DEFAULT) -> Iterator[Target]:
    """The overlays of all namespaces that a pattern matches; their layers are looked up one by one.

    Without patterns it is those that `discovery` selects, as the daemon does.

    Raises UsageError for a pattern that matches nothing.
    """
    overlays = discover("all").overlays
    for pattern in patterns:
        if not any(matches(overlay, pattern) for overlay in overlays):
            raise UsageError(f"no overlay mount matches {pattern!r}", remedy="see `findmnt -t overlay`")
    devices = {overlay.device: overlay for overlay in overlays}
    if patterns:
        wanted = [overlay for overlay in overlays if any(matches(overlay, pattern) for pattern in patterns)]
    else:
        wanted = _selected(discovery, overlays)
    for overlay in wanted:
        stack = resolve(overlay, courier)
        yield build_target(overlay, stack, courier, telling_overlays=_telling(stack, devices, courier))


def _selected(discovery: config.Discovery, overlays: Sequence[Overlay]) -> list[Overlay]:
    known = overlays if discovery.namespaces == "all" else discover(discovery.namespaces).overlays
    return [overlay for overlay in known if is_selected(overlay, include=discovery.include, exclude=discovery.exclude)]


def _telling(stack: ResolvedStack, overlays: Mapping[str, Overlay], courier: Courier) -> set[int]:
    """The overlays among the layers, nested ones too, whose dentry cache tells what it holds."""
    telling: set[int] = set()
    for layer in layers_of(stack):
        inner = overlays.get(device_name(layer.device))
        if inner is None or layer.error:
            continue
        below = resolve(inner, courier)
        telling |= _telling(below, overlays, courier)
        if all(cache_tells(one, telling) for one in layers_of(below)):
            telling.add(device_number(inner.device))
    return telling
