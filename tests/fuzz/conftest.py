"""How long an example takes says nothing about watchd, only about the machine."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("watchd", deadline=None)
settings.load_profile("watchd")
