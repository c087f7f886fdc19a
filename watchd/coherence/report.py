"""A mount as `mounts` of the contract has it: what status, sync and check say in JSON. Pure."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping
from typing import Any

from watchd.coherence.pins import Holder
from watchd.coherence.view import Stale
from watchd.overlay.model import Overlay


def name(value: bytes) -> dict[str, str]:
    """A path for JSON: `path`, and `path_b64` beside it if it is not UTF-8."""
    try:
        return {"path": value.decode()}
    except UnicodeDecodeError:
        return {"path": value.decode(errors="replace"), "path_b64": base64.b64encode(value).decode()}


def mount_report(
    overlay: Overlay,
    *,
    state: str,
    reason: str = "",
    stale: Iterable[Stale] = (),
    actions: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """One element of `mounts`."""
    return {
        "device": overlay.device,
        "mount_points": [
            {**name(point.path), "namespace": point.namespace, "pid": point.pid} for point in overlay.mount_points
        ],
        "lowerdir": [os.fsdecode(path) for path in (*overlay.lowerdir, *overlay.data_only)],
        "upperdir": overlay.upperdir and os.fsdecode(overlay.upperdir),
        "workdir": overlay.workdir and os.fsdecode(overlay.workdir),
        "read_only": overlay.read_only,
        "state": state,
        "reason": reason,
        "stale": [stale_report(entry) for entry in stale],
        "actions": dict(actions or {}),
    }


def stale_report(entry: Stale) -> dict[str, Any]:
    """One element of `stale`."""
    return {
        **name(entry.path),
        "kind": entry.kind,
        "pinned_by": [_holder(holder) for holder in entry.pinned_by],
        "reason": entry.reason,
    }


def _holder(holder: Holder) -> dict[str, Any]:
    return {"pid": holder.pid, "command": holder.command, "how": holder.how}
