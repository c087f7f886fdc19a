"""Putting one mount in the place of another.

Everything here runs as an errand in the mount namespace of the place (`watchd.kernel.namespaces.Courier`), in a thread with a
working directory of its own, and makes system calls only.

Facts
* A mount that goes BENEATH another one takes its place in one step, and is uncovered by the umount of what is on top: at no
  moment is there no mount. Under a shared parent the new one is made shared and appears beneath the old ones in all peers
  and slaves too, and the umount removes those.
* The umount of a tree spreads from each mount in it, to the peers of what that is mounted on. A clone of a shared mount is its
  peer, so it would lose its submounts with the original, had not one of them left the peer group.
* Refused (EINVAL) for the root of a process or of a namespace and for a locked mount, which is one that was copied from a more
  privileged namespace. A locked one is told by umount2(MNT_EXPIRE): EINVAL, where another one that is open is EBUSY.
* Before MOVE_MOUNT_BENEATH (6.5): a mount made on top of the old one hides it, but a covered mount cannot be unmounted, since
  umount2 always takes what is on top. It can by propagation: in a copy of the namespace whose parent mount is a peer, take away
  the copy of the new mount, then that of the old one; propagate_umount removes the original, and hangs what covered it in its
  place (4.11). It leaves alone a mount that has other mounts on it.
* Of a detached tree only the root can be changed. So a tree of mounts is put together in a copy of the namespace, which ends
  with the errand; a clone of the tree outlives it.
* `.` is not led to what is mounted on it, except by umount2.
* An O_PATH descriptor makes a mount busy. One is held here for as long as the swap takes, about 0.1 ms.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence

import msgspec

from watchd.errors import MountError, RefusedError
from watchd.kernel.files import CONFINED, RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2
from watchd.kernel.libc import AT_FDCWD
from watchd.kernel.mounts import (
    AT_RECURSIVE,
    MNT_DETACH,
    MNT_EXPIRE,
    MOUNT_ATTR_ALL,
    MOVE_MOUNT_BENEATH,
    MS_PRIVATE,
    MS_SHARED,
    MS_SLAVE,
    MS_UNBINDABLE,
    mount_setattr,
    move_mount,
    open_tree_clone,
    umount2,
)
from watchd.kernel.namespaces import CLONE_NEWNS, unshare
from watchd.kernel.statx import shown_mount_id
from watchd.overlay.capture import Mount, Place, Propagation, attribute_flags

_PLAIN = RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS


class Kept(msgspec.Struct, frozen=True):
    """What is kept of an old mount while it is replaced: owned descriptors of detached clones."""

    previous: int | None
    """The old mount, with its submounts; None if it is unbindable."""
    children: tuple[int, ...]
    """Each mount that is mounted on it, with its own submounts, in the order of `Place.children`."""

    def close(self) -> None:
        """Let go of all."""
        for descriptor in (self.previous, *self.children):
            if descriptor is not None:
                os.close(descriptor)


def keep(place: Place) -> Kept:
    """Clones of the mount and of what is mounted on it. Raises RefusedError where it could not be replaced, OSError."""
    with _opened(place.mount) as old:
        try:
            umount2(place.mount.path, MNT_EXPIRE)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise RefusedError("the mount is locked to the namespace that it was copied from") from None
            if error.errno != errno.EBUSY:
                raise
        with contextlib.ExitStack() as undo:
            children = []
            for child in place.children:
                children.append(_clone_child(old, place.mount, child))
                undo.callback(os.close, children[-1])
            previous = None if place.mount.propagation.unbindable else _clone_all(old, place)
            undo.pop_all()
    return Kept(previous, tuple(children))


def assemble(base: int, places: Sequence[Place], children: Sequence[Sequence[int]]) -> list[int]:
    """For each place a detached tree of mounts: the same directory of `base`, with the attributes and the propagation of
    the old mount, and its children. Owned descriptors of the roots. Raises RefusedError, OSError.
    """
    _enter_workshop()
    move_mount(base, AT_FDCWD, b"/")
    trees: list[int] = []
    with contextlib.ExitStack() as used, contextlib.ExitStack() as undo:
        peers: dict[tuple[int, bytes], int] = {}
        for place, clones in zip(places, children, strict=True):
            replica = _replica(base, place.mount, peers)
            used.callback(os.close, replica)
            move_mount(replica, AT_FDCWD, b"/")
            for child, clone in zip(place.children, clones, strict=True):
                _attach(clone, replica, _relative(place.mount, child))
            _leave_peers(place, replica, place.submounts)
            trees.append(open_tree_clone(replica, flags=AT_RECURSIVE))
            undo.callback(os.close, trees[-1])
        undo.pop_all()
    return trees


def swap(place: Place, tree: int) -> None:
    """Put a detached tree where the mount is, and detach that. Raises MountError if it is not there any more, OSError."""
    with _opened(place.mount) as old:
        move_mount(tree, old, flags=MOVE_MOUNT_BENEATH)
        _uncover(place, old, tree)
    _restore_all(place, tree)


def swap_without_beneath(place: Place, tree: int) -> None:
    """`swap` for kernels without MOVE_MOUNT_BENEATH, to be followed by `restore_parent`. Raises the same.

    Where the old mount cannot be removed it stays below the new one.
    """
    mount, parent = place.mount, place.parent
    with _opened(mount) as old:
        if not place.spreads:  # what covers it shall not spread to its peers, which keep their place
            mount_setattr(old, propagation=MS_PRIVATE, flags=AT_RECURSIVE)
        move_mount(tree, old)
        if parent is not None and (mount.propagation.shared or not place.spreads):
            with contextlib.suppress(OSError):
                _remove_covered(place, parent, old)


def restore_parent(place: Place, tree: int) -> None:
    """The propagation that the parent and the new mount are to have after `swap_without_beneath`. Raises OSError."""
    if place.parent is not None and not place.spreads:
        with _opened(place.parent) as parent:
            _restore_propagation(parent, place.parent.propagation)
    _restore_all(place, tree)


def remove(mount: Mount) -> None:
    """Detach a mount. Raises MountError if its path shows another one, OSError."""
    with _opened(mount) as descriptor:
        os.fchdir(descriptor)
        umount2(b".", MNT_DETACH)
        os.chdir("/")


def _remove_covered(place: Place, parent: Mount, old: int) -> None:
    os.fchdir(old)
    for child in place.children:
        umount2(b"./" + _relative(place.mount, child), MNT_DETACH)
    if not place.spreads:
        with _opened(parent) as above:
            mount_setattr(above, propagation=MS_SHARED)
    unshare(CLONE_NEWNS)  # the working directory is in the copy of the old mount from here on
    mount_setattr(AT_FDCWD, b".", propagation=MS_PRIVATE, flags=AT_RECURSIVE)
    umount2(place.mount.path, MNT_DETACH)  # the copy of the new one
    umount2(place.mount.path, MNT_DETACH)  # that of the old one, and by propagation the old one


@contextlib.contextmanager
def _opened(mount: Mount) -> Iterator[int]:
    shown = os.fsdecode(mount.path)
    try:
        descriptor = openat2(AT_FDCWD, mount.path, flags=os.O_PATH, resolve=_PLAIN)
    except OSError as error:
        raise MountError(f"{shown}: {os.strerror(error.errno or 0)}") from error
    try:
        if shown_mount_id(descriptor) != mount.mount_id:
            raise MountError(f"{shown} shows another mount")
        yield descriptor
    finally:
        os.close(descriptor)


def _uncover(place: Place, old: int, tree: int) -> None:
    mount = place.mount
    on_top = shown_mount_id(AT_FDCWD, mount.path)
    if on_top == mount.mount_id:
        if not place.spreads:
            mount_setattr(old, propagation=MS_PRIVATE, flags=AT_RECURSIVE)
        os.fchdir(old)
        umount2(b".", MNT_DETACH)
        os.chdir("/")
    elif on_top == shown_mount_id(tree):
        # Somebody unmounted the old one just now. He wants none there.
        umount2(mount.path, MNT_DETACH)
        raise MountError("it was unmounted meanwhile")
    else:
        raise MountError("something was mounted over it meanwhile")


def _relative(mount: Mount, child: Mount) -> bytes:
    return child.path[len(mount.path.rstrip(b"/")) + 1 :]


def _clone_child(old: int, mount: Mount, child: Mount) -> int:
    with _below(old, _relative(mount, child)) as descriptor:
        if shown_mount_id(descriptor) != child.mount_id:
            raise RefusedError(f"{os.fsdecode(child.path)} is covered by another mount")
        return open_tree_clone(descriptor, flags=AT_RECURSIVE)


def _replica(base: int, mount: Mount, peers: dict[tuple[int, bytes], int]) -> int:
    """A clone of `base`, or of a replica made before that is to be its peer or master."""
    group = mount.propagation
    source = peers.get((group.shared, mount.root), peers.get((group.master, mount.root)))
    replica = open_tree_clone(source) if source is not None else _clone_directory(base, mount.root.strip(b"/"))
    mount_setattr(replica, attr_set=attribute_flags(mount.attributes), attr_clr=MOUNT_ATTR_ALL)
    is_peer = (group.shared, mount.root) in peers
    if group.master and not is_peer:
        mount_setattr(replica, propagation=MS_SLAVE)
    if group.shared and not is_peer:
        mount_setattr(replica, propagation=MS_SHARED)
        peers[group.shared, mount.root] = replica
    return replica


def _clone_directory(base: int, path: bytes) -> int:
    if not path:
        return open_tree_clone(base)
    try:
        descriptor = openat2(base, path, flags=os.O_PATH)
    except OSError as error:
        raise RefusedError(f"the new mount has no {os.fsdecode(path)}, which is mounted by itself") from error
    try:
        return open_tree_clone(descriptor)
    finally:
        os.close(descriptor)


def _attach(clone: int, replica: int, path: bytes) -> None:
    try:
        descriptor = openat2(replica, path, flags=os.O_PATH, resolve=CONFINED)
        try:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode) != stat.S_ISDIR(os.fstat(clone).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            move_mount(clone, descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        shown = os.fsdecode(path)
        raise RefusedError(f"the new mount has no place for {shown}, which is mounted below it") from error


def _enter_workshop() -> None:
    """A copy of the namespace in which nothing that is mounted is seen elsewhere; it ends with the errand."""
    unshare(CLONE_NEWNS)
    mount_setattr(AT_FDCWD, b"/", propagation=MS_PRIVATE, flags=AT_RECURSIVE)


def _clone_all(old: int, place: Place) -> int:
    """A clone of the mount with its submounts, which outlives their umount."""
    clone = open_tree_clone(old, flags=AT_RECURSIVE)
    if not place.spreads:
        return clone
    try:
        _enter_workshop()
        move_mount(clone, AT_FDCWD, b"/")
        _leave_peers(place, clone, (place.mount, *place.submounts))
        return open_tree_clone(clone, flags=AT_RECURSIVE)
    finally:
        os.close(clone)


def _leave_peers(place: Place, tree: int, mounts: Sequence[Mount]) -> None:
    """Where the umount of the original has to spread, clones must not be peers of it. The tree is attached."""
    for mount in mounts if place.spreads else ():
        if mount.propagation.shared:
            with _below(tree, _relative(place.mount, mount)) as descriptor:
                mount_setattr(descriptor, propagation=MS_PRIVATE)


def _restore_all(place: Place, tree: int) -> None:
    """The propagation of a new tree; below a shared mount the kernel made all of it shared."""
    for mount in (place.mount, *(place.submounts if place.spreads else ())):
        with _below(tree, _relative(place.mount, mount)) as descriptor:
            _restore_propagation(descriptor, mount.propagation)


def _restore_propagation(mount: int, wanted: Propagation) -> None:
    """Take away the sharing that was added for the swap, or by the kernel because the parent is shared."""
    if wanted.unbindable:
        mount_setattr(mount, propagation=MS_UNBINDABLE)
    elif not wanted.shared:
        mount_setattr(mount, propagation=MS_SLAVE if wanted.master else MS_PRIVATE)


@contextlib.contextmanager
def _below(tree: int, path: bytes) -> Iterator[int]:
    """What is mounted at `path` of a tree, b"" for its root."""
    if not path:
        yield tree
        return
    descriptor = openat2(tree, path, flags=os.O_PATH, resolve=_PLAIN | RESOLVE_BENEATH)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
