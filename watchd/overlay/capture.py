"""The whole state of an overlay as it is mounted: what it takes to mount it again as it was.

Facts
* The options of the superblock are shown as the mounter gave them, escapes and all, so the same strings given again make the
  same overlay, and show the same again (see `watchd.overlay.model` for what is not shown). `seclabel` is said by the kernel
  and can't be given. The kernel accepts `ro` for an overlay without an upper, which is read-only anyhow.
* The flags of a mount (ro, nosuid, nodev, noexec, nosymfollow, and how access times are kept) stand in another field than
  those of the superblock. relatime is what a mount has that nothing was asked of; `strictatime` shows nothing.
* `shared:N` and `master:N` name peer groups, by numbers that all namespaces share. A mount may have both.
* A mount that covers another one is its child, at the same path. A mount whose parent is not listed is the root of the process
  whose mountinfo it is, or of its namespace.
* Mount ids are used again after an umount; they are good for the moment in which they were read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from watchd.errors import WireError
from watchd.kernel import mounts as kernel
from watchd.overlay.discovery import find_namespaces, read_mountinfo
from watchd.overlay.model import View
from watchd.wire.mountinfo import OVERLAY, MountInfo, parse_mountinfo, split_options

_ATTRIBUTES: Mapping[str, int] = {
    "ro": kernel.MOUNT_ATTR_RDONLY,
    "nosuid": kernel.MOUNT_ATTR_NOSUID,
    "nodev": kernel.MOUNT_ATTR_NODEV,
    "noexec": kernel.MOUNT_ATTR_NOEXEC,
    "nosymfollow": kernel.MOUNT_ATTR_NOSYMFOLLOW,
    "noatime": kernel.MOUNT_ATTR_NOATIME,
    "nodiratime": kernel.MOUNT_ATTR_NODIRATIME,
    "relatime": kernel.MOUNT_ATTR_RELATIME,
    "rw": 0,
}


class Propagation(msgspec.Struct, frozen=True):
    """How mounts made on a mount spread (mount_namespaces(7)); private if nothing is set."""

    shared: int = 0
    """Its peer group."""
    master: int = 0
    """The peer group that it receives from."""
    unbindable: bool = False


class Mount(msgspec.Struct, frozen=True):
    """One mount of any filesystem."""

    mount_id: int
    parent_id: int
    device: str
    """major:minor"""
    path: bytes
    root: bytes
    """The directory of the filesystem that is mounted."""
    attributes: tuple[str, ...]
    """As mountinfo names them."""
    propagation: Propagation


class Place(msgspec.Struct, frozen=True):
    """One mount of the overlay, with what is around it."""

    view: View
    mount: Mount
    parent: Mount | None
    """None if the mount is the root directory of the process of `view`."""
    submounts: tuple[Mount, ...]
    """All that is mounted below it, each after the one that it is mounted on."""

    @property
    def spreads(self) -> bool:
        """Whether what is mounted and unmounted here is so in other places too, because the parent is shared."""
        return self.parent is not None and bool(self.parent.propagation.shared)

    def follows(self, leader: Place) -> bool:
        """Whether what is mounted at `leader` appears here too, if it does so at that path."""
        if self.parent is None or leader.parent is None:
            return False
        group = leader.parent.propagation.shared
        return bool(group) and group in (self.parent.propagation.shared, self.parent.propagation.master)

    @property
    def children(self) -> tuple[Mount, ...]:
        """The submounts that are mounted on the overlay itself."""
        return tuple(mount for mount in self.submounts if mount.parent_id == self.mount.mount_id)


class Capture(msgspec.Struct, frozen=True):
    """An overlay as it is mounted."""

    device: str
    """major:minor"""
    source: bytes
    options: tuple[tuple[bytes, bytes], ...]
    """The super options in their order, as shown; a flag has the value b""."""
    places: tuple[Place, ...]
    """Every mount of it, those of our own namespace first."""

    def option(self, name: bytes) -> bytes | None:
        """The value of an option, b"" for a flag, None if it is not shown."""
        return dict(self.options).get(name)


def read_mounts() -> dict[View, tuple[MountInfo, ...]]:
    """All mounts of all namespaces, our own first; what must not be read or is gone is left out."""
    mounts: dict[View, tuple[MountInfo, ...]] = {}
    for namespace, pid in find_namespaces("all").pids.items():
        try:
            mounts[View(pid, namespace)] = parse_mountinfo(read_mountinfo(pid))
        except (OSError, WireError):
            continue
    return mounts


def capture(device: str, mounts: Mapping[View, Iterable[MountInfo]]) -> Capture | None:
    """The overlay `device` as these mounts show it; None if none of them does."""
    places: list[Place] = []
    shown: MountInfo | None = None
    for view, listed in mounts.items():
        infos = tuple(listed)
        for info in infos:
            if info.fstype == OVERLAY and info.device_name == device:
                shown = shown or info
                places.append(_place(view, info, infos))
    if shown is None:
        return None
    return Capture(device, shown.source, tuple(split_options(shown.super_options)), tuple(places))


def attribute_flags(attributes: Iterable[str]) -> int:
    """MOUNT_ATTR_* for mount_setattr(2). Raises KeyError naming one that is not known, as `idmapped`."""
    wanted = tuple(attributes)
    flags = 0
    for attribute in wanted:
        flags |= _ATTRIBUTES[attribute]
    return flags if {"relatime", "noatime"} & {*wanted} else flags | kernel.MOUNT_ATTR_STRICTATIME


def _place(view: View, info: MountInfo, infos: tuple[MountInfo, ...]) -> Place:
    parent = next((other for other in infos if other.mount_id == info.parent_id), None)
    return Place(view, _mount(info), _mount(parent) if parent else None, tuple(map(_mount, _below(info, infos))))


def _below(top: MountInfo, infos: tuple[MountInfo, ...]) -> Iterator[MountInfo]:
    children: dict[int, list[MountInfo]] = {}
    for info in infos:
        children.setdefault(info.parent_id, []).append(info)
    waiting = [*children.get(top.mount_id, ())]
    while waiting:
        info = waiting.pop(0)
        yield info
        waiting += children.get(info.mount_id, ())


def _mount(info: MountInfo) -> Mount:
    return Mount(
        mount_id=info.mount_id,
        parent_id=info.parent_id,
        device=info.device_name,
        path=info.mount_point,
        root=info.root,
        attributes=tuple(info.options.decode("ascii", "backslashreplace").split(",")),
        propagation=_propagation(info.tags),
    )


def _propagation(tags: Iterable[bytes]) -> Propagation:
    groups = {name: number for name, _, number in (tag.partition(b":") for tag in tags)}
    return Propagation(
        shared=int(groups.get(b"shared", b"0")),
        master=int(groups.get(b"master", b"0")),
        unbindable=b"unbindable" in groups,
    )
