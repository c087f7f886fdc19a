"""From an overlay's layer strings to the directories they mean.

Facts
* A layer string holds in the view of whoever mounted the overlay. That is mostly a namespace that shows the mount, but for
  an overlay that was mounted for a container (podman `-v src:dst:O`) it is the host, which does not show it.
* name_to_handle_at(AT_HANDLE_FID) on the root of a mount of the overlay reveals uuid and file handle of its first layer (the
  upper if there is one) as held by the kernel (6.6). Overlays over layers that have no file handles do not answer.
* The first layer agreeing says whose view it is. It says nothing of other layers that were deleted, renamed or mounted over.
* The root directories of two filesystems often have equal handles, so the uuid is compared too where both sides have one
  (not: squashfs, `uuid=off`, kernels without FS_IOC_GETFSUUID).

What this means for us: views are tried in the order "shows the mount, ours first", then ours; the one that fits is used,
and when none does the layers are unknown. A namespace that shows the mount goes first because a tenant could put a directory
of his own at a path that fits in his view and in ours, with lowers that mean something else in ours. Where the kernel
reveals nothing our own view is tried first and the result says that it is not proven.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable

from watchd.errors import WatchdError, WireError
from watchd.kernel.files import AT_HANDLE_FID, FileHandle, name_to_handle_at
from watchd.kernel.filesystems import filesystem_magic, filesystem_uuid
from watchd.kernel.libc import AT_EMPTY_PATH
from watchd.kernel.namespaces import Courier, mount_namespace
from watchd.overlay.access import clone_mount, clone_path, handle_of, in_view
from watchd.overlay.model import LayerDirectory, Overlay, ResolvedStack, View
from watchd.wire.handles import OverlayHandle, parse_overlay_handle


def resolve(overlay: Overlay, courier: Courier) -> ResolvedStack:
    """Look every layer of the overlay up in the view that its own file handle fits. Raises nothing: see `error`, `proven`.

    Waits for the filesystems on the way, so it belongs into a thread.
    """
    truth = _revealed(overlay, courier)
    reason = "in no view does the first layer's path lead to the directory that the overlay was mounted on"
    for view in _views(overlay, proving=truth is not None):
        try:
            stack = in_view(view, functools.partial(_stack_in, view, overlay, truth), courier=courier)
        except (WatchdError, OSError) as error:
            reason = str(error)
            continue
        if stack is not None:
            return stack
    return _stack(overlay, lambda path: LayerDirectory(path, _own_view(), error=f"unknown: {reason}"), proven=False)


def _revealed(overlay: Overlay, courier: Courier) -> OverlayHandle | None:
    """The first layer as the kernel holds it, from the first mount that lets us ask."""
    for point in overlay.mount_points:
        if point.root != b"/":
            continue
        try:
            fd = clone_mount(point, courier, device=overlay.device)
        except WatchdError:
            continue
        try:
            handle = name_to_handle_at(fd, flags=AT_EMPTY_PATH | AT_HANDLE_FID)
            return parse_overlay_handle(handle.type, handle.fid)
        except (OSError, WireError):
            return None
        finally:
            os.close(fd)
    return None


def _own_view() -> View:
    return View(os.getpid(), mount_namespace())


def _views(overlay: Overlay, *, proving: bool) -> list[View]:
    own = _own_view()
    shows = {point.namespace: point.view for point in overlay.mount_points}
    others = [view for namespace, view in shows.items() if namespace != own.namespace]
    return [*others, own] if proving and own.namespace not in shows else [own, *others]


def _stack_in(view: View, overlay: Overlay, truth: OverlayHandle | None) -> ResolvedStack | None:
    """The stack as the calling thread sees it, None if the first layer is not there."""
    first = next(iter([*_upper(overlay), *overlay.lowerdir]), b"")
    if not _fits(first, view, truth):
        return None
    return _stack(overlay, functools.partial(look_up, view=view), proven=truth is not None)


def _fits(path: bytes, view: View, truth: OverlayHandle | None) -> bool:
    layer = look_up(path, view=view)
    if layer.error or truth is None:
        return not layer.error
    if layer.handle != FileHandle(truth.type, truth.fid):
        return False
    uuid = _uuid(path)
    return None in (uuid, truth.uuid) or uuid == truth.uuid


def _upper(overlay: Overlay) -> list[bytes]:
    return [] if overlay.upperdir is None else [overlay.upperdir]


def _stack(overlay: Overlay, look_up: Callable[[bytes], LayerDirectory], *, proven: bool) -> ResolvedStack:
    return ResolvedStack(
        device=overlay.device,
        upper=next(map(look_up, _upper(overlay)), None),
        lowers=tuple(map(look_up, overlay.lowerdir)),
        data_only=tuple(map(look_up, overlay.data_only)),
        proven=proven,
    )


def look_up(path: bytes, *, view: View) -> LayerDirectory:
    """The directory at an absolute path as the calling thread sees it, which must be in `view`. Raises nothing."""
    if not path.startswith(b"/"):
        return LayerDirectory(
            path, view, error="unknown: the path is relative to a directory that only the mounter knew"
        )
    try:
        fd = clone_path(path)
    except OSError as error:
        return LayerDirectory(path, view, error=f"unknown: {error.strerror}")
    try:
        status = os.fstat(fd)
        if not stat.S_ISDIR(status.st_mode):
            return LayerDirectory(path, view, error="unknown: not a directory any more")
        return LayerDirectory(path, view, status.st_dev, status.st_ino, handle_of(fd), filesystem_magic(fd))
    except OSError as error:
        return LayerDirectory(path, view, error=f"unknown: {error.strerror}")
    finally:
        os.close(fd)


def _uuid(path: bytes) -> bytes | None:
    try:
        fd = clone_path(path)
    except OSError:
        return None
    try:
        return filesystem_uuid(fd)
    finally:
        os.close(fd)
