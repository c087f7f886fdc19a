"""Not there yet."""

from __future__ import annotations

from watchd.coherence.target import Target
from watchd.errors import RefusedError
from watchd.kernel.namespaces import Courier


def replace(target: Target, courier: Courier) -> Target:
    """Refuses everything."""
    raise RefusedError("not part of this version")
