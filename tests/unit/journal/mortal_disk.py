"""A disk whose user is killed at a step of one's choice."""

from __future__ import annotations

import os
from pathlib import Path

from watchd.journal.disk import File, RealDisk


class KilledError(BaseException):
    """Nothing in watchd catches it, as nothing catches SIGKILL."""


class MortalDisk(RealDisk):
    """Kills before its so many-th use; of a file that is opened for writing last, a part gets written."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def _step(self) -> None:
        if not self.steps:
            raise KilledError
        self.steps -= 1

    def open(self, path: Path, flags: int) -> File:
        self._step()
        file = super().open(path, flags)
        if flags & os.O_CREAT and flags & os.O_WRONLY and not self.steps:
            with file:
                file.pwrite(b"half", 0)
            raise KilledError
        return file

    def rename(self, old: Path, new: Path) -> None:
        self._step()
        super().rename(old, new)

    def unlink(self, path: Path) -> None:
        self._step()
        super().unlink(path)

    def sync_directory(self, path: Path) -> None:
        self._step()
        super().sync_directory(path)
