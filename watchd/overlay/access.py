"""Getting hold of merged mounts and layers, for moments, without making them busy.

Facts
* A descriptor (O_PATH too) or working directory on a mount makes its umount fail with EBUSY; a detached clone of it does not.
  open_tree(OPEN_TREE_CLONE) by path walks and clones in one system call, so there is no moment in which a thread of ours that
  was scheduled away holds the mount itself.
* A clone is without submounts, just like what overlayfs holds of its layers.
* Paths are walked with the root directory of the view, so no symlink leads out of it; and a magic link that does leads to
  a mount of another namespace, of which open_tree makes no clone. Whatever the walk finds is then held against the identity
  that is expected, so it does not matter who changed which link meanwhile.
* The device number alone identifies a mount of an overlay: where a mount point was unmounted and its path still has the
  number, it is the same directory of the same overlay seen through the mount around it.
* Without CAP_SYS_ADMIN in the user namespace that owns the mount namespace: EPERM. A directory below which mounts are locked
  (copied from a more privileged mount namespace) cannot be cloned: EINVAL.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import TypeVar

from watchd.errors import DeadlineError, LayerError, MountError, WireError
from watchd.kernel.files import AT_HANDLE_FID, FileHandle, name_to_handle_at
from watchd.kernel.libc import AT_EMPTY_PATH, AT_FDCWD
from watchd.kernel.mounts import open_tree_clone
from watchd.kernel.namespaces import Courier, mount_namespace
from watchd.kernel.statx import mount_id
from watchd.overlay.discovery import find_namespaces
from watchd.overlay.model import LayerDirectory, MountPoint, View, device_name
from watchd.wire.handles import OverlayHandle, parse_overlay_handle

T = TypeVar("T")


def in_view(
    view: View, errand: Callable[[], T], *, courier: Courier, discard: Callable[[T], object] | None = None
) -> T:
    """Run `errand` where the paths of `view` hold: here if that is our own namespace, else by courier (see there).

    The process by which a namespace was found may end long before the namespace does; then another one of it leads there.
    """
    if view.namespace == mount_namespace():
        return errand()
    try:
        return courier.run(view.pid, errand, namespace=view.namespace, discard=discard)
    except MountError:
        other = find_namespaces("all").pids.get(view.namespace)
        if other is None or other == view.pid:
            raise
        return courier.run(other, errand, namespace=view.namespace, discard=discard)


def clone_mount(point: MountPoint, courier: Courier, *, device: str) -> int:
    """A detached clone of an overlay's mount; an owned descriptor (O_PATH) on its root.

    Raises MountError if it cannot be had or the path no longer shows the overlay `device`.
    """
    try:
        fd = in_view(point.view, lambda: clone_path(point.path), courier=courier, discard=os.close)
    except OSError as error:
        raise MountError(f"{os.fsdecode(point.path)}: cannot get hold of the mount: {reason_of(error)}") from error
    except DeadlineError as error:
        raise MountError(f"{os.fsdecode(point.path)}: {error}") from error
    try:
        found = os.fstat(fd).st_dev
        if device_name(found) != device:
            raise MountError(f"{os.fsdecode(point.path)} shows something else than the overlay {device} now")
    except OSError as error:  # its server is gone, for instance
        os.close(fd)
        raise MountError(f"{os.fsdecode(point.path)}: {reason_of(error)}") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def clone_directory(layer: LayerDirectory, courier: Courier) -> int:
    """A detached clone of the mount that a layer is on, rooted at the layer; an owned descriptor (O_PATH).

    Raises LayerError if it cannot be had or the path no longer leads to that directory.
    """
    shown = os.fsdecode(layer.path)
    if layer.error:
        raise LayerError(f"{shown}: {layer.error}")
    try:
        fd = in_view(layer.view, lambda: clone_path(layer.path), courier=courier, discard=os.close)
    except OSError as error:
        raise LayerError(f"{shown}: cannot get hold of the layer: {reason_of(error)}") from error
    except (MountError, DeadlineError) as error:
        raise LayerError(f"{shown}: {error}") from error
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino, handle_of(fd)) != (layer.device, layer.inode, layer.handle):
            raise LayerError(f"{shown}: the path shows something else now")
    except OSError as error:
        os.close(fd)
        raise LayerError(f"{shown}: {reason_of(error)}") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def clone_mount_of(layer: LayerDirectory, courier: Courier) -> int:
    """Like `clone_directory`, but rooted at the root of the mount that the layer's directory lies in."""
    clone = clone_directory(layer, courier)
    try:
        other = in_view(layer.view, lambda: clone_path(_mount_root(layer.path)), courier=courier, discard=os.close)
    except (OSError, MountError, DeadlineError):
        return clone  # the root cannot be had (locked, mounted over meanwhile): the layer's own directory will do
    with contextlib.suppress(OSError):  # its server is gone
        if os.fstat(other).st_dev == layer.device:
            clone, other = other, clone
    os.close(other)
    return clone


def _mount_root(path: bytes) -> bytes:
    """Where `path` leads if `..` is taken for as long as it stays in the same mount. Nothing is held open meanwhile."""
    mount = mount_id(path)
    while mount_id(path + b"/..") == mount:
        above = path + b"/.."
        if os.stat(above).st_ino == os.stat(path).st_ino:
            break
        path = above
    return path


def clone_path(path: bytes) -> int:
    """A detached clone of what the calling thread sees at `path`. Raises OSError (EINVAL also: of another namespace)."""
    return open_tree_clone(AT_FDCWD, path)


def handle_of(fd: int) -> FileHandle | None:
    """The file handle of an open directory, if need be one that only identifies; None where there are none."""
    for flags in (AT_EMPTY_PATH, AT_EMPTY_PATH | AT_HANDLE_FID):
        try:
            return name_to_handle_at(fd, flags=flags)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.EOVERFLOW):
                raise
    return None


def revealed_handle(fd: int) -> OverlayHandle | None:
    """The handle of the real object that an object of an overlay stands for now; None where it is not told.

    It is for kernels since 6.6, and for overlays that were mounted outside of user namespaces.
    """
    try:
        handle = name_to_handle_at(fd, flags=AT_EMPTY_PATH | AT_HANDLE_FID)
        return parse_overlay_handle(handle.type, handle.fid)
    except (OSError, WireError):
        return None


def reason_of(error: OSError) -> str:
    """What the kernel said, without the name of the system call."""
    return os.strerror(error.errno or 0)
