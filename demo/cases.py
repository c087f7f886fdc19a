"""The ways in which a lower layer changes below a mounted overlay.

The kernel caches what it once looked up through the overlay and never asks the lower layer again. So every case is played
like this:

    arrange    fills the layers before the overlay is mounted
    look       says in a few words what the merged view shows; looking is also what makes the kernel cache it
    change     changes the lower layer, not through the overlay
    look       should say `after` now; what it really says, the table shows

Facts: a look that is under way holds on to what it looks at, and what is held is not dropped from the cache. A look at a
file takes microseconds, but a program that runs holds its own file, so it is looked at less often.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from demo.stage import Stage

NOBODY = 65534
GONE = "no such file"


@dataclass(frozen=True)
class Case:
    """One way of changing a lower layer."""

    name: str
    arrange: Callable[[Stage], object]
    change: Callable[[Stage], object]
    look: Callable[[Stage], str]
    before: str
    """What `look` says before the change."""
    after: str
    """The truth once the lower layer has changed."""
    look_every_s: float = 0.0005
    pin: Callable[[Stage], AbstractContextManager[object]] | None = None
    """Holds on to what is changed; the kernel drops nothing that is held."""

    def says(self, stage: Stage) -> str:
        """What the merged view says now; the error, if looking is one."""
        try:
            return self.look(stage)
        except FileNotFoundError:
            return GONE
        except OSError as error:
            return error.strerror or str(error)


# ---- looking through the merged view --------------------------------------------------------------------------------


def content(path: Path) -> str:
    """What is written in a file."""
    return path.read_text()


def names(directory: Path) -> str:
    """What a directory lists."""
    return " ".join(sorted(os.listdir(directory))) or "nothing"


def kind(path: Path) -> str:
    """What a name stands for."""
    return "a directory" if path.is_dir() else "a file"


def as_nobody(look: Callable[[], str]) -> str:
    """What somebody without any privilege sees, asked in a child process."""

    def look_unprivileged() -> str:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return look()

    return as_next_process(look_unprivileged)


def as_next_process(look: Callable[[], str]) -> str:
    """What a process sees that begins now."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, look().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said


def readable(path: Path) -> str:
    """Whether a file may be read by whoever asks."""
    return "may be read" if os.access(path, os.R_OK) else "permission denied"


def user_of(program: Path) -> str:
    """As whom a copy of id(1) runs."""
    done = subprocess.run([program, "-u"], capture_output=True, text=True, check=False)
    return f"runs as uid {done.stdout.strip()}"


# ---- changing the lower layer ---------------------------------------------------------------------------------------


def replace(path: Path) -> None:
    """Put a new file in the place of an old one, the way of editors and package managers."""
    new = path.with_name(".new")
    new.write_text("new")
    new.rename(path)


def recreate(directory: Path) -> None:
    """rm -r, mkdir, and another file in it."""
    shutil.rmtree(directory)
    fill(directory, "b")


def turn_into_directory(path: Path) -> None:
    """A file goes, and a directory takes its name."""
    path.unlink()
    path.mkdir()


def relink(link: Path, target: str) -> None:
    """ln -sfn"""
    new = link.with_name(".new")
    new.symlink_to(target)
    new.rename(link)


# ---- arranging the layers -------------------------------------------------------------------------------------------


