"""Filesystems on loop devices, each made once in a test run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kernel.sandbox import mount, umount

_MIB = 1 << 20
_MAKERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ext4": (16 * _MIB, ("mkfs.ext4", "-q")),
    "xfs": (300 * _MIB, ("mkfs.xfs", "-q")),
    "btrfs": (128 * _MIB, ("mkfs.btrfs", "-q")),
}
"""Size (the files are sparse) and command."""

_PACKERS = {
    "squashfs": ("mksquashfs", "{content}", "{image}", "-quiet", "-no-progress"),
    "erofs": ("mkfs.erofs", "{image}", "{content}"),
}

WRITABLE = ("tmpfs", *_MAKERS)
READ_ONLY = tuple(_PACKERS)


def has_tools_for(fstype: str) -> bool:
    """Whether this host can make such filesystems."""
    if fstype == "tmpfs":
        return True
    tool = _PACKERS[fstype][0] if fstype in _PACKERS else _MAKERS[fstype][1][0]
    return shutil.which(tool) is not None


class Images:
    """Images in a directory of their own, and mounts of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _writable(self, fstype: str) -> Path:
        size_bytes, command = _MAKERS[fstype]
        pristine, image = self._directory / f"{fstype}.new", self._directory / fstype
        if not pristine.exists():
            with pristine.open("wb") as file:
                file.truncate(size_bytes)
            subprocess.run([*command, str(pristine)], check=True, capture_output=True)
        subprocess.run(["cp", "--sparse=always", str(pristine), str(image)], check=True)
        return image

    def _read_only(self, fstype: str, content: Path) -> Path:
        image = self._directory / fstype
        image.unlink(missing_ok=True)
        command = [word.format(content=content, image=image) for word in _PACKERS[fstype]]
        subprocess.run(command, check=True, capture_output=True)
        return image

    @contextmanager
    def mounted(self, fstype: str, at: Path, *, content: Path | None = None) -> Iterator[Path]:
        """A filesystem at the directory `at`: fresh or, where it cannot be written, with a copy of `content`."""
        target = os.fsencode(at)
        if fstype == "tmpfs":
            mount(b"tmpfs", target, b"tmpfs")
        else:
            image = self._writable(fstype) if content is None else self._read_only(fstype, content)
            # mount(8) detaches its loop device at umount by itself.
            subprocess.run(["mount", "-t", fstype, "-o", "loop", str(image), str(at)], check=True)
        try:
            yield at
        finally:
            umount(target)
