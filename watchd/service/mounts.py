"""The merged mounts that are kept: they come and go with what a survey finds.

A mount's layers are watched before the mount is handed to the engine, which invalidates it once; so nothing that changed
before or since can be missed.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from watchd.coherence.engine import Engine
from watchd.coherence.target import Outer, Target
from watchd.coherence.targets import build_target, cache_tells, layers_of, primary_point
from watchd.config.schema import Config
from watchd.config.schema import Layer as ConfiguredLayer
from watchd.errors import WatchdError
from watchd.kernel.filesystems import OVERLAYFS_SUPER_MAGIC
from watchd.kernel.namespaces import Courier, mount_namespace
from watchd.metrics import Metrics
from watchd.overlay.access import clone_directory, clone_mount_of
from watchd.overlay.discovery import Discovery, Namespaces, find_namespaces, matches, read_overlays
from watchd.overlay.layers import look_up
from watchd.overlay.model import LayerDirectory, MountPoint, Overlay, ResolvedStack, View, device_name, device_number
from watchd.overlay.mountids import MountIds, read_mount_ids
from watchd.overlay.mountwatch import MountWatch
from watchd.overlay.servers import Served, lies_on, served_mounts, servers_of, servers_on
from watchd.service.layer import STUCK_S, Key, Layer, key_of
from watchd.service.layers import LayerBook
from watchd.service.names import NameBook
from watchd.service.patience import Patience, Waiting, in_thread
from watchd.service.survey import Sighting, Survey, survey
from watchd.sources.base import WatchedLayer

log = logging.getLogger(__name__)

NESTING_MAX = 8
"""The kernel allows overlays in overlays two deep (FILESYSTEM_MAX_STACK_DEPTH); this is only a bound."""


_NOTHING_KNOWN = ResolvedStack("", None, (), (), proven=False)


@dataclass(eq=False)
class Mount:
    """A merged mount that is kept. Owned by the event loop."""

    overlay: Overlay
    mount_ids: frozenset[int]
    stack: ResolvedStack
    layers: list[Layer]
    unknown: tuple[LayerDirectory, ...]
    """Layers that could not be found, with the reason in `error`."""
    around: tuple[MountPoint, ...] = ()
    """Where it shows in overlays around it: their mounts; `root` is the directory of this one that each shows."""
    unseen: Waiting | None = None
    """Since when it is waited for what the mount is; without layers it is not kept before that is known."""
    unchecked: tuple[LayerDirectory, Waiting] | None = None
    """A layer that did not answer when its path was looked at last."""

    def waiting(self, *, longer_than_s: float = STUCK_S) -> str:
        """What gives no answer and for how long, in words for people; "" if nothing is waited for."""
        if self.unseen is not None:
            return f"waiting for {servers_of(self.overlay) or 'its layers'} {self.unseen}"
        for layer in self.layers:
            if reason := layer_waiting(layer, longer_than_s=longer_than_s):
                return f"layer {layer.name}: {reason}"
        if self.unchecked is not None:
            directory, waiting = self.unchecked
            return f"waiting for {_servers(directory) or os.fsdecode(directory.path)} {waiting}"
        return ""


def layer_waiting(layer: Layer, *, longer_than_s: float = STUCK_S) -> str:
    """The same for a layer."""
    waiting = layer.waiting(longer_than_s=longer_than_s)
    if waiting is None:
        return ""
    servers = _servers(layer.directory)
    if not servers and layer.watching is None and longer_than_s:
        return ""  # nobody to wait for: there is much to do
    return f"waiting for {servers or os.fsdecode(layer.directory.path)} {waiting}"


def _servers(directory: LayerDirectory) -> str:
    return servers_on(directory.path, directory.view.pid)


class MountBook:
    """All merged mounts that are kept, and the layers that they need."""

    def __init__(
        self,
        config: Config,
        *,
        layers: LayerBook,
        engine: Engine,
        metrics: Metrics,
        names: NameBook,
        on_answer: Callable[[], None],
    ) -> None:
        """`on_answer` is called when something that gave no answer has given it: a refresh brings it into the books."""
        self.config = config
        self.mounts: dict[str, Mount] = {}
        self.problems: tuple[str, ...] = ()
        self.courier = Courier(timeout_s=None)  # everybody here waits with patience
        self._layers, self._engine, self._metrics, self._names = layers, engine, metrics, names
        self._watch = MountWatch.open()
        self._looking = Patience("survey", on_late=self._answered)
        self._checking = Patience("check", on_late=self._answered)
        self._on_answer = on_answer
        self._lock = asyncio.Lock()
        self._namespaces = Namespaces({})
        self._mount_ids: MountIds = {}
        self._served: dict[int, tuple[Served, ...]] = {}
        self._loop = asyncio.get_running_loop()
        self.next_answer: asyncio.Future[None] = self._loop.create_future()
        """Done when something that gave no answer has given it; then there is another one."""

    def _answered(self) -> None:
        self.next_answer.set_result(None)
        self.next_answer = self._loop.create_future()
        self._on_answer()

    def fileno(self) -> int:
        """Readable when mounts came or went."""
        return self._watch.fileno()

    def drain(self) -> None:
        """Take off what made `fileno` readable."""
        self._watch.drain()

    async def refresh(self, *, retry_after_s: float = 0.0) -> None:
        """Look at the host and bring the books in line with it; what could not be watched is tried again if its time comes
        within `retry_after_s`."""
        async with self._lock:
            problems = await self._watch_configured()
            overlays = await in_thread(self._read_overlays, name="survey")
            known, ids = self._known(), self._mount_ids
            found = await survey(overlays, self.config.discovery, known, ids, self.courier, self._looking)
            self._tell_problems((*problems, *found.problems))
            await self._apply(found)
            await self._layers.retry(after_s=retry_after_s)

    async def namespaces_changed(self) -> bool:
        """Whether there are other mount namespaces than at the last refresh; cheap."""
        scope = self.config.discovery.namespaces
        found = await in_thread(partial(find_namespaces, scope), name="survey")
        return found.pids != self._namespaces.pids

    def troubled(self) -> bool:
        """Whether something is worth another refresh although no mount event came."""
        return any(layer.state == "failed" for layer in self._layers.layers.values()) or any(
            mount.unseen or ((state := self._engine.state(device)) is not None and state.error)
            for device, mount in self.mounts.items()
        )

    def select(self, patterns: Iterable[str]) -> tuple[list[Mount], list[str]]:
        """The mounts that any pattern matches (all, if there are none) and the patterns that match nothing."""
        patterns = list(patterns)
        if not patterns:
            return list(self.mounts.values()), []
        hits = {pattern: [m for m in self.mounts.values() if matches(m.overlay, pattern)] for pattern in patterns}
        chosen = {mount.overlay.device: mount for found in hits.values() for mount in found}
        return list(chosen.values()), [pattern for pattern, found in hits.items() if not found]

    async def check_layers(self, mounts: Sequence[Mount]) -> None:
        """See whether the layers of these mounts are still what their paths lead to; an overlay goes on with the old ones."""
        known = {layer for mount in mounts for layer in _with_data(mount.stack) if not layer.error}
        found = await self._checking.ask({layer: partial(self._why_displaced, layer) for layer in known})
        for mount in mounts:
            answers = [(layer, found[layer]) for layer in _with_data(mount.stack) if layer in found]
            mount.unchecked = next(((layer, a) for layer, a in answers if isinstance(a, Waiting)), None)
            reason = next((answer for _, answer in answers if isinstance(answer, str) and answer), "")
            if mount.unchecked is not None and not reason:
                continue
            if self._engine.displace(mount.overlay.device, reason) and reason:
                log.warning("%s: %s", mount.overlay.device, reason)

    def _why_displaced(self, layer: LayerDirectory) -> str:
        try:
            os.close(clone_directory(layer, self.courier))
        except (WatchdError, OSError) as error:
            return str(error)
        return ""

    async def reconfigure(self, config: Config) -> None:
        """Use this configuration from now on."""
        async with self._lock:
            self.config = config
            await self._layers.rewatch(config.sources)
            for mount in self.mounts.values():
                if mount.stack is not _NOTHING_KNOWN:
                    self._engine.retarget(self._target(mount))
        await self.refresh()

    async def close(self) -> None:
        """Give up what is held."""
        async with self._lock:
            self._watch.close()
            self.courier.close()

    def _read_overlays(self) -> Discovery:
        namespaces = find_namespaces(self.config.discovery.namespaces)
        self._watch.watch(namespaces.pids)
        self._namespaces = namespaces
        self._mount_ids = read_mount_ids(namespaces.pids)
        self._served = {namespace: served_mounts(pid) for namespace, pid in namespaces.pids.items()}
        return read_overlays(namespaces)

    def _known(self) -> dict[str, frozenset[int]]:
        """Mounts in good order; the layers of the others are looked up again."""
        return {
            device: mount.mount_ids
            for device, mount in self.mounts.items()
            if not mount.unknown
            and all(layer.state != "failed" for layer in mount.layers)
            and (state := self._engine.state(device)) is not None
            and not state.error
        }

    def _tell_problems(self, problems: tuple[str, ...]) -> None:
        for problem in problems:
            if problem not in self.problems:
                log.warning("%s", problem)
        self.problems = problems

    async def _apply(self, found: Survey) -> None:
        for device, mount in list(self.mounts.items()):
            sighting = found.sightings.get(device)
            if sighting is None or not (_same(mount, sighting) or mount.stack is _NOTHING_KNOWN):
                self._remove(device)
        new = []
        for device, sighting in found.sightings.items():
            if device in self.mounts and _same(self.mounts[device], sighting):
                self._update(self.mounts[device], sighting)
            else:
                new.append(sighting)
        stacks = [sighting.stack for sighting in new if sighting.stack]
        watched = [directory for stack in stacks for directory in _found((*stack.lowers, *stack.data_only))]
        await asyncio.gather(*map(self._layer, {key_of(directory): directory for directory in watched}.values()))
        for sighting in new:
            self._add(sighting)
        await self._nest()
        self._drop_unused()

    def _add(self, sighting: Sighting) -> None:
        overlay, stack = sighting.overlay, sighting.stack
        if stack is None:
            if sighting.waiting is not None:
                self._wait_for(overlay, sighting.waiting)
            return
        layers = [self._layers.layers[key_of(directory)] for directory in _found(stack.lowers)]
        data_only = [self._layers.layers[key_of(directory)] for directory in _found(stack.data_only)]
        unknown = tuple(directory for directory in (*stack.lowers, *stack.data_only) if directory.error)
        mount = Mount(overlay, sighting.mount_ids, stack, [*layers, *data_only], unknown)
        self.mounts[overlay.device] = mount
        for layer in layers:
            layer.devices.add(overlay.device)
        for layer in data_only:
            layer.data_of.add(overlay.device)
        self._layers.reroute()
        self._engine.add(self._target(mount))
        log.info("keeping %s (%s) true", os.fsdecode(primary_point(overlay).path), overlay.device)
        for directory in unknown:
            log.warning("layer %s of %s: %s", os.fsdecode(directory.path), overlay.device, directory.error)

    def _wait_for(self, overlay: Overlay, waiting: Waiting) -> None:
        """Show a mount that cannot be kept before it is known what it is."""
        self.mounts[overlay.device] = mount = Mount(overlay, frozenset(), _NOTHING_KNOWN, [], (), unseen=waiting)
        log.warning("%s (%s): %s", os.fsdecode(primary_point(overlay).path), overlay.device, mount.waiting())

    def _remove(self, device: str) -> None:
        mount = self.mounts.pop(device)
        self._engine.remove(device)
        self._metrics.forget_mount(device)
        for layer in mount.layers:
            layer.devices.discard(device)
            layer.data_of.discard(device)
        self._layers.reroute()
        if mount.layers or mount.unknown:
            log.info("%s (%s) is gone", os.fsdecode(primary_point(mount.overlay).path), device)

    def _update(self, mount: Mount, sighting: Sighting) -> None:
        mount.unseen = sighting.waiting
        if mount.overlay == sighting.overlay and mount.mount_ids == sighting.mount_ids:
            return
        mount.overlay, mount.mount_ids = sighting.overlay, sighting.mount_ids or mount.mount_ids
        if mount.stack is _NOTHING_KNOWN:
            return
        self._engine.retarget(self._target(mount))

    async def _nest(self) -> None:
        """Find out which mounts have a lower inside another one."""
        outers: dict[str, tuple[Outer, ...]] = {}
        around: dict[str, tuple[MountPoint, ...]] = {}
        for device, mount in self.mounts.items():
            for layer in mount.layers:
                if layer.directory.magic != OVERLAYFS_SUPER_MAGIC:
                    continue
                inner = self.mounts.get(device_name(layer.directory.device))
                if inner is not None:
                    outer = Outer(device, _below(layer.directory, inner.overlay))
                    outers[inner.overlay.device] = (*outers.get(inner.overlay.device, ()), outer)
                    around[inner.overlay.device] = (
                        *around.get(inner.overlay.device, ()),
                        *_shown_around(mount.overlay, outer),
                    )
                    await self._watch_upper(inner)
                if layer.worker is None and inner is not None:
                    layer.become("live", "changes come through the layers of the overlay that it lies in")
        self._engine.nest(outers)
        for device, mount in self.mounts.items():
            if mount.around != around.get(device, ()):
                mount.around = around.get(device, ())
                self._engine.retarget(self._target(mount))

    async def _watch_upper(self, mount: Mount) -> None:
        """What is done through a mount lands in its upper; to those around it that is a change of a lower like any other."""
        upper = mount.stack.upper
        if upper is None or upper.error or any(layer.directory == upper for layer in mount.layers):
            return
        layer = await self._layer(upper)
        layer.devices.add(mount.overlay.device)
        mount.layers.append(layer)
        self._layers.reroute()

    def innermost_first(self, mounts: Iterable[Mount]) -> list[list[Mount]]:
        """The mounts and those that they lie in, in levels: what is told of one level concerns those that follow."""
        levels: list[list[Mount]] = []
        level = {mount.overlay.device: mount for mount in mounts}
        while level and len(levels) <= NESTING_MAX:
            levels.insert(0, list(level.values()))
            devices = {device_name(layer.directory.device) for mount in level.values() for layer in mount.layers}
            level = {device: self.mounts[device] for device in devices if device in self.mounts}
        return levels

    async def _layer(self, directory: LayerDirectory, *, configured: ConfiguredLayer | None = None) -> Layer:
        layer = self._layers.layers.get(key_of(directory))
        if layer is not None:
            if layer.watching is not None:
                await self._layers.watch(layer)
            return layer
        configured = configured or self._configuration_of(directory)
        wanted = configured.name if configured and isinstance(configured.name, str) else None
        name = self._names.take(directory.path, directory.inode, configured=wanted)
        watched = WatchedLayer(
            name=name,
            path=directory.path,
            device=directory.device,
            root=directory.handle,
            open=partial(clone_directory, directory, self.courier),
            open_mount=partial(clone_mount_of, directory, self.courier),
        )
        return await self._layers.adopt(
            watched, directory, name=name, backend=configured.backend if configured else "auto"
        )

    def _configuration_of(self, directory: LayerDirectory) -> ConfiguredLayer | None:
        own = directory.view.namespace == mount_namespace()
        return next((one for one in self.config.layers if own and os.fsencode(one.path) == directory.path), None)

    async def _watch_configured(self) -> list[str]:
        """Layers of the configuration are watched whether or not something is mounted on them; returns the problems."""
        wanted, problems = set(), []
        view = View(os.getpid(), mount_namespace())
        paths = {os.fsencode(configured.path): configured for configured in self.config.layers}
        found = await self._checking.ask({path: partial(look_up, path, view=view) for path in paths})
        for path, configured in paths.items():
            directory = found[path]
            if isinstance(directory, Waiting):
                problems.append(f"layers: waiting for {servers_on(path, view.pid) or configured.path}")
                wanted |= {key for key, layer in self._layers.layers.items() if layer.directory.path == path}
                continue
            if directory.error:
                problems.append(f"layers: {configured.path}: {directory.error}; create it or take it out of `layers`")
                continue
            layer = await self._layer(directory, configured=configured)
            layer.configured = True
            wanted.add(key_of(directory))
        for key, layer in self._layers.layers.items():
            layer.configured = layer.configured and key in wanted
        return problems

    def _drop_unused(self) -> None:
        for layer in list(self._layers.layers.values()):
            if not layer.devices | layer.data_of and not layer.configured:
                self._layers.drop(layer)

    def _target(self, mount: Mount) -> Target:
        coherence = self.config.coherence_for(point.path for point in mount.overlay.mount_points)
        return build_target(
            mount.overlay,
            mount.stack,
            self.courier,
            observe=coherence.mode == "observe" or not coherence.actions,
            actions=coherence.actions,
            evict_limit_bytes=int(coherence.evict_limit),
            budget=float(coherence.budget),
            telling_overlays=self._telling_overlays(),
            on_server=any(
                lies_on(os.path.dirname(point.path), self._served.get(point.namespace, ()))
                for point in mount.overlay.mount_points
            ),
            around=mount.around,
        )

    def _telling_overlays(self) -> set[int]:
        telling: set[int] = set()
        for device, mount in self.mounts.items():  # an inner one is mounted, and so found, before those around it
            layers = layers_of(mount.stack)
            if layers and all(cache_tells(layer, telling) for layer in layers):
                telling.add(device_number(device))
        return telling


def _below(directory: LayerDirectory, inner: Overlay) -> bytes | None:
    """Where in an overlay's merged mount a directory lies, by its path; None if that does not tell."""
    for point in inner.mount_points:
        if point.root != b"/" or point.namespace != directory.view.namespace:
            continue
        if directory.path == point.path:
            return b""
        if directory.path.startswith(point.path.rstrip(b"/") + b"/"):
            return directory.path[len(point.path.rstrip(b"/")) + 1 :]
    return None


