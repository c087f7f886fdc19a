"""The example that mirrors a layer: after random churn rsync finds nothing to do."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pytest

from tests.conftest import Require
from tests.kernel.churning import NAMES
from tests.kernel.running import PATIENCE_S, REPOSITORY, Daemon
from tests.kernel.sandbox import Sandbox
from watchd.client import Client

EXAMPLE = REPOSITORY / "examples/mirror.py"
ODD_NAMES = (*NAMES, b"\xff\n", b"-n", b" ", b"\\x", b"*", "\N{SNOWMAN}".encode(), b"n" * 255)
ROUNDS = 6
STEPS = 120


class Churn:
    """Random changes of a layer, from a seed; a directory beside it is where trees come from and go to."""

    def __init__(self, root: bytes, outside: bytes, seed: int) -> None:
        self.root, self.outside = root, outside
        self.random = random.Random(seed)

    def steps(self, count: int) -> None:
        deeds = [self.write, self.write, self.replace, self.mkdir, self.tree, self.remove, self.move, self.move]
        deeds += [self.chmod, self.chown, self.symlink, self.special, self.utime, self.out, self.back, self.append]
        for _ in range(count):
            with suppress(OSError):  # names that exist, directories moved into themselves
                self.random.choice(deeds)()

    def directory(self) -> bytes:
        return self.random.choice([top for top, _, _ in os.walk(self.root)])

    def new(self) -> bytes:
        return os.path.join(self.directory(), self.random.choice(ODD_NAMES))

    def old(self) -> bytes:
        found = [os.path.join(top, name) for top, dirs, files in os.walk(self.root) for name in (*dirs, *files)]
        return self.random.choice(found or [self.root + b"/none"])

    def write(self) -> None:
        with _opened(self.new(), os.O_CREAT | os.O_TRUNC) as file:
            file.write(self.random.randbytes(self.random.randrange(5000)))

    def append(self) -> None:
        with _opened(self.old(), os.O_APPEND) as file:
            file.write(b"more")

    def replace(self) -> None:
        with open(self.root + b"/.new", "wb") as file:
            file.write(self.random.randbytes(10))
        os.rename(self.root + b"/.new", self.old())

    def mkdir(self) -> None:
        os.mkdir(self.new())

    def tree(self) -> None:
        deep = self.new() + b"/p/q"
        os.makedirs(deep)
        for number in range(3):
            with open(deep + b"/%d" % number, "wb") as file:
                file.write(b"leaf")

    def remove(self) -> None:
        path = self.old()
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)

    def move(self) -> None:
        os.rename(self.old(), self.new())

    def chmod(self) -> None:
        path = self.old()
        if not os.path.islink(path):
            os.chmod(path, self.random.choice([0o600, 0o755, 0o4755, 0o2770, 0o1777]))

    def chown(self) -> None:
        os.lchown(self.old(), self.random.randrange(3), self.random.randrange(3))

    def symlink(self) -> None:
        os.symlink(self.random.choice([b"..", b"/nowhere", b"\xff"]), self.new())

    def special(self) -> None:
        os.mkfifo(self.new())

    def utime(self) -> None:
        os.utime(self.old(), ns=(7, self.random.randrange(1 << 60)), follow_symlinks=False)

    def out(self) -> None:
        os.rename(self.old(), self.outside + b"/" + self.random.choice(ODD_NAMES))

    def back(self) -> None:
        os.rename(self.outside + b"/" + self.random.choice(ODD_NAMES), self.new())


def _opened(path: bytes, flags: int) -> BinaryIO:
    """Opened for writing; neither through a link nor waiting for the other end of a pipe."""
    return open(os.open(path, flags | os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644), "wb")


class Scene:
    """A layer with a daemon that watches it, and its mirror."""

    def __init__(self, sandbox: Sandbox, daemon: Daemon) -> None:
        self.daemon = daemon
        sandbox.overlay(b"merged", b"low", upper=b"up")
        self.layer, self.mirror = sandbox.path(b"low"), sandbox.path(b"mirror")
        self.client = Client(daemon.runtime_directory)
        self.churn = Churn(self.layer, sandbox.directory(b"outside"), seed=4)

    def command(self, *options: str) -> list[str | bytes]:
        directory = ["--runtime-directory", str(self.daemon.runtime_directory)]
        return [sys.executable, str(EXAMPLE), *directory, *options, self.layer, self.mirror]

    def update(self) -> None:
        """Run the mirror once on all that was done so far."""
        self.client.sync()
        done = subprocess.run(
            self.command(), env=environment(), capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def differences(self) -> str:
        """What rsync would do."""
        command = ["rsync", "-n", "-aHi", "--delete", self.layer + b"/", self.mirror + b"/"]
        done = subprocess.run(command, capture_output=True, check=True)
        return done.stdout.decode(errors="backslashreplace")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture
def scene(sandbox: Sandbox, daemon: Daemon, require: Require) -> Scene:
    require(shutil.which("rsync"), "rsync")
    return Scene(sandbox, daemon)


@pytest.mark.parametrize("backend", ["fanotify", "inotify"])
def test_after_any_churn_rsync_has_nothing_to_do(scene: Scene, backend: str) -> None:
    scene.daemon.configure(sources={"backend": backend})
    scene.daemon.start()
    for number in range(ROUNDS):
        scene.churn.steps(STEPS)
        scene.update()
        assert scene.differences() == "", f"round {number}"
    assert len(os.listdir(scene.layer)) > 3
    shutil.rmtree(scene.mirror + b"/")
    assert scene.differences() != ""
    scene.update()
    assert scene.differences() != "", "everything is copied only where the cursor says so"


def test_what_happened_while_the_daemon_was_away_is_mirrored_too(scene: Scene) -> None:
    scene.daemon.start()
    scene.churn.steps(STEPS)
    scene.update()
    for end in (scene.daemon.stop, scene.daemon.kill):
        end()
        scene.churn.steps(STEPS)
        scene.daemon.start()
        scene.update()
        assert scene.differences() == ""


def test_what_was_lost_in_an_overflow_is_mirrored_too(scene: Scene) -> None:
    scene.daemon.configure(sources={"backend": "fanotify", "queue": "default"})
    scene.daemon.start()
    scene.churn.steps(STEPS)
    scene.update()
    scene.daemon.pause()
    for number in range(20_000):
        os.mknod(scene.layer + b"/file%d" % number)
    scene.churn.steps(STEPS)
    scene.daemon.resume()
    scene.update()
    assert scene.differences() == ""
    assert "overflow" in {record.get("reason") for record in scene.daemon.log()}


def test_one_that_was_cut_off_anywhere_makes_up_for_it(scene: Scene) -> None:
    scene.daemon.start()
    scene.churn.steps(STEPS)
    scene.client.sync()
    for _ in range(3):
        with subprocess.Popen(scene.command(), env={**environment(), "PYTHONUNBUFFERED": "1"}) as mirror:
            while not os.path.exists(scene.mirror) and mirror.poll() is None:
                os.sched_yield()
            mirror.kill()
    scene.update()
    assert scene.differences() == ""


@pytest.fixture
def following(scene: Scene) -> Iterator[subprocess.Popen[str]]:
    scene.daemon.start()
    scene.churn.steps(STEPS)
    mirror = subprocess.Popen(scene.command("--follow"), env=environment(), stderr=subprocess.PIPE, text=True)
    yield mirror
    mirror.kill()
    mirror.communicate()


def test_one_that_follows_catches_up_by_itself_and_ends_with_the_daemon(
    scene: Scene, following: subprocess.Popen[str]
) -> None:
    for _ in range(3):
        scene.churn.steps(STEPS)
        scene.client.sync()
        last = scene.client.changes("beginning").entries
        newest = max(entry.seq for entry in last)
        while position(scene.client) < newest:
            assert following.poll() is None
            os.sched_yield()
        assert scene.differences() == ""
    scene.daemon.stop()
    _, said = following.communicate(timeout=PATIENCE_S)
    assert said.startswith("mirror: the daemon ended: it was told to stop")
    assert following.returncode == 1


def position(client: Client) -> int:
    return max((int(one.cursor.partition(":")[2]) for one in client.cursors()), default=-1)


def test_a_directory_that_is_no_layer_is_refused(scene: Scene, tmp_path: Path) -> None:
    scene.daemon.start()
    command = [*scene.command()[:-2], str(tmp_path), str(tmp_path / "mirror")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == f"mirror: {tmp_path} is no layer that watchd watches; see `watchd status`\n"
    assert not (tmp_path / "mirror").exists()
