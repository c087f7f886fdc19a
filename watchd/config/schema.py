"""The keys of the configuration, their types and their defaults."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import UNSET, UnsetType

from watchd.config.units import Address, Duration, FileMode, Percentage, Range, Size

SOCKET_NAME = "watchd.sock"
"""Name of the control socket inside `runtime_directory`."""

Backend = Literal["auto", "fanotify", "inotify", "poll"]
Method = Literal["invalidate", "evict", "replace", "drop_caches"]
Mode = Literal["repair", "observe"]
Orphans = Literal["keep", "prune"]
Budget = Annotated[Percentage, Range("0.1%", "100%")]
EvictLimit = Annotated[Size, Range("0B", "1TiB")]
DropCachesInterval = Annotated[Duration, Range("1s", "1d")]

LADDER: tuple[Method, ...] = get_args(Method)
"""The order in which actions are tried."""


class Discovery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which overlay mounts are looked after."""

    namespaces: Literal["host", "all"] = "all"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ("/var/lib/docker/overlay2/*", "/var/lib/containers/storage/overlay/*")


class Layer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A lower that has a name of its own or is journalled though nothing is mounted on it."""

    path: Path
    name: str | UnsetType = UNSET
    backend: Backend = "auto"


class Sources(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How changes are learned of."""

    backend: Backend = "auto"
    content: bool = True
    queue: Literal["unlimited", "default"] = "unlimited"
    poll_interval: Annotated[Duration, Range("10ms", "1d")] = Duration.parse("2s")


class Coherence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is done about a stale mount.

    `budget` is the most of the time that may go into invalidating one mount; `evict_limit` the largest file that evict copies;
    `drop_caches_interval` the least time between two host-wide drops, whichever mounts ask for them.
    """

    mode: Mode = "repair"
    actions: tuple[Method, ...] = ("invalidate",)
    budget: Budget = Percentage.parse("10%")
    evict_limit: EvictLimit = Size.parse("256MiB")
    drop_caches_interval: DropCachesInterval = Duration.parse("1m")
    orphans: Orphans = "keep"


class MountRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What differs from `coherence` for the mounts that `match`, and the command to run when one is coherent again.

    `after` is a program, by its name or its absolute path, and its arguments; `after_timeout` is when it is ended.
    """

    match: str
    mode: Mode | UnsetType = UNSET
    actions: tuple[Method, ...] | UnsetType = UNSET
    budget: Budget | UnsetType = UNSET
    evict_limit: EvictLimit | UnsetType = UNSET
    orphans: Orphans | UnsetType = UNSET
    after: tuple[str, ...] = ()
    after_timeout: Annotated[Duration, Range("1ms", "1d")] = Duration.parse("30s")


class Journal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How records are kept. `max_delay` is how long a record may wait for company before it is made durable.

    What is over `retain_size` or older than `retain_age` goes, unless a named cursor or what is folded from the journal needs
    it; over `retain_limit`, by default twice `retain_size`, it goes all the same.
    """

    sync: Literal["batch"] = "batch"
    max_delay: Annotated[Duration, Range("0ns", "1m")] = Duration.parse("10ms")
    segment_size: Annotated[Size, Range("4KiB", "4GiB")] = Size.parse("64MiB")
    retain_size: Annotated[Size, Range("4KiB", "1024TiB")] = Size.parse("1GiB")
    retain_limit: Annotated[Size, Range("4KiB", "1024TiB")] | UnsetType = UNSET
    retain_age: Annotated[Duration, Range("1s", "36500d")] = Duration.parse("30d")


class Metrics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where /metrics is served; None is `off`."""

    listen: Address | None = Address("127.0.0.1", 9877)


class Control(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may talk to the control socket."""

    mode: FileMode = FileMode.parse("0660")
    group: str = "root"


class Log(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The daemon's own messages. `auto` is text on a terminal and journald fields under systemd."""

    format: Literal["auto", "text", "journald", "json"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of the configuration."""

    state_directory: Path = Path("/var/lib/watchd")
    runtime_directory: Path = Path("/run/watchd")
    discovery: Discovery = Discovery()
    layers: tuple[Layer, ...] = ()
    sources: Sources = Sources()
    coherence: Coherence = Coherence()
    mounts: tuple[MountRule, ...] = ()
    journal: Journal = Journal()
    metrics: Metrics = Metrics()
    control: Control = Control()
    log: Log = Log()

    def rule_for(self, mount_points: Iterable[bytes]) -> MountRule | None:
        """The first rule that matches any of the mount points of one superblock."""
        points = list(mount_points)
        for rule in self.mounts:
            if any(fnmatch.fnmatchcase(point, os.fsencode(rule.match)) for point in points):
                return rule
        return None

    def coherence_for(self, mount_points: Iterable[bytes]) -> Coherence:
        """What holds for one superblock: `coherence` with what its first matching rule overrides."""
        rule = self.rule_for(mount_points)
        if rule is None:
            return self.coherence
        said = {
            key: getattr(rule, key) for key in Coherence.__struct_fields__ if getattr(rule, key, UNSET) is not UNSET
        }
        return msgspec.structs.replace(self.coherence, **said)
