"""`after` hooks: a command that runs when a mount is coherent again after a change.

A burst of changes is one run: what was healed is gathered, and the command runs once the mount is coherent and has come to
rest, or, where changes never cease, every few seconds. A mount's command never runs twice at a time; what is healed meanwhile
leads to one more run.

On its standard input the command finds one line for each path that was healed, relative to the merged mount and in the
bytes of the filesystem. `.` stands for the mount as a whole: any path may have been healed. A name may hold a newline, and
who may make names must not be able to forge lines; so for such a path its nearest directory without one is told.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from watchd.coherence.round import Round
from watchd.coherence.target import Target
from watchd.config.programs import PATH, missing_programs
from watchd.config.schema import Config, MountRule
from watchd.config.tree import shown
from watchd.metrics import Metrics
from watchd.service.command import Ended, run

log = logging.getLogger(__name__)

QUIET_S = 0.1
"""Without anything healed for so long, a burst is over."""

LATEST_S = 5.0
"""After so long the command runs although changes go on."""

AT_ONCE_MAX = 16
"""Commands that run at the same time, for all mounts together; further ones wait."""

PATHS_MAX = 100_000
"""More are told as `.`."""

LINES_MAX = 100
LINES_PER_S = 10
"""What all commands may say: so many lines at once, and after that so many in a second; the rest is counted."""


@dataclass(eq=False)
class _Hook:
    """What is known of the hook of one mount."""

    target: Target
    coherent: bool = False
    paths: set[bytes] = field(default_factory=set)
    """Healed since the last run began; b"" is all of the mount."""
    sequence: int = 0
    since_s: float = 0.0
    """When the first of the paths was healed."""
    gone: bool = False
    """The mount is not kept any more, so there are no series of it either."""
    timer: asyncio.TimerHandle | None = None
    run: asyncio.Task[None] | None = None

    def gather(self, healed: Collection[bytes]) -> None:
        """More that is to be told."""
        if b"" in self.paths or b"" in healed or len(self.paths) + len(healed) > PATHS_MAX:
            self.paths = {b""}
        else:
            self.paths.update(healed)


class HookBook:
    """The hooks of all mounts. Owned by the event loop, which never waits for one of them."""

    def __init__(
        self,
        rule_of: Callable[[Iterable[bytes]], MountRule | None],
        *,
        at_rest: Callable[[str], bool],
        metrics: Metrics,
    ) -> None:
        """`rule_of` gives the rule for the mount points of a mount, as it is configured now; `at_rest` says of a device
        whether nothing remains to be done about it."""
        self._rule_of, self._at_rest, self._metrics = rule_of, at_rest, metrics
        self._hooks: dict[str, _Hook] = {}
        """Of mounts that have something to be told or whose command runs."""
        self._seen: set[str] = set()
        """Mounts of which a round was told before."""
        self._loop = asyncio.get_running_loop()
        self._runs: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(AT_ONCE_MAX, thread_name_prefix="hook")
        self._allowance = Allowance()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closed = False

    def round(self, round: Round, *, sequence: int) -> None:
        """A round ended, which covers the journal up to `sequence`."""
        healed = self._healed(round)
        hook = self._hooks.get(round.target.device)
        if hook is None:
            if not healed or self._closed or self._rule_for(round.target) is None:
                return
            hook = self._hooks[round.target.device] = _Hook(round.target)
        hook.target, hook.coherent = round.target, round.result == "coherent"
        if healed:
            hook.since_s = hook.since_s if hook.paths else self._loop.time()
            hook.gather(healed)
            hook.sequence = max(hook.sequence, sequence)
        if round.replaced_by is not None:
            hook = self._hand_over(hook, round.replaced_by)
        self._wait_for_rest(hook)

    def _hand_over(self, hook: _Hook, heir: Target) -> _Hook:
        """Another mount stands in the place of one; it may have been heard of already."""
        del self._hooks[hook.target.device]
        if (known := self._hooks.get(heir.device)) is None:
            hook.target = heir
            return self._hooks.setdefault(heir.device, hook)
        self._cancel_timer(hook)
        known.gather(hook.paths)
        known.sequence = max(known.sequence, hook.sequence)
        hook.paths = set()
        return known

    def _healed(self, round: Round) -> Collection[bytes]:
        device = round.target.device
        is_first = device not in self._seen
        self._seen.add(device)
        if round.target.observe:
            return ()
        # When a mount is first seen it is invalidated, which is no sign that anything changed.
        return (b"",) if round.doubted and not is_first else round.healed

    def keep(self, devices: Collection[str]) -> None:
        """Forget what is over: only these mounts are there still."""
        self._seen &= {*devices}
        for device, hook in list(self._hooks.items()):
            hook.gone = device not in devices
            if hook.gone and not (hook.coherent or hook.run):
                del self._hooks[device]

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing is waited for."""
        return not any(hook.run or hook.timer for hook in self._hooks.values())

    async def close(self) -> None:
        """End the commands that run, and wait for their end."""
        self._closed = True
        os.eventfd_write(self._stop, 1)
        for hook in self._hooks.values():
            self._cancel_timer(hook)
        await asyncio.gather(*self._runs)
        self._threads.shutdown()
        os.close(self._stop)

    def _rule_for(self, target: Target) -> MountRule | None:
        """The rule by which a command is to be run, if there is one."""
        rule = self._rule_of(target.mount_points)
        return rule if rule and rule.after else None

    def _wait_for_rest(self, hook: _Hook) -> None:
        """Have the command run when the burst is over, if there is anything to tell."""
        self._cancel_timer(hook)
        if self._closed or hook.run:
            return
        if not hook.paths:
            self._hooks.pop(hook.target.device, None)
            return
        if not hook.coherent:
            return
        left_s = hook.since_s + LATEST_S - self._loop.time()
        if left_s <= 0:  # now: a timer might be set anew for ever
            self._begin(hook)
        else:
            hook.timer = self._loop.call_later(min(QUIET_S, left_s), self._begin_at_rest, hook)

    def _cancel_timer(self, hook: _Hook) -> None:
        if hook.timer:
            hook.timer.cancel()
            hook.timer = None

    def _begin_at_rest(self, hook: _Hook) -> None:
        hook.timer = None
        if self._at_rest(hook.target.device):
            self._begin(hook)
        else:
            self._wait_for_rest(hook)

    def _begin(self, hook: _Hook) -> None:
        rule = self._rule_for(hook.target)
        paths, hook.paths = hook.paths, set()
        if rule is None or hook.target.observe:  # configured otherwise meanwhile
            self._hooks.pop(hook.target.device, None)
            return
        hook.run = asyncio.create_task(self._run(hook, rule, paths))
        self._runs.add(hook.run)
        hook.run.add_done_callback(self._runs.discard)

    async def _run(self, hook: _Hook, rule: MountRule, paths: Collection[bytes]) -> None:
        target = hook.target
        work = partial(
            run,
            rule.after,
            paths=as_lines(paths),
            environment=_environment(target, hook.sequence),
            timeout_s=rule.after_timeout / 1e9,
            stop=self._stop,
            tell=partial(self._allowance.tell, target.device),
        )
        try:
            ended = await self._loop.run_in_executor(self._threads, work)
            if not hook.gone:
                self._metrics.hook(hook.target.device, ended.result, ended.duration_s)
            _tell(target, rule, ended, len(paths))
        except OSError as error:  # no descriptors or no memory for it
            log.error("%s: `after` could not be run: %s", target.device, error)
        finally:
            hook.run = None
            self._wait_for_rest(hook)


