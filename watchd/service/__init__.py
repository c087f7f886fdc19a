"""The service: the event loop and all that it owns. `run` is the daemon."""

from watchd.service.daemon import run

__all__ = ["run"]
