"""Build an overlay anew and put it in the place of the old one.

This heals what no invalidation can: a layer whose root directory was replaced (an image swapped, a tree recreated), and
everything that is pinned. The layers are what their paths lead to now.

What it means for those who use the mount
* Every lookup sees the old mount or the new one, never none. Files that are open, mapped programs and working directories stay
  in the old one, which lives on detached until the last of them is closed: they see what they saw. A relative path from
  a working directory in there still leads into the old one. rename(2) and link(2) of two paths may find one of them in the
  old mount and the other one in the new: EXDEV, as between any two mounts.
* A copy-up under way finishes in the old one, with a work directory of its own (see `watchd.overlay.build`), and lands in the
  upper directory, where the new one finds it. The kernel logs that the upper directory is in use; with `index=on` it refuses.
* inotify and fanotify marks stay on the old mount's objects and hear no more of what happens through the new one. Locks and
  leases taken through the old one are not seen through the new one.
* An overlay whose lower lies in this one keeps the old one, and then needs to be replaced itself.
* An overlay cannot be frozen (FIFREEZE: EOPNOTSUPP), so there is no frozen state to lose.

Refused, because it would harm or cannot be: a mount that is the root directory of a process or of a namespace; one that is
locked or covered; `volatile`, which must not be mounted twice; `index=on`; a layer that is not there; a mount point in a
namespace that cannot be entered. What can be foreseen is refused before anything is done, the rest is taken back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec

from watchd.coherence.harm import refuse_what_harms
from watchd.coherence.target import Target
from watchd.coherence.targets import build_target, cache_tells, layers_of
from watchd.errors import DeadlineError, MountError, RefusedError, WatchdError
from watchd.kernel.capabilities import missing_capabilities
from watchd.kernel.filesystems import OVERLAYFS_SUPER_MAGIC
from watchd.kernel.mounts import has_move_mount_beneath
from watchd.kernel.namespaces import Courier, mount_namespace, owning_user_namespace
from watchd.kernel.statx import shown_mount_id
from watchd.overlay.access import in_view, reason_of
from watchd.overlay.build import MOUNTER_CAPABILITIES, Made, Recipe, clear_workdir, make, recipe, step_back
from watchd.overlay.capture import Capture, Place, capture, read_mounts
from watchd.overlay.delegate import make_in_user_namespace
from watchd.overlay.discovery import find_namespaces, read_overlays
from watchd.overlay.layers import look_up, resolve
from watchd.overlay.model import LayerDirectory, Overlay, ResolvedStack, View, device_name
from watchd.overlay.swap import Kept, assemble, keep, remove, restore_parent, swap, swap_without_beneath
from watchd.overlay.trust import is_exposed

T = TypeVar("T")


def replace(target: Target, courier: Courier) -> Target:
    """A new mount of the same layers and options in the place of the target's, wherever that is mounted.

    Returns the target for the new one. Raises RefusedError with the reason if it was left as it was, MountError if it is not
    mounted any more or could not be put back. Waits for the layers' filesystems.
    """
    mounts = read_mounts()
    captured = capture(target.device, mounts)
    if captured is None:
        raise MountError(f"the overlay {target.device} is not mounted any more")
    refuse_what_harms(captured, mounts)
    stack = _layers_now(target, captured, courier)
    view = layers_of(stack)[0].view
    what = recipe(captured, stack, exposed=_is_exposed(stack, view, courier))
    with contextlib.ExitStack() as kept:
        places = _reachable(captured, courier, kept)
        made = _make(what, view, courier)
        try:
            device = device_name(os.fstat(made.mount).st_dev)
            _put_in_place(places, made, courier)
        except BaseException:
            os.close(made.mount)
            _quietly(courier, view, lambda: step_back(what, made.aside))
            raise
        os.close(made.mount)
    _quietly(courier, view, lambda: clear_workdir(what))
    _remove_strays(device, captured, courier)
    return _target_of(device, target, courier)


def clear_up(target: Target, courier: Courier) -> None:
    """Take away what overlays that are gone left in the target's work directory. Raises nothing.

    `replace` does so itself, in vain where its caller holds the old mount; so that one does it again when he let go.
    """
    overlay, upper = target.overlay, target.stack.upper if target.stack else None
    if overlay and overlay.workdir and upper and target.stack:
        with contextlib.suppress(WatchdError):
            exposed = _is_exposed(target.stack, upper.view, courier)
            what = Recipe((), overlay.workdir, exposed=exposed)
            _errand(courier, upper.view, lambda: clear_workdir(what))


def _layers_now(target: Target, captured: Capture, courier: Courier) -> ResolvedStack:
    """The layers as their paths lead to them now. Raises RefusedError if one leads nowhere or nobody knows whence they lead."""
    assert target.overlay is not None
    stack = target.stack or resolve(target.overlay, courier)
    if all(layer.error for layer in layers_of(stack)):
        stack = _in_only_view(stack, captured)

    def look_again(layer: LayerDirectory) -> LayerDirectory:
        return _errand(courier, layer.view, lambda: look_up(layer.path, view=layer.view))

    now = msgspec.structs.replace(
        stack,
        upper=look_again(stack.upper) if stack.upper else None,
        lowers=tuple(map(look_again, stack.lowers)),
        data_only=tuple(map(look_again, stack.data_only)),
    )
    for layer in (*layers_of(now), *now.data_only):
        if layer.error:
            raise RefusedError(f"{os.fsdecode(layer.path)}: {layer.error.removeprefix('unknown: ')}")
    return now


def _in_only_view(stack: ResolvedStack, captured: Capture) -> ResolvedStack:
    """The layers in the namespace that has all mounts of the overlay; who mounted it was there."""
    views = {place.view for place in captured.places}
    if len(views) > 1:
        raise RefusedError(
            "its first layer was replaced, and it is not known in which namespace the paths of its layers hold"
        )
    (view,) = views

    def there(layers: Iterable[LayerDirectory]) -> tuple[LayerDirectory, ...]:
        return tuple(msgspec.structs.replace(layer, view=view) for layer in layers)

    return msgspec.structs.replace(
        stack,
        upper=next(iter(there([stack.upper] if stack.upper else [])), None),
        lowers=there(stack.lowers),
        data_only=there(stack.data_only),
    )


def _reachable(captured: Capture, courier: Courier, kept: contextlib.ExitStack) -> list[tuple[Place, Kept]]:
    """The places in which we can put a mount ourselves; the others follow one of them by propagation, or it is refused."""
    places: list[tuple[Place, Kept]] = []
    refusals: list[tuple[Place, MountError]] = []
    # Those first that take others with them.
    for place in sorted(captured.places, key=lambda place: (not place.spreads, place.mount.propagation.master != 0)):
        try:
            held = _errand(courier, place.view, functools.partial(keep, place), discard=Kept.close)
        except MountError as reason:
            refusals.append((place, reason))
            continue
        kept.callback(held.close)
        places.append((place, held))
    for place, error in refusals:
        if not any(place.follows(leader) for leader, _ in places):
            raise RefusedError(
                f"{os.fsdecode(place.mount.path)} of process {place.view.pid} cannot be replaced: {error}"
            )
    if len(captured.places) > 1 and any(held.previous is None for _, held in places):
        raise RefusedError("one of several mounts of it is unbindable, and could not be taken back")
    return places


def _is_exposed(stack: ResolvedStack, view: View, courier: Courier) -> bool:
    """In a user namespace of its own everything is its root's, and nothing there leads out of it."""
    paths = [layer.path for layer in (*layers_of(stack), *stack.data_only)]
    return _is_ours(view) and _errand(courier, view, lambda: any(map(is_exposed, paths)))


