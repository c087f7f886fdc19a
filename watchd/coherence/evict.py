"""Not there yet."""

from __future__ import annotations

from collections.abc import Sequence

from watchd.coherence.view import Stale, View


def evict(view: View, stale: Sequence[Stale]) -> dict[bytes, str]:
    """Refuses everything."""
    return {entry.path: "not part of this version" for entry in stale}
