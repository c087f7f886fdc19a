"""Overlays to put accidents to: where the layer that changes stands in the stack, and on which filesystem it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.kernel.accidents import write
from tests.kernel.matrix import Overlay
from tests.kernel.sandbox import Sandbox, mount, umount

_MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-m", "0"),
    "xfs": ("mkfs.xfs", "-q"),
    "btrfs": ("mkfs.btrfs", "-q"),
}
_IMAGE_BYTES = 512 << 20
"""The file is sparse; mkfs.xfs makes nothing smaller than 300 MB."""


def is_makeable(fstype: str) -> bool:
    """Whether this host has the tool to make such a filesystem."""
    return shutil.which("mksquashfs" if fstype == "squashfs" else _MKFS[fstype][0]) is not None


class Image:
    """A filesystem in a file, on a loop device, mounted."""

    def __init__(self, home: Path, fstype: str) -> None:
        file = home / f"{fstype}.image"
        if fstype == "squashfs":
            populate_other(os.fsencode(home / "tree"), shadowing=True)
            _run("mksquashfs", home / "tree", file, "-quiet", "-no-progress", "-noI", "-noD", "-noF", "-noX")
        else:
            with file.open("wb") as blank:
                blank.truncate(_IMAGE_BYTES)
            _run(*_MKFS[fstype], file)
        self.device = _run("losetup", "--find", "--show", file)
        self.path = os.fsencode(home / "mnt")
        os.makedirs(self.path)
        mount(os.fsencode(self.device), self.path, fstype.encode(), flags=1 if fstype == "squashfs" else 0)

    def close(self) -> None:
        """Take the mount away, then the device."""
        umount(self.path)
        detach(self.device)


def detach(device: str) -> None:
    """losetup -d. The kernel puts it off while somebody has the device or its filesystem open, so see that it is gone."""
    _run("losetup", "--detach", device)
    deadline = time.monotonic() + 10
    while Path("/sys/block", Path(device).name, "loop/backing_file").exists():
        assert time.monotonic() < deadline, f"{device} stays in use"
        os.sched_yield()


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.strip()


@dataclass(frozen=True)
class Stack:
    """Overlays over one layer that changes; the last one is the one that is looked at first and asked to be synced."""

    changing: bytes
    overlays: Sequence[Overlay]


def populate_other(layer: bytes, *, shadowing: bool) -> None:
    """Another lower with a `d`, of which nothing changes; with `shadowing` it has some of the names of the one that does."""
    os.makedirs(layer + b"/d/dir", exist_ok=True)
    write(layer + b"/d/elsewhere", b"of the other layer")
    write(layer + b"/d/dir/elsewhere", b"of the other layer")
    if shadowing:
        write(layer + b"/d/file", b"the other layer's")
        write(layer + b"/d/dir/a", b"the other layer's")


def _upper(sandbox: Sandbox, *, merged: bool = False) -> bytes:
    if merged:
        os.makedirs(sandbox.path(b"up/d/dir"))
        write(sandbox.path(b"up/d/of-upper"), b"upper")
        write(sandbox.path(b"up/d/dir/of-upper"), b"upper")
    return b"up"


def _overlay(sandbox: Sandbox, *lowers: bytes, upper: bytes | None) -> Overlay:
    """`lowers` are paths."""
    options = [(b"lowerdir+", lower) for lower in lowers]
    layers = list(lowers)
    if upper is not None:
        options += [(b"upperdir", sandbox.directory(upper)), (b"workdir", sandbox.directory(upper + b".work"))]
        layers.insert(0, sandbox.path(upper))
    return Overlay(sandbox.mount_overlay(b"merged" + (upper or b""), options), layers)


def _lower_only(sandbox: Sandbox, changing: bytes) -> Stack:
    return Stack(changing, [_overlay(sandbox, changing, upper=_upper(sandbox))])


def _merged_with_upper(sandbox: Sandbox, changing: bytes) -> Stack:
    return Stack(changing, [_overlay(sandbox, changing, upper=_upper(sandbox, merged=True))])


def two_lowers(sandbox: Sandbox, changing: bytes, other: bytes) -> Stack:
    """A lower over one that stays as it is, and an upper."""
    return Stack(changing, [_overlay(sandbox, changing, other, upper=_upper(sandbox))])


def _first_without_upper(sandbox: Sandbox, changing: bytes) -> Stack:
    populate_other(sandbox.path(b"other"), shadowing=True)
    return Stack(changing, [_overlay(sandbox, changing, sandbox.path(b"other"), upper=None)])


def _first_of_two(sandbox: Sandbox, changing: bytes) -> Stack:
    populate_other(sandbox.path(b"other"), shadowing=True)
    return two_lowers(sandbox, changing, sandbox.path(b"other"))


def _second_of_two(sandbox: Sandbox, changing: bytes) -> Stack:
    populate_other(sandbox.path(b"other"), shadowing=False)
    return Stack(changing, [_overlay(sandbox, sandbox.path(b"other"), changing, upper=_upper(sandbox))])


def _nested(sandbox: Sandbox, changing: bytes) -> Stack:
    inner = _overlay(sandbox, changing, upper=_upper(sandbox))
    return Stack(changing, [inner, _overlay(sandbox, inner.merged, upper=b"outer")])


LAYOUTS: dict[str, Callable[[Sandbox, bytes], Stack]] = {
    "lower only": _lower_only,
    "merged with upper": _merged_with_upper,
    "first of two, no upper": _first_without_upper,
    "first of two": _first_of_two,
    "second of two": _second_of_two,
    "nested": _nested,
}
