"""`sync` is exact: whatever anybody had done before it began is in the log when it returns; and after a loss, the state of
every path is known again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import Require
from tests.kernel.images import Images, has_tools_for
from tests.kernel.running import REPOSITORY, Daemon
from tests.kernel.sandbox import Sandbox
from tests.soak import rounds
from watchd.client import Client, PathEntry
from watchd.records import Change, Desync, Kind, Record, Resync

PROGRAM = REPOSITORY / "tests/kernel/many_writers.py"
WRITERS = 4
OPERATIONS = 4000
SYNCS = 4
QUEUE = Path("/proc/sys/fs/inotify/max_queued_events")
FANOTIFY_QUEUE = 16_384
SEEDS = range(rounds(1))
FILESYSTEMS = ("tmpfs", "ext4", "xfs")

WHOLE = int(Kind.RENAME | Kind.DELETE)
"""What covers everything below a directory."""


class Note(NamedTuple):
    layer: str
    path: bytes
    kind: int


class Crowd:
    """Writers at work in all layers, and what they noted."""

    def __init__(self, home: Path, layers: dict[str, bytes], seed: int, operations: int) -> None:
        self.layers = list(layers)
        self._notes, self._counters, self._processes = [], [], []
        for number in range(WRITERS):
            homes = [path + b"/w%d" % number for path in layers.values()]
            for one in homes:
                os.mkdir(one)
            notes, counter = home / f"notes{number}", home / f"counter{number}"
            notes.touch()
            counter.touch()
            files = [str(notes), str(counter), *homes]
            command = [sys.executable, "-I", "-S", str(PROGRAM), str(seed + number), str(operations), *files]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            self._notes.append(notes)
            self._counters.append(counter)
            self._processes.append(process)
        for process in self._processes:
            assert process.stdout is not None
            process.stdout.readline()

    def begin(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(b"\n")

    def is_at_work(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def noted(self) -> list[int]:
        """How much each has noted; what lies before that is done."""
        return [notes.stat().st_size for notes in self._notes]

    def wait_for(self, operations: int) -> None:
        """Until so many operations are done, all writers together."""
        while sum(int(counter.read_bytes() or 0) for counter in self._counters) < operations:
            assert self.is_at_work()
            os.sched_yield()

    def end(self) -> None:
        for process in self._processes:
            process.communicate()
            assert process.returncode == 0

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def between(self, before: list[int], after: list[int]) -> Iterator[Note]:
        """What was noted from there to there."""
        for number, (notes, begin, end) in enumerate(zip(self._notes, before, after, strict=True)):
            for line in notes.read_bytes()[begin:end].splitlines():
                layer, kind, path = line.split()
                yield Note(
                    self.layers[int(layer)],
                    b"w%d/%b" % (number, bytes.fromhex(path.decode())),
                    Kind[kind.decode().upper()],
                )


class Told:
    """What the log tells, to be asked up to a record."""

    def __init__(self, records: Iterable[tuple[int, Record]]) -> None:
        self._of: dict[tuple[str, bytes], list[tuple[int, int]]] = defaultdict(list)
        for seq, record in records:
            if isinstance(record, Change):
                self._of[record.layer, record.path].append((seq, record.kinds))

    def kinds(self, layer: str, path: bytes, upto: int) -> int:
        """All that was told of the path."""
        found = 0
        for seq, kinds in self._of.get((layer, path), ()):
            found |= kinds if seq <= upto else 0
        return found

    def whole(self, layer: str, path: bytes, upto: int) -> bool:
        """Whether a directory above was told to have come or gone as a whole."""
        return any(self.kinds(layer, above, upto) & WHOLE for above in above_of(path))


def above_of(path: bytes) -> list[bytes]:
    parts = path.split(b"/")
    return [b"/".join(parts[:end]) for end in range(1, len(parts))]


@pytest.fixture
def layers(sandbox: Sandbox, images: Images, require: Require) -> Iterator[dict[str, bytes]]:
    """A layer on each filesystem, by name."""
    for fstype in FILESYSTEMS:
        require(has_tools_for(fstype), fstype)
    ext4, xfs = (Path(os.fsdecode(sandbox.directory(name.encode()))) for name in FILESYSTEMS[1:])
    with images.mounted("ext4", ext4), images.mounted("xfs", xfs):
        yield {fstype: sandbox.directory(fstype.encode() + b"/low") for fstype in FILESYSTEMS}


@pytest.fixture
def merged(sandbox: Sandbox, layers: dict[str, bytes]) -> Iterator[None]:
    """An overlay over each layer."""
    for name in layers:
        sandbox.overlay(b"merged-" + name.encode(), layers[name], upper=b"up-" + name.encode())
    yield
    for name in layers:
        sandbox.umount(b"merged-" + name.encode())


@pytest.fixture
def unmerged() -> None:
    """No overlay at all: sync has nothing to do but to wait for what was not read yet."""


def configure(daemon: Daemon, layers: dict[str, bytes], **sources: str) -> None:
    named = [{"path": os.fsdecode(path), "name": name} for name, path in layers.items()]
    daemon.configure(sources=sources, layers=named)
    daemon.start()


def log_of(daemon: Daemon) -> list[tuple[int, Record]]:
    """All records, as the client tells them and as `watchd log` does."""
    client, found = Client(daemon.runtime_directory), []
    last = client.status().journal.last_seq
    with client.follow("beginning") as records:
        while not found or found[-1][0] < last:
            one = next(records)
            found.append((one.seq, one.record))
    said = [(record["seq"], record["type"], record["layer"]) for record in daemon.log()]
    assert said[:last] == [(seq, type(record).__name__.lower(), record.layer) for seq, record in found]
    return found


def missing(told: Told, notes: Iterable[Note], upto: int, *, gone: set[tuple[str, bytes]] | None = None) -> list[Note]:
    """What was noted and is not told.

    `gone`, for inotify: what had another name or none when sync returned. It finds what is in a new directory by looking, so
    there is nothing to tell of what came and went meanwhile, and what came and changed is told to have come.
    """

    def is_told(note: Note) -> bool:
        kinds = told.kinds(note.layer, note.path, upto)
        if kinds & note.kind or told.whole(note.layer, note.path, upto):
            return True
        if gone is None or note.path.count(b"/") == 1:  # what lies in the writer's own directory, which is long watched
            return False
        return bool(kinds & Kind.CREATE) or any((note.layer, one) in gone for one in (note.path, *above_of(note.path)))

    return [note for note in notes if not is_told(note)]


def wrong(client: Client, layers: dict[str, bytes], *, listing: bool = False) -> list[str]:
    """Paths of which somebody who took in all changes would believe something wrong.

    `listing`: he looks anew at what is in a directory that is told to have changed.
    """
    answer = client.changes("beginning")
    assert not answer.fresh
    entries = {(entry.layer, entry.path): entry for entry in answer.entries}

    def looks_anew(layer: str, path: bytes, since: int) -> bool:
        above = [entry for one in above_of(path) if (entry := entries.get((layer, one)))]
        return any(entry.seq >= since and (entry.recursive or listing) for entry in above)

    def is_wrong(entry: PathEntry) -> bool:
        exists = os.path.lexists(layers[entry.layer] + b"/" + entry.path)
        return entry.exists != exists and not looks_anew(entry.layer, entry.path, entry.seq)

    found = [f"{entry}" for entry in answer.entries if is_wrong(entry)]
    for layer, root in layers.items():
        for top, directories, files in os.walk(root):
            for name in (*directories, *files):
                path = os.path.relpath(os.path.join(top, name), root)
                if (layer, path) not in entries and not looks_anew(layer, path, 0):
                    found.append(f"nothing is told of {layer} {path!r}")
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mounts", ["merged", "unmerged"])
@pytest.mark.parametrize("backend", ["fanotify", "inotify"])
def test_what_was_done_before_sync_is_in_the_log_when_it_returns(
    tmp_path: Path,
    layers: dict[str, bytes],
    daemon: Daemon,
    request: pytest.FixtureRequest,
    backend: str,
    mounts: str,
    seed: int,
) -> None:
    request.getfixturevalue(mounts)
    configure(daemon, layers, backend=backend)
    client = Client(daemon.runtime_directory)
    crowd = Crowd(tmp_path, layers, 1000 * seed, OPERATIONS)
    points = [(crowd.noted(), 0)]
    try:
        crowd.begin()
        for number in range(SYNCS):
            if number % 2:
                daemon.pause()  # so that there is much to be read yet
            crowd.wait_for(WRITERS * OPERATIONS * number // (SYNCS + 1))
            done = crowd.noted()
            daemon.resume()
            client.sync()
            points.append((done, client.status().journal.last_seq))
        crowd.end()
    finally:
        crowd.kill()
    client.sync()
    points.append((crowd.noted(), client.status().journal.last_seq))
    records = log_of(daemon)
    told = Told(records)
    for (before, _), (after, upto), (later, _) in zip(points, points[1:], [*points[2:], points[-1]], strict=False):
        gone = {(note.layer, note.path) for note in crowd.between(before, later) if note.kind & WHOLE}
        assert missing(told, crowd.between(before, after), upto, gone=gone if backend == "inotify" else None) == []
    assert not any(isinstance(record, Desync) for _, record in records)
    assert wrong(client, layers) == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("backend", ["fanotify", "inotify"])
def test_after_an_overflow_the_state_of_every_path_is_known_when_sync_returns(
    tmp_path: Path, layers: dict[str, bytes], merged: None, daemon: Daemon, backend: str, seed: int
) -> None:
    configure(daemon, layers, backend=backend, queue="default")
    client = Client(daemon.runtime_directory)
    flood = layers["tmpfs"] + b"/flood"
    os.mkdir(flood)
    crowd = Crowd(tmp_path, layers, 1000 * seed + 500, OPERATIONS)
    try:
        crowd.begin()
        crowd.wait_for(OPERATIONS)
        daemon.pause()
        for number in range(max(FANOTIFY_QUEUE, int(QUEUE.read_text())) + 1000):
            os.mknod(flood + b"/%d" % number)
        daemon.resume()
        client.sync()
        crowd.end()
    finally:
        crowd.kill()
    assert all(mount.is_coherent for mount in client.sync()), daemon.errors()
    records = log_of(daemon)
    desyncs = {seq for seq, record in records if isinstance(record, Desync)}
    assert desyncs
    assert {record.closes for _, record in records if isinstance(record, Resync)} == desyncs, daemon.errors()
    assert wrong(client, layers, listing=True) == []
