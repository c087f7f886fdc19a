"""What can be done about a stale mount, by the names of the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from watchd.coherence.drop_caches import DropCaches
from watchd.coherence.evict import evict
from watchd.coherence.handles import Handles
from watchd.coherence.invalidate import invalidate, invalidate_around
from watchd.coherence.ladder import Action, Done
from watchd.coherence.replace import replace
from watchd.coherence.target import Target
from watchd.coherence.view import Stale, View
from watchd.kernel.namespaces import Courier


@dataclass(frozen=True)
class Tools:
    """What the actions on all mounts share."""

    handles: Handles
    courier: Courier
    drop_caches: DropCaches


def actions_on(view: View, target: Target, tools: Tools, *, around: Sequence[Target] = ()) -> Mapping[str, Action]:
    """The actions on one mount. `around`: overlays that hold references into it, outermost first; unless those let go, nothing
    is dropped."""

    def invalidate_all(_: Sequence[Stale]) -> Done:
        invalidate_around(around)
        invalidate(view.merged, read_only=target.read_only)
        return Done()

    def evict_each(stale: Sequence[Stale]) -> Done:
        invalidate_around(around)
        return Done(refused=evict(view, stale))

    def drop_caches(_: Sequence[Stale]) -> Done:
        tools.drop_caches.drop()
        return Done()

    replace_it = replacing(target, tools)["replace"]
    return {"invalidate": invalidate_all, "evict": evict_each, "replace": replace_it, "drop_caches": drop_caches}


def replacing(target: Target, tools: Tools) -> Mapping[str, Action]:
    """The one action that needs no view of the mount."""
    return {"replace": lambda _: Done(replaced_by=replace(target, tools.courier))}
