"""From an overlay and its resolved layers to a target that can be verified and acted upon."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from watchd.coherence.target import LayerRoot, Target
from watchd.errors import MountError
from watchd.kernel.namespaces import Courier, mount_namespace
from watchd.overlay.access import clone_directory, clone_mount
from watchd.overlay.model import MountPoint, Overlay, ResolvedStack

CACHE_TELLS = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # xfs
        0x9123683E,  # btrfs
        0x01021994,  # tmpfs
        0x73717368,  # squashfs
        0xE0F5E1E2,  # erofs
    }
)
"""f_type of filesystems whose dentries are never revalidated, so that RESOLVE_CACHED finds what is cached. Held by a test for
each. Everything else is looked up in earnest, which is slower and right."""


def build_target(
    overlay: Overlay, stack: ResolvedStack, courier: Courier, *, observe: bool = False, budget: float = 0.1
) -> Target:
    """A target for the overlay. Layers that are unknown fail when they are opened, not here."""
    layers = ([stack.upper] if stack.upper else []) + list(stack.lowers)
    return Target(
        device=overlay.device,
        mount_point=primary_point(overlay).path,
        layers=tuple(
            LayerRoot(
                layer.path,
                functools.partial(clone_directory, layer, courier),
                key=(layer.view.namespace, layer.path, layer.device, layer.handle),
                cache_tells=layer.magic in CACHE_TELLS,
            )
            for layer in layers
        ),
        open=functools.partial(_open_merged, overlay, courier),
        has_upper=stack.upper is not None,
        read_only=overlay.read_only,
        userxattr="userxattr" in overlay.options,
        renames_directories=overlay.options.get("redirect_dir", _default("redirect_dir")) in ("on", "Y"),
        observe=observe,
        budget=budget,
    )


def _default(option: str) -> str:
    """The module's default, which mountinfo does not show; "" if it cannot be read."""
    try:
        return Path("/sys/module/overlay/parameters", option).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def primary_point(overlay: Overlay) -> MountPoint:
    """The mount point to speak of: one of our own namespace that shows the whole overlay, if there is one."""
    own = mount_namespace()
    return min(overlay.mount_points, key=lambda point: (point.root != b"/", point.namespace != own))


def _open_merged(overlay: Overlay, courier: Courier) -> int:
    """A clone of the first mount that can be had of those that show the overlay's root."""
    problems = []
    for point in overlay.mount_points:
        if point.root != b"/":
            continue
        try:
            return clone_mount(point, courier, device=overlay.device)
        except MountError as error:
            problems.append(str(error))
    reason = problems[0] if problems else "no mount shows the root of this overlay"
    raise MountError(f"{os.fsdecode(primary_point(overlay).path)}: {reason}" if not problems else reason)