def _make(what: Recipe, view: View, courier: Courier) -> Made:
    """The new overlay, owned by the user namespace that the old one was made in."""
    if _is_ours(view):
        missing = missing_capabilities(MOUNTER_CAPABILITIES) if what.workdir else []
        if missing:
            remedy = "add them to CapabilityBoundingSet= of its unit"
            raise RefusedError(
                f"without {', '.join(missing)} watchd would make an overlay that copies up less", remedy=remedy
            )
        return _errand(courier, view, lambda: make(what), discard=lambda made: os.close(made.mount))
    try:
        return make_in_user_namespace(what, view)
    except DeadlineError as error:
        raise MountError(str(error)) from error


def _is_ours(view: View) -> bool:
    """Whether what is mounted there belongs to our own user namespace."""
    try:
        own = mount_namespace()
        return view.namespace == own or owning_user_namespace(view.pid) == owning_user_namespace(os.getpid())
    except OSError as error:
        raise RefusedError(f"the user namespace of process {view.pid} cannot be told: {reason_of(error)}") from error


def _put_in_place(places: list[tuple[Place, Kept]], made: Made, courier: Courier) -> None:
    """All or none."""
    own = View(os.getpid(), mount_namespace())
    todo = [place for place, _ in places]
    children = [held.children for _, held in places]
    trees = _errand(courier, own, lambda: assemble(made.mount, todo, children), discard=_close_all)
    done: list[tuple[Place, Kept, int]] = []
    try:
        for (place, held), tree in zip(places, trees, strict=True):
            if not _is_replaced(place, made.mount, courier):
                _put(place, tree, courier)
                done.append((place, held, shown_mount_id(tree)))
    except BaseException:
        for place, held, new_id in reversed(done):
            _take_back(place, held, new_id, courier)
        raise
    finally:
        _close_all(trees)


