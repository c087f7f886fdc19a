"""Compare a whole merged mount with its layers, without a daemon and in bounded memory.

Facts
* Only what is cached can be stale, and what is cached has cached ancestors. So the walk follows the names that the layers have,
  whiteouts included, and goes down where the merged mount has the directory cached.
* A directory merged of several layers is told apart by its first part only; what it lists tells of the others. It also tells of
  a listing that is stale because somebody who read it has the directory open.
* Listing a directory through the mount caches none of its names, except for those that were copied up and, with xino over
  several filesystems, those of merged directories.
* User space cannot list the dentry cache. A name that no layer has any more, and no process uses, is not found: it is stale for
  whoever asks for it by that name, until it is invalidated.
* Attributes that changed before the host was booted cannot be cached in their old state.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from watchd.coherence.damage import find_damage, upper_paths
from watchd.coherence.handles import Handles
from watchd.coherence.pins import used_paths
from watchd.coherence.setid import Prober
from watchd.coherence.target import Target
from watchd.coherence.view import NOT_CACHED, Finding, Stale, View
from watchd.errors import LayerError, MountError

STALE_MAX = 10_000
"""So many stale entries of a mount are kept; the others are counted."""

Progress = Callable[[int], object]
"""Is told how many more names were looked at."""


@dataclass
class Outcome:
    """What an audit of one mount found."""

    stale: tuple[Stale, ...] = ()
    """At most STALE_MAX, by path."""
    total: int = 0
    """Of all stale entries."""
    names: int = 0
    """How many were looked at."""
    error: str = ""
    """Why it is not complete."""

    @property
    def curable(self) -> tuple[Stale, ...]:
        """Without damage, which no action takes away."""
        return tuple(entry for entry in self.stale if entry.kind != "damage")

    @property
    def state(self) -> str:
        """The contract's word."""
        if self.error:
            return "failed"
        if not self.total:
            return "coherent"
        held = [entry for entry in self.stale if entry.pinned_by and entry.kind != "damage"]
        return "pinned" if len(held) == self.total else "stale"


def audit(target: Target, handles: Handles, *, progress: Progress = lambda _: None) -> Outcome:
    """Everything that is stale or damaged in one mount. Raises nothing: see `error`."""
    outcome = Outcome()
    try:
        with View(target, handles) as view, _Auditor(view, progress) as auditor:
            try:
                kept = auditor.run()
                outcome.stale = tuple(sorted(view.pinned(kept), key=lambda entry: entry.path))
                outcome.total = len(kept) + auditor.beyond
            finally:
                outcome.names = auditor.names
            outcome.error = auditor.trouble
    except LayerError as error:  # the overlay goes on with what nobody can get at any more
        outcome.stale, outcome.total = (Stale(b"", "layer", reason=str(error)),), 1
    except (MountError, OSError) as error:
        outcome.error = str(error)
    return outcome


