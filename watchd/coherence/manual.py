"""Act on mounts now, without a daemon.

What is stale is found among the names that the layers have and the mount has cached (`View.cached_names`); so a name that went
from the layers and is still held by somebody is not seen here, but by the daemon, which saw it go.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from watchd.coherence.handles import Handles
from watchd.coherence.invalidate import invalidate as invalidate_superblock
from watchd.coherence.selection import targets
from watchd.coherence.target import Target
from watchd.coherence.view import Stale, View
from watchd.errors import LayerError, MountError, NotPermittedError, UnsupportedError
from watchd.kernel.namespaces import Courier


def invalidate(patterns: Sequence[str], method: str) -> list[dict[str, Any]]:
    """Act on every overlay that a pattern matches. Raises UsageError if one matches nothing, UnsupportedError for a method
    that this version does not have."""
    if method != "invalidate":
        raise UnsupportedError(f"the method {method} is not part of this version", remedy="use --method invalidate")
    courier, handles = Courier(), Handles()
    try:
        return [_act(target, handles) for target in targets(patterns, courier)]
    finally:
        handles.expire()
        courier.close()


def _act(target: Target, handles: Handles) -> dict[str, Any]:
    outcome: dict[str, Any] = {
        "device": target.device,
        "mount_point": os.fsdecode(target.mount_point),
        "method": "invalidate",
        "result": "failed",
        "stale_before": 0,
        "stale_after": 0,
        "duration_ns": 0,
    }
    try:
        with View(target, handles) as view:
            outcome["stale_before"] = len(_stale(view))
            outcome["duration_ns"] = invalidate_superblock(view.merged, read_only=target.read_only)
            after = outcome["stale_after"] = len(_stale(view))
            outcome["result"] = "stale" if after else "coherent"
    except NotPermittedError:
        raise
    except (MountError, LayerError, OSError) as error:
        outcome["error"] = str(error)
    return outcome


def _stale(view: View) -> list[Stale]:
    """What can be seen to be stale among the cached names."""
    return [stale for path, suspect in view.cached_names() for stale in view.stale({path: suspect}, acted=True)]
