"""The daemon: puts the parts together, answers requests, and ends in good order.

This module, its siblings, the journal's writer and the client for asyncio are the only users of it. Nothing here touches a
watched filesystem: that happens in the workers of the sources, in the engine's threads and in the survey's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from watchd import __version__
from watchd.coherence.actions import Tools
from watchd.coherence.drop_caches import DropCaches
from watchd.coherence.engine import Engine
from watchd.coherence.handles import Handles
from watchd.coherence.ladder import Step
from watchd.coherence.round import Round
from watchd.coherence.view import Stale
from watchd.config import Config, Loaded, load
from watchd.config.tree import shown
from watchd.errors import DeadlineError, JournalError, UsageError, WatchdError
from watchd.journal.cursors import DIRECTORY, Cursors
from watchd.journal.indexer import Indexer
from watchd.journal.writer import Commit, Journal, JournalSettings
from watchd.kernel.libc import use_one_malloc_arena
from watchd.kernel.namespaces import Courier
from watchd.metrics import Metrics
from watchd.records import Action, Damage, Start, Stop
from watchd.service import logs, preflight
from watchd.service.consumers import Consumers
from watchd.service.control import ControlServer
from watchd.service.fdstore import FdStore
from watchd.service.hooks import HookBook, tell_missing_programs
from watchd.service.keeper import JournalKeeper
from watchd.service.knowledge import Knowledge
from watchd.service.layers import RETRY_S, LayerBook
from watchd.service.mounts import Mount, MountBook
from watchd.service.names import NameBook
from watchd.service.notify import close_unused, has_manager, inherited, notify, reloading, watchdog_interval_s
from watchd.service.patience import in_thread
from watchd.service.stalelog import StaleLog
from watchd.service.status import all_cursors, mounts_status, snapshot, state_of, status
from watchd.service.upkeep import Fold, Upkeep, limits_of

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0
"""New mount namespaces have no event; they are looked for this often."""

TROUBLE_INTERVAL_S = 5.0
"""What could not be watched is looked at again this often."""

REFRESH_PAUSE_S = 0.05
"""So that a storm of mounts costs one look in this time."""

SYNC_TIMEOUT_S = 30.0

SYNC_ROUNDS = 4
"""A mount that was replaced is looked at anew, and then those around it may have to be replaced."""

REASONS_SHOWN = 3

SYNC_PAUSES_S = (0.01, 0.03, 0.1)
"""What somebody just opened for a moment seems held: before `sync` says so it looks again after these, and just once where a
look takes longer than all of them, as at a directory with very many names."""

SWITCH_INTERVAL_S = 0.0001
"""How long a busy thread keeps the interpreter from another one that was woken; Python's default of 5 ms would be most of
the time that a repair takes."""


class Daemon:
    """One run of the service. Lives in the event loop's thread."""

    def __init__(self, loaded: Loaded, config_file: Path | None, inherited: dict[str, list[int]]) -> None:
        """Takes over the descriptors that were inherited, as far as it knows what they are."""
        self._inherited = inherited
        self._config, self._config_file = loaded.config, config_file
        self._metrics = Metrics()
        self._stop = asyncio.Event()
        self._look = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._rounds: deque[Round] = deque()
        """What the engine's threads have told and is not recorded yet."""
        self._rounds_told = False
        self._told = ""
        """How things are, as the service manager was told last."""
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. Raises WatchdError when it cannot start."""
        for number in (signal.SIGTERM, signal.SIGINT):  # from the beginning, so that no stop is in bad order
            self._loop.add_signal_handler(number, self._stop.set)
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack)
            self._loop.add_signal_handler(signal.SIGHUP, self._reload_soon)
            notify(READY=1, STATUS=self._summary(), MAINPID=os.getpid())
            await self._serve()
            notify(STOPPING=1)

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        config = self._config
        self._indexer = Indexer(config.state_directory, config.state_directory / "journal")
        self._journal = await Journal.open(
            config.state_directory / "journal", self._journal_settings(), on_commit=self._committed
        )
        stack.push_async_callback(in_thread, self._indexer.close, name="end")
        self._store = FdStore(
            self._inherited, epoch=self._journal.epoch, last_seq=self._journal.last_seq, is_there=has_manager()
        )
        stack.callback(self._store.close)  # after the last commit
        close_unused(self._inherited)
        stack.push_async_callback(self._close_journal)
        self._consumers = Consumers(self._journal, config.state_directory)
        self._cursors = Cursors(config.state_directory / DIRECTORY)
        self._knowledge = Knowledge(self._journal, config.state_directory)
        stack.push_async_callback(self._knowledge.close)
        await self._knowledge.open()
        folds: list[Fold] = [self._indexer, self._knowledge]
        self._upkeep = Upkeep(self._journal, self._cursors, limits_of(config.journal), folds=folds)
        self._journal.append([Start(time.time_ns(), __version__, _boot_id())])
        tools = Tools(Handles(), Courier(timeout_s=None), DropCaches(int(config.coherence.drop_caches_interval)))
        stack.callback(tools.courier.close)
        self._drop_caches = tools.drop_caches
        self._engine = Engine(self, tools)
        stack.push_async_callback(in_thread, self._engine.close, name="end")
        self._stale_log = StaleLog(self._engine.state)
        stack.callback(self._stale_log.close)
        self._hooks = HookBook(
            lambda mount_points: self._config.rule_for(mount_points),
            at_rest=self._engine.at_rest,
            metrics=self._metrics,
        )
        stack.push_async_callback(self._hooks.close)
        names = NameBook({name: mark.path for name, mark in self._journal.recovered.layers.items()})
        self._layers = LayerBook(
            self._journal,
            self._engine,
            self._metrics,
            settings=config.sources,
            knowledge=self._knowledge,
            barrier_directory=preflight.barrier_directory(config.runtime_directory),
            names=names,
            store=self._store,
            on_round=self._record_round,
        )
        self._mounts = MountBook(
            config,
            layers=self._layers,
            engine=self._engine,
            metrics=self._metrics,
            names=names,
            on_answer=self._look.set,
        )
        stack.push_async_callback(self._mounts.close)
        stack.push_async_callback(self._layers.close)
        self._keeper = JournalKeeper(self._journal, self._layers, changed=self._journal_changed)
        parts = self._mounts, self._layers, self._engine, self._journal, self._drop_caches
        self._metrics.show(partial(snapshot, *parts, cursors=self._cursors))
        self._loop.add_reader(self._mounts.fileno(), self._mounts_changed)
        stack.callback(self._loop.remove_reader, self._mounts.fileno())
        tell_missing_programs(config)
        await self._mounts.refresh()
        self._layers.go_on()
        self._control = ControlServer(
            config.runtime_directory,
            {
                "status": self._status,
                "sync": self._sync,
                "reload": self._reload,
                "changes": self._consumers.changes,
                "cursors": self._consumers.cursors,
                "cursor_set": self._consumers.set_cursor,
                "cursor_delete": self._consumers.delete_cursor,
            },
            streams={"follow": self._consumers.follow},
            root_only=frozenset({"reload", "cursor_set", "cursor_delete"}),
        )
        await self._control.start(config.control)
        stack.push_async_callback(self._control.close)
        stack.push_async_callback(self._consumers.close)
        await self._listen()
        stack.push_async_callback(in_thread, self._metrics.close, name="end")
        self._metrics.reloaded(ok=True, time_s=time.time())
        self._indexer.start()  # last: where the index is lost it reads all of the journal, and would be in the way

    async def _serve(self) -> None:
        keeping = (
            self._keep_looking(),
            self._feed_watchdog(),
            self._keeper.run(),
            self._upkeep.run(),
            self._knowledge.keep_folding(),
        )
        tasks = [asyncio.create_task(work) for work in keeping]
        stop = asyncio.create_task(self._stop.wait())
        watched: list[asyncio.Future[Any]] = [stop, *tasks]
        try:
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            stop.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, stop, return_exceptions=True)

    async def _close_journal(self) -> None:
        if self._journal.failure:  # it was told
            with contextlib.suppress(JournalError):
                await self._journal.close()
            return
        await asyncio.sleep(0)  # what the engine's threads told last is recorded first
        self._journal.append([Stop(time.time_ns(), __version__, _boot_id())])
        await self._journal.close()

    # ---- mounts that come and go ------------------------------------------------------------------------------------

    def _mounts_changed(self) -> None:
        self._mounts.drain()
        self._look.set()

    async def _keep_looking(self) -> None:
        """Refresh when mounts changed, when there are new namespaces, and when something is in trouble."""
        troubled_at = checked_at = time.monotonic()
        while True:
            told = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_INTERVAL_S):
                    told = bool(await self._look.wait())
            self._look.clear()
            self._tell_summary()
            overdue = time.monotonic() - troubled_at > TROUBLE_INTERVAL_S and self._mounts.troubled()
            if told or overdue or await self._mounts.namespaces_changed():
                troubled_at = time.monotonic()
                await self._refresh()
            if time.monotonic() - checked_at > TROUBLE_INTERVAL_S:
                checked_at = time.monotonic()
                await self._mounts.check_layers(list(self._mounts.mounts.values()))
            if told or overdue:
                await asyncio.sleep(REFRESH_PAUSE_S)

    async def _refresh(self) -> None:
        try:
            await self._mounts.refresh()
        except (WatchdError, OSError) as error:  # out of descriptors, for instance: what is kept goes on being kept
            log.error("looking for mounts failed: %s", error)
        self._hooks.keep(self._mounts.mounts)
        self._stale_log.keep(self._mounts.mounts)

    async def _feed_watchdog(self) -> None:
        interval = watchdog_interval_s()
        while interval is not None:
            notify(WATCHDOG=1)
            await asyncio.sleep(interval)
        await asyncio.Event().wait()

    def _tell_summary(self) -> None:
        """To the service manager, where it has changed."""
        if self._told != (summary := self._summary()):
            self._told = summary
            notify(STATUS=summary)

    def _summary(self) -> str:
        layers = list(self._layers.layers.values())
        live = sum(layer.state == "live" for layer in layers)
        summary = f"{len(self._mounts.mounts)} mounts, {live} of {len(layers)} layers live"
        return f"{summary}; nothing is recorded: {failure}" if (failure := self._journal.failure) else summary

    def _journal_changed(self) -> None:
        """The journal has failed, or is written again."""
        if not self._journal.failure and not self._journal.last_seq:  # a new one
            self._journal.append([Start(time.time_ns(), __version__, _boot_id())])
        self._tell_summary()

    # ---- what the engine and the journal tell -----------------------------------------------------------------------

    def round(self, round: Round) -> None:
        """See `watchd.coherence.engine.Observer`; called in the engine's threads."""
        self._rounds.append(round)
        if self._rounds_told:
            return
        self._rounds_told = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: the end is near and the journal with it
            self._loop.call_soon_threadsafe(self._take_in_rounds)

    def _take_in_rounds(self) -> None:
        self._rounds_told = False  # before it is empty, so that none is left behind
        self._layers.take_in()  # the changes that the rounds cover come first
        while self._rounds:
            self._record_round(self._rounds.popleft())

    def _record_round(self, round: Round) -> None:
        self._metrics.verification(round.result)
        if round.latency_ns is not None and round.result == "coherent":
            self._metrics.latency.observe(round.latency_ns / 1e9)
        if round.result == "failed":
            log.warning("%s: %s", round.target.device, round.error)
        self._stale_log.round(round.target.device, stale=round.stale_after)
        self._hooks.round(round, sequence=self._layers.sequence_of(round.upto))
        if round.replaced_by is not None:
            self._look.set()
        # A counter of a mount that is no more would go with it.
        device = (round.replaced_by or round.target).device
        for step in round.steps:
            self._metrics.action(device, step.method, step.result, step.duration_ns / 1e9)
        damage = [self._damage(round, entry) for entry in round.new_damage]
        if round.steps or damage:
            self._journal.append([*damage, *(self._action(round, step) for step in round.steps)])

    def _action(self, round: Round, step: Step) -> Action:
        return Action(
            time.time_ns(),
            round.target.device,
            round.target.mount_point,
            step.method,
            step.result,
            step.stale_before,
            step.stale_after,
            step.duration_ns,
            self._layers.sequence_of(round.upto),
        )

    def _damage(self, round: Round, entry: Stale) -> Damage:
        log.warning("%s: %s is damaged: %s", round.target.device, shown(os.fsdecode(entry.path)), entry.reason)
        return Damage(time.time_ns(), round.target.device, round.target.mount_point, entry.path, entry.reason)

    def _committed(self, commit: Commit) -> None:
        self._store.committed(self._journal.durable_seq)
        self._metrics.append_duration.observe(commit.append_s)
        self._metrics.sync_duration.observe(commit.sync_s)
        self._consumers.committed()
        self._indexer.committed(commit)
        if commit.begin.segment != commit.end.segment:
            self._upkeep.wake()

    # ---- requests ---------------------------------------------------------------------------------------------------

    async def _status(self, request: Mapping[str, Any]) -> dict[str, Any]:
        cursors = await in_thread(partial(all_cursors, self._cursors), name="cursors")
        return status(self._mounts, self._layers, self._engine, self._journal, cursors=cursors)

    async def _sync(self, request: Mapping[str, Any]) -> dict[str, Any]:
        patterns, timeout_s = _sync_arguments(request)
        deadline_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        try:
            async with asyncio.timeout(timeout_s):
                mounts = await self._keeper.guard(self._bring_in_step(patterns, deadline_ns))
        except TimeoutError:
            reasons = filter(None, (self._waits_for(mount) for mount in self._mounts.select(patterns)[0]))
            raise DeadlineError(
                "; ".join([f"not everything was verified within {timeout_s:g} s", *list(reasons)[:REASONS_SHOWN]]),
                remedy="see `watchd status`, or raise --timeout",
            ) from None
        # What was unmounted meanwhile is not asked for any more.
        kept = [mount for mount in mounts if self._mounts.mounts.get(mount.overlay.device) is mount]
        return {"mounts": mounts_status(kept, self._engine)}

    async def _bring_in_step(self, patterns: Sequence[str], deadline_ns: int) -> list[Mount]:
        """Returns the mounts when all that happened before was looked at and recorded. Raises TimeoutError, WatchdError."""
        mounts, unmatched = await self._select(patterns)
        if unmatched:
            raise UsageError(
                f"no overlay mount matches {unmatched[0]!r}", remedy="see `watchd status` for those that are kept"
            )
        for _ in range(SYNC_ROUNDS):
            await self._verify(mounts, deadline_ns, every_layer=not patterns)
            if all(self._engine.state(mount.overlay.device) for mount in mounts):
                break
            mounts, _ = await self._select(patterns)  # one was replaced or unmounted meanwhile
        await self._journal.flush()
        if any(state_of(mount, self._engine).state == "failed" for mount in mounts):
            await self._mounts.refresh()  # perhaps it was unmounted meanwhile
        return mounts

    def _waits_for(self, mount: Mount) -> str:
        state, reason, *_ = state_of(mount, self._engine)
        return mount.waiting(longer_than_s=0) or (reason if state == "failed" else "")

    async def _select(self, patterns: Sequence[str]) -> tuple[list[Mount], list[str]]:
        """See `MountBook.select`; what is asked for is looked up anew, and waited for until it is known what it is."""
        while True:
            answer = self._mounts.next_answer
            await self._mounts.refresh(retry_after_s=RETRY_S)
            mounts, unmatched = self._mounts.select(patterns)
            if not any(mount.unseen for mount in mounts):
                return mounts, unmatched
            await asyncio.wait({answer})

    async def _verify(self, mounts: Sequence[Mount], deadline_ns: int, *, every_layer: bool) -> None:
        """Returns when all that happened before was looked at. Raises TimeoutError."""
        levels = self._mounts.innermost_first(mounts)
        concerned = [layer for level in levels for mount in level for layer in mount.layers]
        await self._layers.barrier(list(self._layers.layers.values()) if every_layer else concerned)
        await self._mounts.check_layers([mount for level in levels for mount in level])
        await self._settle(levels, deadline_ns)

    async def _settle(self, levels: Sequence[Sequence[Mount]], deadline_ns: int) -> None:
        """Wait until all was verified; what is stale is looked at again a few times. Raises TimeoutError."""
        enough_at = time.monotonic() + sum(SYNC_PAUSES_S)
        for pause_s in (*SYNC_PAUSES_S, None):
            is_last = pause_s is None or (pause_s != SYNC_PAUSES_S[0] and time.monotonic() > enough_at)
            for level in levels:
                devices = [mount.overlay.device for mount in level]
                if not await in_thread(partial(self._engine.settle, devices, deadline_ns), name="settle"):
                    raise TimeoutError
            states = {state_of(mount, self._engine).state for level in levels for mount in level}
            if pause_s is None or is_last or not states & {"stale", "pinned"}:
                return
            await asyncio.sleep(pause_s)

    async def _reload(self, request: Mapping[str, Any]) -> dict[str, Any]:
        reloading()
        ok = False
        try:
            result = await self._reconfigure()
            ok = True
            return result
        finally:
            self._metrics.reloaded(ok=ok, time_s=time.time())
            notify(READY=1, STATUS=self._summary())

    async def _reconfigure(self) -> dict[str, Any]:
        loaded = await in_thread(partial(load, self._config_file), name="reload")
        self._control.permit(loaded.config.control)
        old, self._config = self._config, loaded.config
        self._drop_caches.interval_ns = int(loaded.config.coherence.drop_caches_interval)
        logs.set_up(loaded.config.log)
        tell_missing_programs(loaded.config)
        self._upkeep.configure(limits_of(loaded.config.journal))
        if loaded.config.metrics != old.metrics:
            await self._listen()
        await self._mounts.reconfigure(loaded.config)
        later = [
            key
            for key in ("state_directory", "runtime_directory", "journal")
            if _until_restart(loaded.config, key) != _until_restart(old, key)
        ]
        log.info("configuration read from %s", ", ".join(map(str, loaded.files)) or "defaults")
        return {"files": [str(file) for file in loaded.files], "after_restart": later}

    def _reload_soon(self) -> None:
        self._tasks.append(asyncio.create_task(self._reload_on_signal()))

    async def _reload_on_signal(self) -> None:
        self._tasks = [task for task in self._tasks if not task.done()]
        try:
            await self._reload({})
        except WatchdError as error:
            log.error("the old configuration stays: %s", error)

    async def _listen(self) -> None:
        await in_thread(self._metrics.close, name="metrics")
        address = self._config.metrics.listen
        if address is None:
            return
        try:
            self._metrics.listen(address.host, address.port)
        except OSError as error:
            # Not worth dying for: mounts are kept true without anybody watching.
            log.error("metrics.listen %s:%s: %s; metrics are off", address.host, address.port, error.strerror)

    def _journal_settings(self) -> JournalSettings:
        journal = self._config.journal
        return JournalSettings(max_delay_ns=int(journal.max_delay), segment_size_bytes=int(journal.segment_size))