def _booted_ns() -> int:
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@dataclass
class _Auditor:
    view: View
    progress: Progress
    names: int = 0
    beyond: int = 0
    """Stale entries that were not kept."""
    _unreadable: Counter[str] = field(default_factory=Counter)
    _booted_ns: int = field(default_factory=_booted_ns)
    _prober: Prober | None = None

    def __enter__(self) -> _Auditor:
        return self

    def __exit__(self, *_: object) -> None:
        if self._prober is not None:
            self._prober.close()

    def run(self) -> list[Stale]:
        """What is stale and still is when all is done."""
        kept: dict[bytes, Stale] = {}
        for find in (self._walk, self._used, self._damaged):
            for entry in find():
                if len(kept) < STALE_MAX:
                    kept.setdefault(entry.path, entry)
                else:
                    self.beyond += entry.path not in kept
        return [entry for entry in kept.values() if self._still_is(entry)]

    @property
    def trouble(self) -> str:
        """What could not be looked at."""
        if not self._unreadable:
            return ""
        [(first, _)] = self._unreadable.most_common(1)
        return f"{self._unreadable.total()} names could not be looked at: {first}"

    def _walk(self) -> Iterator[Stale]:
        pending = [self._directory(b"")]
        while pending:
            for found in pending[-1]:
                if isinstance(found, Stale):
                    yield found
                else:
                    pending.append(self._directory(found))
                    break
            else:
                pending.pop()

    def _directory(self, path: bytes) -> Iterator[Stale | bytes]:
        """What is stale in a directory, and the directories in it to go on with."""
        prefix = path + b"/" if path else b""
        for batch in self.view.union.names(path):
            for name, is_dir, _ in batch:
                finding = self._inspect(prefix + name)
                if finding.kind:
                    yield Stale(prefix + name, finding.kind)
                if is_dir and finding.is_there and finding.kind in (None, "permission"):
                    yield prefix + name
            self.names += len(batch)
            self.progress(len(batch))
        if self._lists_otherwise(path):
            yield Stale(path, "listing")
            yield from self._ghosts(path)

    def _inspect(self, path: bytes) -> Finding:
        try:
            finding = self.view.inspect(path)
            if finding.program is not None and finding.kind is None and self._runs_otherwise(path, finding.program):
                return Finding(is_there=True, kind="permission")
        except OSError as error:
            self._note(error)
            return NOT_CACHED
        return finding

    def _note(self, error: OSError) -> None:
        self._unreadable[error.strerror or str(error)] += 1

    def _runs_otherwise(self, path: bytes, real: os.stat_result) -> bool:
        if real.st_ctime_ns < self._booted_ns:
            return False
        if self._prober is None:
            self._prober = Prober(self.view.target.open())
        return self._prober.is_stale(path, real)

    def _lists_otherwise(self, path: bytes) -> bool:
        try:
            listing = self._open_listing(path)
            if listing is None:
                return False
            listed = _digest(_names(listing))
            true = _digest(name for batch in self.view.union.names(path) for name, _, shown in batch if shown)
        except OSError as error:
            self._note(error)
            return False
        return listed != true and (not self.view.target.splits_files or self._lists_other_names(path))

    def _lists_other_names(self, path: bytes) -> bool:
        """Name by name: with metacopy what has lost its content may not be listed, and that is as it should be."""
        descriptor = self.view.open_cached(path)
        if descriptor is None:
            return False
        try:
            return self.view.lists_other_names(path, descriptor)
        except OSError as error:
            self._note(error)
            return False
        finally:
            os.close(descriptor)

    def _open_listing(self, path: bytes) -> int | None:
        """An owned descriptor of a directory of the merged mount, None if it is not cached as one. Raises OSError."""
        descriptor = self.view.open_cached(path)
        if descriptor is None:
            return None
        try:
            return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=descriptor)
        except NotADirectoryError:
            return None
        finally:
            os.close(descriptor)

    def _ghosts(self, path: bytes) -> Iterator[Stale]:
        """Names that the merged mount lists and no layer has."""
        listing = self._open_listing(path)
        if listing is None:
            return
        for name in _names(listing):
            below = path + b"/" + name if path else name
            if self._inspect(below).kind == "ghost":
                yield Stale(below, "ghost")

    def _used(self) -> Iterator[Stale]:
        """What processes use, whether or not a layer has it."""
        for path in sorted(used_paths(self.view.target.mount_points)):
            if kind := self._inspect(path).kind:
                yield Stale(path, kind)

    def _damaged(self) -> Iterator[Stale]:
        for batch in upper_paths(self.view):
            yield from find_damage(self.view, batch)
            self.names += len(batch)
            self.progress(len(batch))

    def _still_is(self, entry: Stale) -> bool:
        """Whether it was no change that went on just when it was looked at."""
        match entry.kind:
            case "damage":
                return True
            case "listing":
                return self._lists_otherwise(entry.path)
            case _:
                return self._inspect(entry.path).kind is not None


def _names(listing: int) -> Iterator[bytes]:
    """The names in a directory given as an owned descriptor, as they come."""
    try:
        with os.scandir(listing) as entries:
            for entry in entries:
                yield os.fsencode(entry.name)
    finally:
        os.close(listing)


def _digest(names: Iterable[bytes]) -> tuple[int, int]:
    """Tells sets of names apart without keeping them, in whatever order they come."""
    count = total = 0
    for name in names:
        count += 1
        total += hash(name)
    return count, total
