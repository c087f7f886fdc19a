"""From an overlay and its resolved layers to a target that can be verified and acted upon."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from watchd.coherence.target import LayerRoot, Target
from watchd.errors import MountError
from watchd.kernel import filesystems
from watchd.kernel.namespaces import Courier, mount_namespace
from watchd.overlay.access import clone_directory, clone_mount
from watchd.overlay.model import LayerDirectory, MountPoint, Overlay, ResolvedStack
from watchd.overlay.upper import open_upper

CACHE_TELLS = frozenset(
    {
        filesystems.EXT4_SUPER_MAGIC,
        filesystems.XFS_SUPER_MAGIC,
        filesystems.BTRFS_SUPER_MAGIC,
        filesystems.TMPFS_MAGIC,
        filesystems.SQUASHFS_MAGIC,
        filesystems.EROFS_SUPER_MAGIC,
    }
)
"""f_type of filesystems whose dentries are never revalidated, so that RESOLVE_CACHED finds what is cached. Held by a test for
each. Everything else is looked up in earnest, which is slower and right."""


def cache_tells(layer: LayerDirectory, telling_overlays: Collection[int] = ()) -> bool:
    """Whether RESOLVE_CACHED finds what is cached of this layer."""
    return layer.magic in CACHE_TELLS or layer.device in telling_overlays


def layers_of(stack: ResolvedStack) -> list[LayerDirectory]:
    """Top first, the upper included, data-only layers left out."""
    return ([stack.upper] if stack.upper else []) + list(stack.lowers)


def build_target(
    overlay: Overlay,
    stack: ResolvedStack,
    courier: Courier,
    *,
    observe: bool = False,
    actions: tuple[str, ...] = ("invalidate",),
    evict_limit_bytes: int = 256 << 20,
    budget: float = 0.1,
    telling_overlays: Collection[int] = (),
    on_server: bool = False,
    around: Iterable[MountPoint] = (),
) -> Target:
    """A target for the overlay. Layers that are unknown fail when they are opened, not here.

    `around`: mounts of overlays around this one; `root` is the directory of this one that each shows.
    `telling_overlays`: st_dev of overlays, perhaps layers of this one, whose own layers all pass `cache_tells`.
    """
    return Target(
        device=overlay.device,
        mount_point=primary_point(overlay).path,
        mount_points=tuple({point.path: None for point in overlay.mount_points if point.root == b"/"}),
        layers=tuple(_root(layer, courier, telling_overlays) for layer in layers_of(stack)),
        open=functools.partial(_open_merged, overlay, courier),
        around=tuple(around),
        has_upper=stack.upper is not None,
        read_only=overlay.read_only,
        userxattr="userxattr" in overlay.options,
        splits_files=is_on("metacopy", overlay),
        data_only=tuple(_root(layer, courier, telling_overlays) for layer in stack.data_only),
        # Shown as on wherever there is no upper, where nothing can be renamed.
        renames_directories=overlay.upperdir is not None and is_on("redirect_dir", overlay),
        on_server=on_server,
        observe=observe,
        actions=actions,
        evict_limit_bytes=evict_limit_bytes,
        overlay=overlay,
        stack=stack,
        open_upper=None if stack.upper is None else functools.partial(open_upper, overlay, stack, courier),
        budget=budget,
    )


def is_on(option: str, overlay: Overlay) -> bool:
    """Whether an option is on that mountinfo shows only where it differs from the module's default."""
    return overlay.options.get(option, _default(option)) in ("on", "Y")


def _default(option: str) -> str:
    try:
        return Path("/sys/module/overlay/parameters", option).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _root(layer: LayerDirectory, courier: Courier, telling_overlays: Collection[int]) -> LayerRoot:
    return LayerRoot(
        layer.path,
        functools.partial(clone_directory, layer, courier),
        key=(layer.view.namespace, layer.path, layer.device, layer.handle),
        cache_tells=cache_tells(layer, telling_overlays),
    )


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
