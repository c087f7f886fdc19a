"""Damage: upper entries that came into being through a stale name, and hide what the lowers have.

Nothing that drops a cache repairs it, for the upper is right by overlayfs's own rules. So it is told, and left alone.

Facts (measured, see docs/kernel-notes.md; what legitimately looks alike is never told as damage)
* A write, chmod or rename through a stale name copies the old object up. If that had lost its last name in the lower, the copy
  has no overlay.origin, just like a file that was made or renamed there on purpose: the disk alone does not tell them apart.
* If the old object still has a name in the lower, the origin leads to it. A rename in the merged mount looks alike, but leaves
  an entry or a whiteout at the old name.
* With metacopy, only attributes are copied up and content comes from whatever the lower has at that path: without an origin it
  was copied from a stale name; with another origin than what is there the lower was replaced since; with nothing there, reading
  gives EIO. A layer that was copied elsewhere has other handles for the same files, but size and mtime stay.
* A copy-up is born when it happens (statx btime). A lower object came to its path at its ctime or before, or at that of one of
  the directories above it. So a copy-up that is younger than all of these was made when the lower had that object already.
* Whiteouts are hard links of one inode, so the birth of one says nothing, and its ctime is that of the last one made.
* A file that is copied up from what the lower has now carries that one's handle as its origin.

Hence two judgements. From the disk alone: metacopies whose content is another file's or gone, and copies of an object that the
lower had moved away before. And with what the daemon saw: entries that came into being while the name was verified stale.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from watchd.coherence.view import Stale, View
from watchd.errors import WireError
from watchd.kernel.files import O_PATH_DIRECTORY, FileHandle, open_by_handle_at, try_openat2
from watchd.kernel.statx import birth_time_ns
from watchd.overlay.access import handle_of
from watchd.overlay.marks import Marks, is_whiteout
from watchd.overlay.replica import is_replica_at
from watchd.overlay.union import Union
from watchd.wire.handles import parse_origin

TICK_NS = 10_000_000
"""Times of files may lie behind the clock by so much."""

BELOW_MAX = 1_000
"""So many upper entries below a stale directory are looked at."""

GONE = "only its attributes were copied up and the lower file with its content is gone: reading it fails with EIO"
REPLACED = (
    "only its attributes were copied up and the lower file with its content was replaced: it shows the new content, cut or "
    "padded to the old size"
)
MOVED = (
    "it was copied up through a stale name, after the lower had moved that file away and put another in its place: "
    "old content hides the lower's file"
)
WRITTEN = (
    "it was written, made or renamed here while the mount did not show what the lower had: what is in the upper now hides "
    "the lower's file"
)
RETURNED = "it was written here while the mount still showed it, though the lower had removed it: old content came back"
REMOVED = "it was removed here while the mount did not show what the lower had: the whiteout hides the lower's file"


class LowerObject(msgspec.Struct, frozen=True):
    """What the lowers have at the path of an upper entry."""

    handle: FileHandle | None
    """None where there are none."""
    is_regular: bool
    size: int
    mtime_ns: int
    arrived_ns: int | None = None
    """It came to this path then or before; None if that is not known."""


class Evidence(msgspec.Struct, frozen=True):
    """What the layers tell of one upper entry that is no directory."""

    is_whiteout: bool
    size: int
    mtime_ns: int
    born_ns: int | None
    """None where the filesystem does not keep it. Of a whiteout: when one was last made anywhere in this upper."""
    has_metacopy: bool = False
    has_origin: bool = False
    """The xattr is there, though perhaps empty."""
    origin: FileHandle | None = None
    lower: LowerObject | None = None
    content: LowerObject | None = None
    """Where a metacopy has its content from; differs from `lower` after a rename."""
    content_is_known: bool = True
    """False if it may lie in a data-only layer."""
    left_ns: int | None = None
    """When, at the latest, the origin had been moved from this path to another, where the merged mount still shows it."""


class Window(msgspec.Struct, frozen=True):
    """When a name was known to be stale, CLOCK_REALTIME."""

    since_ns: int
    until_ns: int | None = None
    """None if it is stale yet."""

    def holds(self, time_ns: int | None) -> bool:
        """Whether a file that bears this time came into being in it; to be sure that it was not later, a tick less."""
        if time_ns is None:
            return self.until_ns is None
        return self.since_ns - TICK_NS <= time_ns and (self.until_ns is None or time_ns <= self.until_ns - TICK_NS)


def judge(evidence: Evidence, window: Window | None = None) -> str:
    """Why an upper entry is damage, "" if that is not certain. Pure."""
    if evidence.has_metacopy:
        return _judge_metacopy(evidence)
    lower = evidence.lower
    if evidence.origin is not None and lower is not None and evidence.origin == lower.handle:
        return ""
    if window is not None and window.holds(evidence.born_ns):
        if lower is not None:
            return REMOVED if evidence.is_whiteout else WRITTEN
        return "" if evidence.is_whiteout else RETURNED
    times = (evidence.born_ns, evidence.left_ns, lower.arrived_ns if lower else None)
    if None not in times and evidence.origin is not None:
        born_ns, left_ns, arrived_ns = (time for time in times if time is not None)
        return MOVED if born_ns > max(left_ns, arrived_ns) else ""
    return ""


def _judge_metacopy(evidence: Evidence) -> str:
    content = evidence.content
    if content is None or not content.is_regular:
        return GONE if evidence.content_is_known else ""
    if evidence.has_origin and (evidence.origin is None or content.handle is None):
        return ""  # a filesystem without handles
    if evidence.origin == content.handle or (evidence.size, evidence.mtime_ns) == (content.size, content.mtime_ns):
        return ""
    return REPLACED


def find_damage(view: View, suspects: Iterable[bytes], *, windows: Mapping[bytes, Window] | None = None) -> list[Stale]:
    """The upper entries among the suspects that are damage, each with the reason. Raises LayerError, OSError.

    `windows` are the suspects that were verified stale, and when; call it before acting, with windows without an end, and once
    more when they are coherent. Where the upper has no entry it costs one system call a directory.
    """
    windows = windows or {}
    if view.upper is None:
        return []
    found: dict[bytes, Stale] = {}
    with Examiner(view) as examiner:
        for path in _present(view.upper, {*suspects, *windows}):
            window = windows.get(path)
            for one in _with_content(view.upper, path) if window else [path]:
                if reason := examiner.judge(one, window):
                    found[one] = Stale(one, "damage", reason=reason)
    return list(found.values())


def remaining(view: View, damage: Iterable[Stale]) -> list[Stale]:
    """Those whose upper entry is still there. Raises LayerError."""
    if view.upper is None:
        return []
    there = set(_present(view.upper, {entry.path for entry in damage}))
    return [entry for entry in damage if entry.path in there]


def upper_paths(view: View) -> Iterator[list[bytes]]:
    """All that the upper holds and that is no directory, in batches. Raises LayerError, OSError."""
    return iter(()) if view.upper is None else _below(view.upper, b"")


def _below(upper: int, directory: bytes) -> Iterator[list[bytes]]:
    lone = Union([upper])  # lists whiteouts like anything else
    try:
        pending = [(directory, lone.names(directory))]
        while pending:
            above, batches = pending[-1]
            batch = next(batches, None)
            if batch is None:
                pending.pop()
                continue
            prefix = above + b"/" if above else b""
            yield [prefix + one.name for one in batch if not one.is_dir]
            pending += [(prefix + one.name, lone.names(prefix + one.name)) for one in batch if one.is_dir]
    finally:
        lone.close()


def _with_content(upper: int, path: bytes) -> Iterator[bytes]:
    """The path itself or, of a directory, what the upper has below it; at most BELOW_MAX."""
    if not _is_directory(upper, path):
        return iter([path])
    return itertools.islice(itertools.chain.from_iterable(_below(upper, path)), BELOW_MAX)


def _present(upper: int, paths: Iterable[bytes]) -> Iterator[bytes]:
    """Those at which the upper has an entry."""
    for parent, group in itertools.groupby(sorted(paths, key=_split), key=lambda path: _split(path)[0]):
        directory = try_openat2(upper, parent or b".", flags=O_PATH_DIRECTORY)
        if directory < 0:
            continue
        try:
            yield from [path for path in group if _has(directory, _split(path)[1])]
        finally:
            os.close(directory)


def _has(directory: int, name: bytes) -> bool:
    try:
        os.stat(name or b".", dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return True


def _split(path: bytes) -> tuple[bytes, bytes]:
    parent, _, name = path.rpartition(b"/")
    return parent, name


def _is_directory(upper: int, path: bytes) -> bool:
    descriptor = try_openat2(upper, path or b".", flags=O_PATH_DIRECTORY)
    if descriptor >= 0:
        os.close(descriptor)
    return descriptor >= 0


class Examiner:
    """Gathers the evidence on upper entries."""

    def __init__(self, view: View) -> None:
        """`view` has an upper."""
        assert view.upper is not None
        self._view, self._upper = view, view.upper
        self._marks = Marks(userxattr=view.target.userxattr)
        roots = [view.union.root(layer) for layer in range(1, len(view.target.layers))]
        self._roots, self._lowers = roots, Union(roots, userxattr=view.target.userxattr)
        stack = view.target.stack
        self._has_data_only = stack is not None and bool(stack.data_only)

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *_: object) -> None:
        self._lowers.close()

    def judge(self, path: bytes, window: Window | None = None) -> str:
        """Why the upper entry at a path is damage, or "". Raises LayerError, OSError."""
        descriptor = try_openat2(self._upper, path)
        if descriptor < 0:
            return ""
        try:
            status = os.stat(descriptor)
            marks = self._marks.of(descriptor)
            hides = is_whiteout(status) or "whiteout" in marks
            if stat.S_ISDIR(status.st_mode) or (window is None and (hides or not marks & {"origin", "metacopy"})):
                return ""
            if is_replica_at(descriptor):
                return ""  # of what the lower had, put there by watchd, and it goes again
            evidence = self._gather(path, descriptor, status, marks, hides=hides)
            return judge(evidence, window)
        finally:
            os.close(descriptor)

    def _gather(
        self, path: bytes, descriptor: int, status: os.stat_result, marks: set[str], *, hides: bool
    ) -> Evidence:
        origin = self._origin(descriptor) if "origin" in marks else None
        lower = self._lower(self._view.union, path, under=1)
        evidence = Evidence(
            is_whiteout=hides,
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            born_ns=status.st_ctime_ns if hides else birth_time_ns(b"", descriptor),
            has_metacopy="metacopy" in marks,
            has_origin="origin" in marks,
            origin=origin,
            lower=lower,
            content_is_known=not self._has_data_only,
        )
        if evidence.has_metacopy:
            redirect = self._marks.value(descriptor, "redirect") if "redirect" in marks else None
            return msgspec.structs.replace(evidence, content=self._content(path, lower, redirect))
        if origin is None or lower is None or lower.handle == origin or status.st_nlink != 1:
            return evidence
        return msgspec.structs.replace(evidence, left_ns=self._left_ns(origin, path))

    def _content(self, path: bytes, lower: LowerObject | None, redirect: bytes | None) -> LowerObject | None:
        if not redirect:
            return lower
        if redirect.startswith(b"/"):
            return self._lower(self._lowers, redirect.strip(b"/"))
        parent, _ = _split(path)
        return self._lower(self._view.union, parent + b"/" + redirect if parent else redirect, under=1)

    def _lower(self, union: Union, path: bytes, *, under: int = 0) -> LowerObject | None:
        descriptor = union.open(path, under=under)
        if descriptor is None:
            return None
        try:
            status, handle = os.stat(descriptor), handle_of(descriptor)
        finally:
            os.close(descriptor)
        return LowerObject(
            handle=handle,
            is_regular=stat.S_ISREG(status.st_mode),
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            arrived_ns=self._arrived_ns(path, status),
        )

    def _arrived_ns(self, path: bytes, status: os.stat_result) -> int | None:
        """None where the layer has the object at another path, because a directory above was redirected."""
        for root in self._roots:
            if (times := _times_on_the_way(root, path, status)) is not None:
                return times
        return None

    def _left_ns(self, origin: FileHandle, path: bytes) -> int | None:
        for root in self._roots:
            with contextlib.suppress(OSError):
                if (found := _where(root, origin)) is not None:
                    now_at, status = found
                    if now_at == path or status.st_nlink != 1 or any(_present(self._upper, [now_at])):
                        return None
                    return _times_on_the_way(root, now_at, status)
        return None

    def _origin(self, descriptor: int) -> FileHandle | None:
        try:
            origin = parse_origin(self._marks.value(descriptor, "origin") or b"")
        except WireError:
            return None
        return FileHandle(origin.type, origin.fid) if origin else None


def _times_on_the_way(root: int, path: bytes, expected: os.stat_result) -> int | None:
    """The latest ctime of an object and the directories above it in its layer; None if it is another object."""
    parts: Sequence[bytes] = path.split(b"/")
    times = [expected.st_ctime_ns]
    for count in range(1, len(parts) + 1):
        descriptor = try_openat2(root, b"/".join(parts[:count]))
        if descriptor < 0:
            return None
        try:
            status = os.stat(descriptor)
        finally:
            os.close(descriptor)
        times.append(status.st_ctime_ns)
    return max(times) if (status.st_dev, status.st_ino) == (expected.st_dev, expected.st_ino) else None


def _where(root: int, handle: FileHandle) -> tuple[bytes, os.stat_result] | None:
    """Where in a layer an object is now, if it is there and the kernel knows by which name. Raises OSError."""
    mount = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    try:
        descriptor = open_by_handle_at(mount, handle.pack(), flags=os.O_PATH | os.O_NOFOLLOW)
    finally:
        os.close(mount)
    try:
        path = os.readlink(b"/proc/self/fd/%d" % descriptor).removeprefix(b"/")
        status = os.stat(descriptor)
    finally:
        os.close(descriptor)
    again = try_openat2(root, path) if path else -1
    if again < 0:
        return None
    try:
        return (path, status) if handle_of(again) == handle else None
    finally:
        os.close(again)