def _put(place: Place, tree: int, courier: Courier) -> None:
    shown = f"{os.fsdecode(place.mount.path)} of process {place.view.pid}"
    try:
        if has_move_mount_beneath():
            _errand(courier, place.view, lambda: swap(place, tree))
            return
        try:
            _errand(courier, place.view, lambda: swap_without_beneath(place, tree))
        finally:
            _errand(courier, place.view, lambda: restore_parent(place, tree))
    except RefusedError as error:
        raise RefusedError(f"{shown}: {error}") from error


def _take_back(place: Place, held: Kept, new_id: int, courier: Courier) -> None:
    assert held.previous is not None
    mount = msgspec.structs.replace(place.mount, mount_id=new_id)
    _put(msgspec.structs.replace(place, mount=mount), held.previous, courier)


def _is_replaced(place: Place, new: int, courier: Courier) -> bool:
    """By propagation, when another place was."""
    return _errand(courier, place.view, lambda: os.stat(place.mount.path).st_dev) == os.fstat(new).st_dev


def _remove_strays(device: str, captured: Capture, courier: Courier) -> None:
    """A new mount below a shared one appears in all its slaves, those too that had unmounted the old one."""
    known = {(place.view.namespace, place.mount.path) for place in captured.places}
    now = capture(device, read_mounts())
    for place in now.places if now else ():
        if (place.view.namespace, place.mount.path) not in known:
            _quietly(courier, place.view, functools.partial(remove, place.mount))


def _target_of(device: str, old: Target, courier: Courier) -> Target:
    assert old.overlay is not None
    known = {point.namespace for point in old.overlay.mount_points}
    found = next((one for one in read_overlays(find_namespaces("all")).overlays if one.device == device), None)
    if found is None:
        raise MountError(f"the new overlay {device} was unmounted at once")
    points = tuple(point for point in found.mount_points if point.namespace in known)
    overlay: Overlay = msgspec.structs.replace(found, mount_points=points or found.mount_points)
    stack = resolve(overlay, courier)
    return dataclasses.replace(
        build_target(overlay, stack, courier, telling_overlays=_telling(old, stack)),
        observe=old.observe,
        actions=old.actions,
        evict_limit_bytes=old.evict_limit_bytes,
        budget=old.budget,
    )


def _telling(old: Target, stack: ResolvedStack) -> set[int]:
    """Layers that are overlays tell of their cache what they told before."""
    return {
        layer.device
        for root, layer in zip(old.layers, layers_of(stack), strict=False)
        if root.cache_tells and layer.magic == OVERLAYFS_SUPER_MAGIC and not cache_tells(layer)
    }


def _errand(
    courier: Courier, view: View, errand: Callable[[], T], *, discard: Callable[[T], object] | None = None
) -> T:
    """By courier even in our own namespace: an errand here changes its namespace and working directory."""
    try:
        if view.namespace == mount_namespace():
            return courier.run(os.getpid(), errand, discard=discard)
        return in_view(view, errand, courier=courier, discard=discard)
    except OSError as error:
        raise RefusedError(f"the kernel refuses it: {reason_of(error)}") from error
    except DeadlineError as error:
        raise MountError(str(error)) from error


def _quietly(courier: Courier, view: View, errand: Callable[[], object]) -> None:
    with contextlib.suppress(WatchdError):
        _errand(courier, view, errand)


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