def write(path: Path) -> None:
    """A file with old content, and the directory for it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("old")


def fill(directory: Path, *files: str) -> None:
    """A directory with these files."""
    directory.mkdir()
    for name in files:
        (directory / name).touch()


def install_setuid(program: Path) -> None:
    """id(1), to be run as root by everybody."""
    shutil.copy(shutil.which("id") or "/usr/bin/id", program)
    program.chmod(0o4755)


def put_upper_beside_lower(stage: Stage) -> None:
    """A directory to which each layer gives a file."""
    fill(stage.lower / "d", "theirs")
    fill(stage.upper / "d", "mine")


def put_in_second(stage: Stage) -> None:
    """A directory that both lowers have, with a file of the second one."""
    fill(stage.lower / "d")
    write(stage.second / "d" / "f")


# ---- holding on -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listed(directory: Path) -> Iterator[None]:
    """The directory open, and read: what it listed then it goes on to list, for everybody."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.listdir(descriptor)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def mapped(library: Path) -> Iterator[None]:
    """The file mapped to be executed, as every process that uses a shared library has it."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC):
        file.close()
        yield


@contextlib.contextmanager
def working_in(directory: Path) -> Iterator[None]:
    """A process that has the directory as its working directory."""
    process = subprocess.Popen(["sleep", "60"], cwd=directory)
    try:
        yield
    finally:
        process.kill()
        process.wait()


LATIN1 = os.fsdecode(b"caf\xe9")
"""A name that is not UTF-8."""

CASES = (
    Case(
        "a file looked up in vain appears",
        arrange=lambda stage: None,
        look=lambda stage: content(stage.merged / "f"),
        before=GONE,
        change=lambda stage: (stage.lower / "f").write_text("new"),
        after="new",
    ),
    Case(
        "a file is removed",
        arrange=lambda stage: write(stage.lower / "f"),
        look=lambda stage: content(stage.merged / "f"),
        before="old",
        change=lambda stage: (stage.lower / "f").unlink(),
        after=GONE,
    ),
    Case(
        "a file is replaced by rename",
        arrange=lambda stage: write(stage.lower / "f"),
        look=lambda stage: content(stage.merged / "f"),
        before="old",
        change=lambda stage: replace(stage.lower / "f"),
        after="new",
    ),
    Case(
        "a directory is made anew",
        arrange=lambda stage: fill(stage.lower / "d", "a"),
        look=lambda stage: names(stage.merged / "d"),
        before="a",
        change=lambda stage: recreate(stage.lower / "d"),
        after="b",
    ),
    Case(
        "a file becomes a directory",
        arrange=lambda stage: write(stage.lower / "x"),
        look=lambda stage: kind(stage.merged / "x"),
        before="a file",
        change=lambda stage: turn_into_directory(stage.lower / "x"),
        after="a directory",
    ),
    Case(
        "a directory is renamed",
        arrange=lambda stage: write(stage.lower / "here" / "f"),
        look=lambda stage: " and ".join(name for name in ("here", "there") if (stage.merged / name).is_dir()),
        before="here",
        change=lambda stage: (stage.lower / "here").rename(stage.lower / "there"),
        after="there",
    ),
    Case(
        "a symbolic link is replaced",
        arrange=lambda stage: (stage.lower / "l").symlink_to("one"),
        look=lambda stage: os.readlink(stage.merged / "l"),
        before="one",
        change=lambda stage: relink(stage.lower / "l", "two"),
        after="two",
    ),
    Case(
        "a file is written in place",
        arrange=lambda stage: write(stage.lower / "f"),
        look=lambda stage: content(stage.merged / "f"),
        before="old",
        change=lambda stage: (stage.lower / "f").write_text("new"),
        after="new",
    ),
    Case(
        "chmod 600, somebody else reads",
        arrange=lambda stage: write(stage.lower / "f"),
        look=lambda stage: as_nobody(lambda: readable(stage.merged / "f")),
        before="may be read",
        change=lambda stage: (stage.lower / "f").chmod(0o600),
        after="permission denied",
    ),
    Case(
        "chmod u-s of a setuid program",
        arrange=lambda stage: install_setuid(stage.lower / "id"),
        look=lambda stage: as_nobody(lambda: user_of(stage.merged / "id")),
        before="runs as uid 0",
        change=lambda stage: (stage.lower / "id").chmod(0o755),
        after=f"runs as uid {NOBODY}",
        look_every_s=0.05,
    ),
    Case(
        "a directory with upper files goes",
        arrange=put_upper_beside_lower,
        look=lambda stage: names(stage.merged / "d"),
        before="mine theirs",
        change=lambda stage: shutil.rmtree(stage.lower / "d"),
        after="mine",
    ),
    Case(
        "replaced in the second lower",
        arrange=put_in_second,
        look=lambda stage: content(stage.merged / "d" / "f"),
        before="old",
        change=lambda stage: replace(stage.second / "d" / "f"),
        after="new",
    ),
    Case(
        "replaced, its name is not UTF-8",
        arrange=lambda stage: write(stage.lower / LATIN1),
        look=lambda stage: content(stage.merged / LATIN1),
        before="old",
        change=lambda stage: replace(stage.lower / LATIN1),
        after="new",
    ),
    Case(
        "replaced while it is open",
        arrange=lambda stage: write(stage.lower / "f"),
        look=lambda stage: content(stage.merged / "f"),
        before="old",
        change=lambda stage: replace(stage.lower / "f"),
        after="new",
        pin=lambda stage: (stage.merged / "f").open(),
    ),
    Case(
        "made anew while somebody is in it",
        arrange=lambda stage: fill(stage.lower / "d", "a"),
        look=lambda stage: names(stage.merged / "d"),
        before="a",
        change=lambda stage: recreate(stage.lower / "d"),
        after="b",
        pin=lambda stage: working_in(stage.merged / "d"),
    ),
    Case(
        "a library is replaced while it is mapped",
        arrange=lambda stage: write(stage.lower / "lib.so"),
        look=lambda stage: as_next_process(lambda: content(stage.merged / "lib.so")),
        before="old",
        change=lambda stage: replace(stage.lower / "lib.so"),
        after="new",
        look_every_s=0.01,
        pin=lambda stage: mapped(stage.merged / "lib.so"),
    ),
    Case(
        "a file appears in a listing held open",
        arrange=put_upper_beside_lower,
        look=lambda stage: names(stage.merged / "d"),
        before="mine theirs",
        change=lambda stage: (stage.lower / "d" / "new").touch(),
        after="mine new theirs",
        pin=lambda stage: listed(stage.merged / "d"),
    ),
)