def _shown_around(overlay: Overlay, outer: Outer) -> Iterator[MountPoint]:
    """What the mounts of an overlay show of the one that a lower of it lies in."""
    if outer.below is not None:
        for point in overlay.mount_points:
            root = b"/".join(filter(None, (outer.below, point.root.strip(b"/"))))
            yield msgspec.structs.replace(point, root=b"/" + root)


def _same(mount: Mount, sighting: Sighting) -> bool:
    """Whether a sighting is of the mount that is known, layers included, and not of another one with its number."""
    known, now = mount.mount_ids, sighting.mount_ids
    if sighting.waiting is not None:
        return _layers_shown(mount.overlay) == _layers_shown(sighting.overlay)
    if sighting.stack is None:  # told by its mount ids
        return True
    if mount.stack is _NOTHING_KNOWN:  # it is shown until the mount is kept
        return False
    if known and now and not known & now:
        return False
    if known & now and not mount.unknown:
        return True  # whatever the paths of its layers lead to by now
    if not now and any(directory.error for directory in sighting.stack.lowers):
        # Something is mounted over it: what was known of it is better than nothing.
        return _shown(mount.overlay) == _shown(sighting.overlay)
    return _keys(mount.stack) == _keys(sighting.stack)


def _shown(overlay: Overlay) -> Overlay:
    return msgspec.structs.replace(overlay, mount_points=())


def _with_data(stack: ResolvedStack) -> list[LayerDirectory]:
    return [*layers_of(stack), *stack.data_only]


def _found(directories: Iterable[LayerDirectory]) -> list[LayerDirectory]:
    return [directory for directory in directories if not directory.error]


def _layers_shown(overlay: Overlay) -> tuple[object, ...]:
    return overlay.lowerdir, overlay.data_only, overlay.upperdir


def _keys(stack: ResolvedStack) -> list[Key]:
    return [
        key_of(directory) for directory in (*((stack.upper,) if stack.upper else ()), *stack.lowers, *stack.data_only)
    ]