_ENDINGS = {
    "ok": "succeeded",
    "failed": "failed with status {0}",
    "timeout": "was ended at its deadline of {1}",
    "stopped": "was ended with the daemon",
}


def _tell(target: Target, rule: MountRule, ended: Ended, paths: int) -> None:
    level = logging.INFO if ended.result == "ok" else logging.WARNING
    how = _ENDINGS[ended.result].format(ended.status, rule.after_timeout)
    of = "1 path" if paths == 1 else f"{paths} paths"
    log.log(
        level, "%s: `after` %s for %s %s, after %.3f s", target.device, shown(rule.after[0]), of, how, ended.duration_s
    )


class Allowance:
    """What commands say, told to the log within limits. Used by all of their threads."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._lines, self._at_s = float(LINES_MAX), clock()
        self._left_out = 0

    def tell(self, device: str, line: bytes) -> None:
        """Log a line that the command of a mount has said, or count it as left out."""
        with self._lock:
            now = self._clock()
            self._lines = min(LINES_MAX, self._lines + (now - self._at_s) * LINES_PER_S)
            self._at_s = now
            if self._lines < 1:
                self._left_out += 1
                return
            self._lines -= 1
            left_out, self._left_out = self._left_out, 0
        if left_out:
            log.warning("%d lines that `after` commands said are left out", left_out)
        log.info("%s: `after` says: %s", device, shown(os.fsdecode(line)))


def as_lines(paths: Iterable[bytes]) -> bytes:
    """The paths as a command gets them: sorted, each once."""
    told = {_without_newline(path) or b"." for path in paths}
    return b"".join(path + b"\n" for path in sorted(told if b"." not in told else {b"."}))


def _without_newline(path: bytes) -> bytes:
    return path if b"\n" not in path else path[: path.index(b"\n")].rpartition(b"/")[0]


def _environment(target: Target, sequence: int) -> dict[bytes, bytes]:
    return {
        b"PATH": PATH.encode(),
        b"LANG": b"C.UTF-8",
        b"WATCHD_MOUNT": target.mount_point,
        b"WATCHD_DEVICE": target.device.encode(),
        b"WATCHD_SEQ": b"%d" % sequence,
    }


def tell_missing_programs(config: Config) -> None:
    """Log `missing_programs` soon, whatever time it takes to find out."""

    def tell() -> None:
        for problem in missing_programs(config):
            log.warning("%s", problem)

    if any(rule.after for rule in config.mounts):
        threading.Thread(target=tell, name="hooks-missing", daemon=True).start()
