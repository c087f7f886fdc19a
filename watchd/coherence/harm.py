"""When an overlay must not be replaced by a new one, as far as it can be foreseen.

Facts
* `volatile` overlays must not be mounted twice, and with `index=on` an upper directory is given to one overlay only (EBUSY).
* A process keeps its root directory when the mount goes, and what is mounted below is gone for it.
* An umount below a shared mount takes away, in its peers and slaves, whatever is mounted at the same place. That of a tree
  spreads from each mount in it: so the peers of an overlay lose their submounts with it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping

from watchd.errors import RefusedError
from watchd.kernel.libc import AT_FDCWD
from watchd.kernel.statx import shown_mount_id
from watchd.overlay.capture import Capture, Place, attribute_flags
from watchd.overlay.model import View
from watchd.wire.mountinfo import MountInfo


def refuse_what_harms(captured: Capture, mounts: Mapping[View, Iterable[MountInfo]]) -> None:
    """Raises RefusedError if replacing the overlay is known to harm or not to work. `mounts`: of all namespaces."""
    if captured.option(b"volatile") is not None or captured.option(b"fsync") == b"volatile":
        raise RefusedError("an overlay with `volatile` must not be mounted twice")
    if captured.option(b"index") == b"on" and captured.option(b"upperdir") is not None:
        raise RefusedError("with index=on the kernel gives an upper directory to one overlay only")
    for place in captured.places:
        _refuse_place(place)
    _refuse_peers(captured)
    _refuse_root_directories(captured)
    _refuse_foreign_mounts(captured, mounts)


def _refuse_place(place: Place) -> None:
    shown = os.fsdecode(place.mount.path)
    if place.parent is None:
        raise RefusedError(f"{shown} is the root directory of process {place.view.pid}")
    if any(child.path == place.mount.path for child in place.children):
        raise RefusedError(f"{shown} is covered by another mount")
    for unbindable in (mount for mount in place.submounts if mount.propagation.unbindable):
        raise RefusedError(f"{os.fsdecode(unbindable.path)} below it is unbindable and could not be kept")
    if place.mount.root.endswith(b"//deleted"):
        raise RefusedError(f"{shown} shows a directory that was deleted")
    try:
        attribute_flags(place.mount.attributes)
    except KeyError as unknown:
        raise RefusedError(f"{shown} is mounted with {unknown.args[0]}, which cannot be given anew") from None


def _refuse_peers(captured: Capture) -> None:
    """What is mounted on a mount is unmounted from its peers too, where the umount has to spread."""
    for place in (place for place in captured.places if place.spreads and place.children):
        for other in captured.places:
            is_peer = other is not place and other.mount.propagation.shared == place.mount.propagation.shared != 0
            if is_peer and (other.parent == place.parent or not other.follows(place)):
                raise RefusedError(f"{os.fsdecode(other.mount.path)}, its peer, would lose what is mounted below it")


def _refuse_root_directories(captured: Capture) -> None:
    """A process keeps its root directory, and would lose what is mounted below it."""
    ids = {mount.mount_id for place in captured.places for mount in (place.mount, *place.submounts)}
    for pid in (name for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            if shown_mount_id(AT_FDCWD, b"/proc/%s/root" % os.fsencode(pid)) in ids:
                raise RefusedError(f"process {pid} has its root directory there", remedy="restart it after a new mount")


def _refuse_foreign_mounts(captured: Capture, mounts: Mapping[View, Iterable[MountInfo]]) -> None:
    """An umount below a shared mount takes away, in its peers and slaves, whatever is mounted at the same place."""
    sharing = [place for place in captured.places if place.spreads]
    for view, infos in mounts.items() if sharing else ():
        children = {(info.parent_id, info.mount_point): info for info in infos}
        for info in infos:
            for place in sharing:
                found = children.get((info.mount_id, _where_it_spreads(place, info)))
                if found and found.device_name != captured.device:
                    shown = os.fsdecode(found.mount_point)
                    raise RefusedError(f"{shown} of process {view.pid}, another mount, would be unmounted with it")


def _where_it_spreads(place: Place, info: MountInfo) -> bytes:
    """Where a mount at `place` appears below the mount `info`; b"" if it does not."""
    assert place.parent is not None
    group = place.parent.propagation.shared
    if not {b"shared:%d" % group, b"master:%d" % group} & {*info.tags}:
        return b""
    inside = place.parent.root.rstrip(b"/") + place.mount.path[len(place.parent.path.rstrip(b"/")) :]
    root = info.root.rstrip(b"/")
    return info.mount_point.rstrip(b"/") + inside[len(root) :] if inside.startswith(root + b"/") else b""
