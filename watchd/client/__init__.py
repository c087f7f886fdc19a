"""Talking to a daemon over its control socket, from programs; docs/client.md shows how.

`Client` waits, `AsyncClient` is for asyncio; both ask the same (`calls`) in the same words (`protocol`) and give the same
values. `request` is the one question that all verbs of the command line are made of.
"""

from watchd.client.aio import AsyncClient, AsyncFollow
from watchd.client.blocking import Client, Follow, request
from watchd.client.protocol import ERROR_KINDS
from watchd.client.values import (
    ChangedDirectories,
    Changes,
    Cursor,
    DirectoryEntry,
    Followed,
    Holder,
    Journal,
    Layer,
    Mount,
    MountPoint,
    PathEntry,
    Stale,
    Status,
)

__all__ = [
    "ERROR_KINDS",
    "AsyncClient",
    "AsyncFollow",
    "ChangedDirectories",
    "Changes",
    "Client",
    "Cursor",
    "DirectoryEntry",
    "Follow",
    "Followed",
    "Holder",
    "Journal",
    "Layer",
    "Mount",
    "MountPoint",
    "PathEntry",
    "Stale",
    "Status",
    "request",
]