def run(config_file: Path | None) -> None:
    """The daemon, until it is told to stop. Raises WatchdError if it cannot start or its journal fails."""
    passed = inherited()  # before anything is begun that would pass them on
    config_file = config_file and config_file.absolute()  # it is read again after the chdir
    loaded = load(config_file)
    config = loaded.config
    logs.set_up(config.log)
    preflight.check_capabilities()
    preflight.check_kernel()
    preflight.raise_limits()
    os.chdir("/")  # a working directory would keep its filesystem busy
    preflight.make_directory(config.state_directory, key="state_directory", mode=0o750)
    preflight.make_directory(config.runtime_directory, key="runtime_directory", mode=0o755)
    use_one_malloc_arena()
    lock = preflight.lock_runtime(config.runtime_directory)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        asyncio.run(_main(loaded, config_file, passed))
    finally:
        os.close(lock)


async def _main(loaded: Loaded, config_file: Path | None, passed: dict[str, list[int]]) -> None:
    await Daemon(loaded, config_file, passed).run()


def _sync_arguments(request: Mapping[str, Any]) -> tuple[list[str], float]:
    patterns = request.get("mounts", [])
    timeout_s = request.get("timeout", SYNC_TIMEOUT_S)
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UsageError("sync: `mounts` must be a list of strings")
    if not isinstance(timeout_s, int | float) or not 0 <= timeout_s <= 86_400:
        raise UsageError("sync: `timeout` must be a number of seconds, at most a day")
    return patterns, float(timeout_s)


def _until_restart(config: Config, key: str) -> object:
    """What a reload does not change, of what stands under the key."""
    value = getattr(config, key)
    return (value.sync, value.max_delay, value.segment_size) if key == "journal" else value


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
