"""Not there yet."""

from __future__ import annotations

from watchd.errors import RefusedError


class DropCaches:
    """Refuses everything."""

    def __init__(self, interval_ns: int) -> None:
        self.interval_ns = interval_ns

    def drop(self) -> None:
        """Refuse."""
        raise RefusedError("not part of this version")
