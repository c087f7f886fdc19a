"""From an overlay's layer strings to the directories they mean.

Facts
* A layer string holds in the view of whoever mounted the overlay. That is mostly a namespace that shows the mount, but for
  an overlay that was mounted for a container (podman `-v src:dst:O`) it is the host, which does not show it.
* name_to_handle_at(AT_HANDLE_FID) on the root of a mount of the overlay reveals uuid and file handle of its first layer (the
  upper if there is one) as held by the kernel (6.6). Overlays that were mounted inside a user namespace, and those over a layer
  that has no file handles to keep (another overlay, FUSE), answer nothing of use (ovl_can_decode_fh wants CAP_DAC_READ_SEARCH).
* stat of the root of any overlay shows owner, mode, size and times of the first layer's directory. ctime can be chosen by
  nobody, so two directories at the same path of two views hardly share it.
* The root directories of two filesystems often have equal handles, so the uuid is compared too where both sides have one
  (not: squashfs, `uuid=off`, kernels without FS_IOC_GETFSUUID).
* The first layer agreeing says whose view it is. It says nothing of other layers that were deleted, renamed or mounted over.

What this means for us: a view is used only if the first layer looked up in it agrees, by handle (proven) or else by status;
when none does, the layers are unknown. Views that show the mount come first, because a tenant could put a directory at a
path that fits in his view and in ours, with lowers that mean something else in ours.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import Callable

import msgspec

from watchd.errors import MountError, WatchdError
from watchd.kernel.files import FileHandle
from watchd.kernel.filesystems import filesystem_magic, filesystem_uuid
from watchd.kernel.namespaces import Courier, mount_namespace
from watchd.overlay.access import clone_mount, clone_path, handle_of, in_view, reason_of, revealed_handle
from watchd.overlay.model import LayerDirectory, Overlay, ResolvedStack, View
from watchd.wire.handles import OverlayHandle

_ATTEMPTS = 3
"""The first layer may change between the look at the merged root and the look at the layer; hardly thrice in a row."""


class _Truth(msgspec.Struct, frozen=True):
    """What the overlay's root tells of the first layer."""

    handle: OverlayHandle | None
    status: tuple[int, ...]


def resolve(overlay: Overlay, courier: Courier) -> ResolvedStack:
    """Look every layer of the overlay up in the view that its first layer fits. Raises nothing: see `error`, `proven`.

    Waits for the filesystems on the way, so it belongs into a thread.
    """
    reason = "in no view does the first layer's path lead to the directory that the overlay was mounted on"
    try:
        for _ in range(_ATTEMPTS):
            truth = _truth(overlay, courier)
            stack = _first_fitting(overlay, truth, courier)
            if stack is not None:
                return stack
            if truth.handle is not None:
                break
    except WatchdError as error:
        reason = str(error)
    return _stack(overlay, lambda path: LayerDirectory(path, _own_view(), error=f"unknown: {reason}"), proven=False)


def _truth(overlay: Overlay, courier: Courier) -> _Truth:
    failure: WatchdError = MountError(f"no mount shows all of the overlay {overlay.device}")
    for point in overlay.mount_points:
        if point.root != b"/":
            continue
        try:
            fd = clone_mount(point, courier, device=overlay.device)
        except WatchdError as error:
            failure = error
            continue
        try:
            return _Truth(revealed_handle(fd), _status(fd))
        except OSError as error:
            failure = MountError(f"{os.fsdecode(point.path)}: {reason_of(error)}")
        finally:
            os.close(fd)
    raise failure


def _status(fd: int) -> tuple[int, ...]:
    status = os.fstat(fd)
    return status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _own_view() -> View:
    return View(os.getpid(), mount_namespace())


def _views(overlay: Overlay) -> list[View]:
    own = _own_view()
    shows = {point.namespace: point.view for point in overlay.mount_points}
    others = [view for namespace, view in shows.items() if namespace != own.namespace]
    return [own, *others] if own.namespace in shows else [*others, own]


def _first_fitting(overlay: Overlay, truth: _Truth, courier: Courier) -> ResolvedStack | None:
    for view in _views(overlay):
        # A view whose process ended meanwhile is one that does not fit.
        with contextlib.suppress(WatchdError, OSError):
            stack = in_view(view, functools.partial(_stack_in, view, overlay, truth), courier=courier)
            if stack is not None:
                return stack
    return None


def _stack_in(view: View, overlay: Overlay, truth: _Truth) -> ResolvedStack | None:
    """The stack as the calling thread sees it, None if the first layer does not fit."""
    first = next(iter([*_upper(overlay), *overlay.lowerdir]), b"")
    for base in _bases(overlay) if truth.handle is not None else [b""]:
        if _fits(_absolute(first, base), truth):

            def find(path: bytes, base: bytes = base) -> LayerDirectory:
                return look_up(_absolute(path, base), view=view)

            return _stack(overlay, find, proven=truth.handle is not None)
    return None


def _bases(overlay: Overlay) -> list[bytes]:
    """Where relative layer paths may begin: nowhere if there are none, else in a directory above a mount point."""
    paths = [*_upper(overlay), *overlay.lowerdir, *overlay.data_only]
    if not paths or paths[0].startswith(b"/"):
        return [b""]
    bases: dict[bytes, None] = {}
    for point in overlay.mount_points:
        base = point.path
        while base.strip(b"/"):
            base = os.path.dirname(base)
            bases[base] = None
    return list(bases)


def _absolute(path: bytes, base: bytes) -> bytes:
    return os.path.join(base, path) if base else path


def _fits(path: bytes, truth: _Truth) -> bool:
    if not path.startswith(b"/"):
        return False
    try:
        fd = clone_path(path)
    except OSError:
        return False
    try:
        if truth.handle is None:
            return _status(fd) == truth.status
        if handle_of(fd) != FileHandle(truth.handle.type, truth.handle.fid):
            return False
        uuids = {truth.handle.uuid, filesystem_uuid(fd)}
        return None in uuids or len(uuids) == 1
    finally:
        os.close(fd)


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
        return LayerDirectory(path, view, error="unknown: relative to a directory that only the mounter knew")
    try:
        fd = clone_path(path)
    except OSError as error:
        return LayerDirectory(path, view, error=f"unknown: {reason_of(error)}")
    try:
        status = os.fstat(fd)
        if not stat.S_ISDIR(status.st_mode):
            return LayerDirectory(path, view, error="unknown: not a directory any more")
        return LayerDirectory(path, view, status.st_dev, status.st_ino, handle_of(fd), filesystem_magic(fd))
    except OSError as error:
        return LayerDirectory(path, view, error=f"unknown: {reason_of(error)}")
    finally:
        os.close(fd)
