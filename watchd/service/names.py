"""Names for layers: the configured one, else one made of the path, the same at every start."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_UNFIT = re.compile(r"[^A-Za-z0-9._]+")


class NameBook:
    """Gives each layer a name that no other one has."""

    def __init__(self, known: Mapping[str, bytes]) -> None:
        """`known`: names that the journal has used, with the path of the layer that bore it."""
        self._known = dict(known)
        self._taken: set[str] = set()

    def take(self, path: bytes, inode: int, *, configured: str | None = None) -> str:
        """A name for the layer at `path` whose root directory has this inode number."""
        plain = (
            configured or _UNFIT.sub("-", os.fsdecode(path).encode("ascii", "replace").decode()).strip("-") or "root"
        )
        name = plain
        for attempt in range(1000):
            if name not in self._taken and self._known.get(name, path) == path:
                break
            name = f"{plain}-{inode}" if attempt == 0 else f"{plain}-{inode}-{attempt}"
        self._taken.add(name)
        self._known[name] = path
        return name

    def release(self, name: str) -> None:
        """The layer is gone; the name stays its own until the next start."""
        self._taken.discard(name)
