"""A mount looked at as the daemon does it, without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from watchd.coherence.handles import Handles
from watchd.coherence.target import Target
from watchd.coherence.view import View


@contextlib.contextmanager
def open_view(target: Target) -> Iterator[View]:
    """A view of the mount; what it needed of the layers is let go at once."""
    handles = Handles()
    try:
        with View(target, handles) as view:
            yield view
    finally:
        handles.expire()
