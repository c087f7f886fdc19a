"""Act on mounts now, without a daemon: look at all of the mount, act, look again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from watchd.coherence.actions import Tools, actions_on
from watchd.coherence.audit import audit
from watchd.coherence.drop_caches import DropCaches
from watchd.coherence.evict import tidy
from watchd.coherence.handles import Handles
from watchd.coherence.ladder import Climb, Ladder
from watchd.coherence.replace import clear_up
from watchd.coherence.report import stale_report
from watchd.coherence.selection import targets
from watchd.coherence.target import Target
from watchd.coherence.view import Stale, View
from watchd.errors import LayerError, MountError, NotPermittedError, WatchdError
from watchd.kernel.namespaces import Courier


def invalidate(patterns: Sequence[str], method: str) -> list[dict[str, Any]]:
    """Act on every overlay that a pattern matches, whether or not anything in it is stale.

    Raises UsageError if one matches nothing, NotPermittedError.
    """
    tools = Tools(Handles(), Courier(), DropCaches(0))
    try:
        return [_act(target, method, tools) for target in targets(patterns, tools.courier)]
    finally:
        tools.handles.expire()
        tools.courier.close()


def _act(target: Target, method: str, tools: Tools) -> dict[str, Any]:
    outcome: dict[str, Any] = {
        "device": target.device,
        "mount_point": os.fsdecode(target.mount_point),
        "method": method,
        "result": "failed",
        "stale_before": 0,
        "stale_after": 0,
        "duration_ns": 0,
    }
    before = audit(target, tools.handles).curable
    outcome["stale_before"] = outcome["stale_after"] = len(before)
    try:
        climb = _climb(target, method, tools, before)
    except NotPermittedError:
        raise
    except (MountError, LayerError, OSError) as error:
        return outcome | {"error": str(error)}
    outcome["stale_after"] = len(climb.stale)
    outcome["stale"] = [stale_report(entry) for entry in climb.stale]
    for step in climb.steps:
        outcome |= {"result": step.result, "duration_ns": step.duration_ns}
    if not climb.steps:  # it refused
        outcome |= {"result": "stale" if climb.stale else "failed"}
    why = climb.error or "; ".join(climb.refusals)
    return outcome | ({"error": why} if why else {})


def _climb(target: Target, method: str, tools: Tools, before: Sequence[Stale]) -> Climb:
    def verify(new: Target | None) -> tuple[Stale, ...]:
        if new is None:  # what is not cached cannot be compared, so whether it helped shows only once it is looked up
            for entry in before:
                view.look_up(entry.path)
        after = audit(new or target, tools.handles)
        if after.error:
            raise MountError(after.error)
        return after.curable

    with View(target, tools.handles) as view:
        climb = Ladder(actions_on(view, target, tools), verify, fatal=(NotPermittedError,)).climb(
            (method,), before, doubted=True
        )
        if method == "evict":
            _tidy(view)
    if climb.replaced_by is not None:
        clear_up(climb.replaced_by, tools.courier)
    return climb


def _tidy(view: View) -> None:
    """What has to stay, for whatever reason, is the next one's to take away."""
    with contextlib.suppress(WatchdError, OSError):
        tidy(view)
