"""The service: the only asyncio. `run` is the daemon."""

from watchd.service.daemon import run

__all__ = ["run"]
