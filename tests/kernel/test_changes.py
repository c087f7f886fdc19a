"""A consumer that does what docs/changes.md says always ends up with what the layer holds."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable

import pytest

from tests.kernel.running import Daemon, Json
from tests.kernel.sandbox import Sandbox
from tests.soak import rounds
from watchd.journal.changes import collect
from watchd.journal.index import consult
from watchd.kernel.files import RENAME_EXCHANGE, renameat2

ROUNDS = 12
STEPS = 12
ASKED = 4
"""Paths that are asked for by themselves in each round."""
NAMES = [b"a", b"b", b"c", b"a-b"]
AT_FDCWD = -100

Tree = dict[bytes, bytes | None]
"""What is at each path: the content of a file, None for a directory."""


def read_tree(root: bytes, start: bytes = b"") -> Tree:
    """What there is at `start` and below."""
    path = os.path.join(root, start)
    if not os.path.isdir(path):
        if not os.path.exists(path):
            return {}
        with open(path, "rb") as file:
            return {start: file.read()}
    tree: Tree = {start: None}
    for name in os.listdir(path):
        tree |= read_tree(root, os.path.join(start, name))
    return tree


class Consumer:
    """Keeps a copy of a layer."""

    def __init__(self, daemon: Daemon, root: bytes) -> None:
        self._daemon, self._root = daemon, root
        assert daemon.verb("cursor", "set", "copy").returncode == 0
        self.tree = read_tree(root)
        self.full = 0

    def catch_up(self) -> None:
        answer = changes(self._daemon, "copy")
        before = self.tree
        if answer["fresh"]:
            self.tree = read_tree(self._root)
            self.full += 1
        for entry in answer["entries"]:
            self._take_over(os.fsencode(entry["path"]), recursive=entry.get("recursive", False))
        for path in sorted({path for path, _ in before.items() ^ self.tree.items()})[-ASKED:]:
            for dirs in (False, True):
                told = collect(self._daemon.home / "state", "copy", prefix=path, dirs=dirs)
                assert told.entries or (dirs and before.get(path, b"") is not None), (path, dirs)
        assert self._daemon.verb("cursor", "set", "copy", answer["cursor"]).returncode == 0

    def _take_over(self, path: bytes, *, recursive: bool) -> None:
        there = read_tree(self._root, path)
        is_directory = there.get(path, b"") is None
        if recursive or not is_directory:
            inside = path + b"/" if path else b""
            self.tree = {one: kept for one, kept in self.tree.items() if one != path and not one.startswith(inside)}
            self.tree |= there
        else:
            self.tree[path] = None


def changes(daemon: Daemon, since: str, *options: str) -> Json:
    done = daemon.verb("changes", "--since", since, "--json", *options)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(json.loads(done.stdout))


class Chaos:
    """Changes a tree at random."""

    def __init__(self, root: bytes, seed: int) -> None:
        self._root, self._chance = root, random.Random(seed)

    def step(self) -> None:
        kinds: list[Callable[[], None]] = [
            self._write,
            self._make,
            self._rename,
            self._exchange,
            self._remove,
            self._away,
            self._supplant,
        ]
        with contextlib.suppress(OSError):  # there is no such name, or another kind of thing
            self._chance.choices(kinds, [5, 3, 4, 1, 1, 1, 1])[0]()

    def _path(self) -> bytes:
        return os.path.join(self._root, *self._chance.choices(NAMES, k=self._chance.randint(1, 3)))

    def _write(self) -> None:
        with open(self._path(), "ab") as file:
            file.write(b"%d" % self._chance.randrange(1000))

    def _make(self) -> None:
        os.makedirs(self._path())

    def _rename(self) -> None:
        os.rename(self._path(), self._path())

    def _exchange(self) -> None:
        renameat2(AT_FDCWD, self._path(), AT_FDCWD, self._path(), flags=RENAME_EXCHANGE)

    def _remove(self) -> None:
        shutil.rmtree(self._path())

    def _supplant(self) -> None:
        """A file in the place of what was there."""
        path, outside = self._path(), os.path.join(os.path.dirname(self._root), b"supplanted")
        os.rename(path, outside)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        shutil.rmtree(outside, ignore_errors=True)
        if os.path.lexists(outside):
            os.unlink(outside)

    def _away(self) -> None:
        """Out of the layer, and in again under another name."""
        outside = os.path.join(os.path.dirname(self._root), b"outside")
        os.rename(self._path(), outside)
        try:
            os.rename(outside, self._path())
        except OSError:
            shutil.rmtree(outside, ignore_errors=True)
            if os.path.lexists(outside):
                os.unlink(outside)


@pytest.mark.parametrize("backend", ["fanotify", "inotify"])
def test_a_copy_kept_from_changes_is_the_layer(sandbox: Sandbox, daemon: Daemon, backend: str) -> None:
    daemon.configure(sources={"backend": backend})
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    low = sandbox.path(b"low")
    daemon.start()
    assert daemon.sync(merged) == []
    consumer = Consumer(daemon, low)
    seed = random.randrange(2**32)
    chaos = Chaos(low, seed)
    for number in range(rounds(ROUNDS)):
        for _ in range(STEPS):
            chaos.step()
        daemon.ask("sync", mounts=[os.fsdecode(merged)], timeout=20)
        consumer.catch_up()
        assert consumer.tree == read_tree(low), f"seed {seed}, round {number}"
    assert consumer.full == 0, f"seed {seed}"


@pytest.mark.parametrize("backend", ["fanotify", "inotify"])
def test_a_directory_that_left_and_has_a_file_in_its_place_in_one_reading_took_all_below_along(
    sandbox: Sandbox, daemon: Daemon, backend: str
) -> None:
    daemon.configure(sources={"backend": backend})
    sandbox.overlay(b"merged", b"low", upper=b"up")
    low = sandbox.path(b"low")
    os.makedirs(low + b"/d/e/f")
    daemon.start()
    assert daemon.sync() == []
    assert daemon.verb("cursor", "set", "here").returncode == 0
    daemon.pause()
    os.rename(low + b"/d", sandbox.path(b"outside"))
    os.close(os.open(low + b"/d", os.O_CREAT | os.O_WRONLY))
    daemon.resume()
    assert daemon.sync() == []
    for options in ((), ("--dirs",)):
        [entry] = changes(daemon, "here", "--path", "d/e/f", *options)["entries"]
        assert (entry["path"], entry["recursive"]) == ("d", True)
    [entry] = changes(daemon, "here", "--path", "d")["entries"]
    assert (entry["exists"], entry["is_dir"]) == (True, False)


def test_a_layer_that_was_not_watched_at_the_baseline_is_to_be_looked_at_as_a_whole(
    sandbox: Sandbox, daemon: Daemon
) -> None:
    old, new = sandbox.path(b"low"), sandbox.directory(b"new")
    sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    assert daemon.sync() == []

    def fresh(since: str) -> list[bool]:
        """Of the answers about all layers, the old one and the new one."""
        names = {one["path"]: one["name"] for one in daemon.status()["layers"]}
        named = (("--layer", names.get(os.fsdecode(path), "unheard-of")) for path in (old, new))
        return [changes(daemon, since, *options)["fresh"] for options in [(), *named]]

    assert daemon.verb("cursor", "set", "before").returncode == 0
    assert fresh("before") == [False, False, True]
    os.mkdir(new + b"/unseen")
    sandbox.overlay(b"another", b"new", upper=b"another.up")
    assert daemon.sync() == []
    assert daemon.verb("cursor", "set", "after").returncode == 0
    assert (fresh("before"), fresh("after")) == ([False, False, True], [False, False, False])
    for end in (daemon.stop, daemon.kill):
        end()
        daemon.start()
        assert daemon.sync() == []
        assert (fresh("before"), fresh("after")) == ([False, False, True], [False, False, False])


def test_the_daemon_keeps_an_index_that_survives_it_and_tells_who_is_behind(sandbox: Sandbox, daemon: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    os.makedirs(sandbox.path(b"low/usr/lib/huge"))
    daemon.start()
    assert daemon.sync(merged) == []
    assert daemon.verb("cursor", "set", "backup").returncode == 0
    os.close(os.open(sandbox.path(b"low/usr/lib/new"), os.O_CREAT | os.O_WRONLY))
    assert daemon.sync(merged) == []
    [cursor] = daemon.status()["cursors"]
    assert (cursor["name"], cursor["lag"]) == (
        "backup",
        daemon.status()["journal"]["last_seq"] - int(cursor["cursor"][17:]),
    )

    def told(prefix: str) -> list[str]:
        return [entry["path"] for entry in changes(daemon, "backup", "--dirs", "--path", prefix)["entries"]]

    assert (told("usr/lib"), told("usr/lib/huge"), told("var")) == (["usr/lib"], [], [])
    daemon.kill()
    assert (told("usr/lib"), told("usr/lib/huge")) == (["usr/lib"], [])
    daemon.start()
    os.rename(sandbox.path(b"low/usr"), sandbox.path(b"low/var"))
    assert daemon.sync(merged) == []
    assert (told("usr/lib/huge"), told("var/lib/huge")) == (["usr"], ["var"])
    last_seq = daemon.status()["journal"]["last_seq"]
    daemon.stop()
    state = daemon.home / "state"
    assert (consult(state, lambda index: index.mark.position.seq) or 0) > last_seq
    assert sorted(path.name for path in state.iterdir() if path.name.startswith("index")) == ["index.db"]
