"""Where a case is played: an overlay of its own, on a tmpfs of the demo's, in a mount namespace that ends with the demo."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from watchd.errors import NotPermittedError, UnsupportedError
from watchd.kernel.namespaces import CLONE_NEWNS, unshare


@dataclass(frozen=True)
class Stage:
    """The directories of one overlay; `lower` lies above `second`."""

    root: Path

    @property
    def lower(self) -> Path:
        """The first lower layer: what a case changes behind the overlay's back."""
        return self.root / "lower"

    @property
    def second(self) -> Path:
        """The lower layer below that one."""
        return self.root / "second"

    @property
    def upper(self) -> Path:
        """Where the overlay keeps what was written through it."""
        return self.root / "upper"

    @property
    def merged(self) -> Path:
        """The mount point: what users of the overlay see."""
        return self.root / "merged"

    def make_directories(self) -> None:
        """Make the layers, all empty."""
        for path in (self.lower, self.second, self.upper, self.merged, self.root / "work"):
            path.mkdir(parents=True)

    def mount(self) -> None:
        """Mount the overlay. Raises UnsupportedError."""
        layers = f"lowerdir={self.lower}:{self.second},upperdir={self.upper},workdir={self.root / 'work'}"
        try:
            _run("mount", "-t", "overlay", "watchd-demo", "-o", layers, str(self.merged))
        except subprocess.CalledProcessError as error:
            words = " ".join(error.stderr.split())
            raise UnsupportedError(
                f"no overlay can be mounted here ({words})", remedy="use a kernel that has overlayfs: modprobe overlay"
            ) from None


@contextlib.contextmanager
def theatre() -> Iterator[Path]:
    """A directory to build stages in, seen by this process and its children only. Raises NotPermittedError."""
    if os.geteuid() != 0:
        raise NotPermittedError("the demo mounts file systems", remedy="run it as root: sudo make demo")
    try:
        unshare(CLONE_NEWNS)
        _run("mount", "--make-rprivate", "/")
        directory = Path(tempfile.mkdtemp(prefix="watchd-demo-", dir="/tmp"))
    except (OSError, subprocess.CalledProcessError):
        raise NotPermittedError(
            "root may not mount here (it lacks CAP_SYS_ADMIN)", remedy="run the demo outside of this container"
        ) from None
    try:
        _run("mount", "-t", "tmpfs", "-o", "mode=755", "watchd-demo", str(directory))
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", "--quiet", directory], check=False)  # with all that is mounted below
        directory.rmdir()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
