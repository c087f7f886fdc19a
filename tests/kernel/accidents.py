"""What happens to a lower layer while it is mounted: a tree to happen to, and the accidents.

All of it takes place in one directory of a layer, `d`; others beside it do not get in each other's way. `outside` is beside
the layer, on the same filesystem.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

NOT_UTF8 = b"n\xe4me"
STRANGERS_PROGRAM = b"program"


@dataclass(frozen=True)
class Accident:
    """One change of a lower layer."""

    happen: Callable[[bytes], None]
    """Is told the path of `d`."""
    missing: tuple[bytes, ...] = ()
    """Names in `d` that somebody looked for before they were there."""
    makes_stale: bool = True
    """Whether a merged mount that has cached everything would be wrong from now on without watchd."""


def populate(layer: bytes, directory: bytes = b"d", *, with_program: bool = True) -> None:
    """The tree before the accident."""
    d = layer + b"/" + directory
    for path in (layer, d, d + b"/dir", d + b"/dir/sub", d + b"/empty"):
        os.makedirs(path, exist_ok=True)
        os.chmod(path, 0o755)
    for name in (b"file", b"second", b"dir/a", b"dir/b", b"dir/sub/leaf", NOT_UTF8):
        write(d + b"/" + name, b"old " + name)
    write(d + b"/secret", b"not yet for everybody", mode=0o600)
    os.symlink(b"file", d + b"/link")
    if with_program:
        program = d + b"/" + STRANGERS_PROGRAM
        shutil.copyfile(os.fsencode(shutil.which("id") or "/usr/bin/id"), program)
        os.chmod(program, 0o4755)
    os.makedirs(outside(d) + b"/tree/deep", exist_ok=True)
    write(outside(d) + b"/tree/deep/leaf", b"from outside")


def outside(d: bytes) -> bytes:
    """Beside the layer."""
    return os.path.dirname(d) + b".outside/" + os.path.basename(d)


def write(path: bytes, content: bytes, *, mode: int = 0o644) -> None:
    """A file with this content, made or written in place."""
    with open(path, "wb") as file:
        file.write(content)
    os.chmod(path, mode)


def replace(path: bytes, content: bytes) -> None:
    """As editors and package managers do it."""
    write(path + b".tmp", content)
    os.rename(path + b".tmp", path)


def _recreate(d: bytes) -> None:
    shutil.rmtree(d + b"/dir")
    os.mkdir(d + b"/dir")
    write(d + b"/dir/fresh", b"fresh")


def _file_to_directory(d: bytes) -> None:
    os.unlink(d + b"/file")
    os.mkdir(d + b"/file")
    write(d + b"/file/inside", b"inside")


def _directory_to_file(d: bytes) -> None:
    shutil.rmtree(d + b"/dir")
    write(d + b"/dir", b"a file now")


def _swap_symlink(d: bytes) -> None:
    os.symlink(b"second", d + b"/link.tmp")
    os.rename(d + b"/link.tmp", d + b"/link")


def _exchange(d: bytes) -> None:
    os.rename(d + b"/file", d + b"/third")
    os.rename(d + b"/second", d + b"/file")
    os.rename(d + b"/third", d + b"/second")


def _new_tree(d: bytes) -> None:
    os.makedirs(d + b"/new/x/y")
    write(d + b"/new/x/y/z", b"deep")


def _append(d: bytes) -> None:
    with open(d + b"/file", "ab") as file:
        file.write(b" and more")
    os.truncate(d + b"/second", 2)


def _replace_all(d: bytes) -> None:
    for name in (b"file", b"second", b"dir/a", b"dir/b", b"dir/sub/leaf"):
        replace(d + b"/" + name, b"upgraded " + name)


def _rename_above(d: bytes) -> None:
    os.rename(d, d + b".moved")
    os.mkdir(d)
    write(d + b"/file", b"another d")


ACCIDENTS: dict[str, Accident] = {
    "a new name that somebody looked for": Accident(lambda d: write(d + b"/new", b"new"), (b"new",)),
    "a new name that nobody looked for": Accident(lambda d: write(d + b"/never", b"new"), makes_stale=False),
    "a new tree that somebody looked for": Accident(_new_tree, (b"new", b"new/x", b"new/x/y/z")),
    "a hard link": Accident(lambda d: os.link(d + b"/file", d + b"/again"), (b"again",)),
    "unlink": Accident(lambda d: os.unlink(d + b"/file")),
    "replace by rename": Accident(lambda d: replace(d + b"/file", b"new content")),
    "an upgrade of everything": Accident(_replace_all),
    "two files exchanged": Accident(_exchange),
    "rename of a file": Accident(lambda d: os.rename(d + b"/file", d + b"/moved"), (b"moved",)),
    "rename of a directory": Accident(lambda d: os.rename(d + b"/dir", d + b"/moved"), (b"moved", b"moved/a")),
    "rename of a directory over an empty one": Accident(lambda d: os.rename(d + b"/dir", d + b"/empty")),
    "rename of the directory above": Accident(_rename_above),
    "recreated directory": Accident(_recreate, (b"dir/fresh",)),
    "removed directory": Accident(lambda d: shutil.rmtree(d + b"/dir")),
    "file turned directory": Accident(_file_to_directory),
    "directory turned file": Accident(_directory_to_file),
    "swapped symlink": Accident(_swap_symlink),
    "chmod 600": Accident(lambda d: os.chmod(d + b"/file", 0o600)),
    "chmod 644 of a secret": Accident(lambda d: os.chmod(d + b"/secret", 0o644)),
    "chmod 700 of a directory": Accident(lambda d: os.chmod(d + b"/dir", 0o700)),
    "chown": Accident(lambda d: os.chown(d + b"/secret", 12345, 12345)),
    "chmod u-s": Accident(lambda d: os.chmod(d + b"/" + STRANGERS_PROGRAM, 0o755)),
    "a name that is not UTF-8": Accident(lambda d: replace(d + b"/" + NOT_UTF8, b"new content")),
    "a new name that is not UTF-8": Accident(lambda d: write(d + b"/\xff", b"new"), (b"\xff",)),
    "moved out of the layer": Accident(lambda d: os.rename(d + b"/dir", outside(d) + b"/dir")),
    "moved into the layer": Accident(
        lambda d: os.rename(outside(d) + b"/tree", d + b"/tree"), (b"tree", b"tree/deep/leaf")
    ),
    "written in place": Accident(_append, makes_stale=False),
}
