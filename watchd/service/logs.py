"""The daemon's own messages: text on a terminal, syslog-prefixed lines under systemd (sd-daemon(3)), JSON on request."""

from __future__ import annotations

import logging
import os
import sys
from datetime import UTC, datetime

import msgspec

from watchd.config.schema import Log

_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _Journald(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        priority = _PRIORITIES.get(record.levelno, 5)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat()
        fields = {"time": time, "level": record.levelname.lower(), "message": super().format(record)}
        return msgspec.json.encode(fields).decode()


def set_up(settings: Log) -> None:
    """Log to stderr from now on."""
    formatter: logging.Formatter
    if settings.format == "json":
        formatter = _Json("%(message)s")
    elif settings.format == "journald" or (settings.format == "auto" and "JOURNAL_STREAM" in os.environ):
        formatter = _Journald("%(message)s")
    else:
        formatter = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger("watchd")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(settings.level.upper())
