from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Require
from watchd.errors import NotPermittedError, UnsupportedError, UsageError, WatchdError
from watchd.service import preflight


@pytest.fixture
def privileged(require: Require) -> None:
    require(os.geteuid() == 0, "root")


def run_without(capability: int) -> str:
    """What a process says that lacks a capability (dropped from the bounding set before it is executed)."""
    program = "from watchd.service.preflight import check_capabilities as check\ntry: check()\nexcept Exception as e: print(e)"
    command = ["setpriv", f"--bounding-set=-cap_{capability}", sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def test_root_has_what_is_needed(privileged: None) -> None:
    preflight.check_capabilities()
    preflight.check_kernel()


@pytest.mark.parametrize(("name", "number"), preflight.CAPABILITIES.items())
def test_a_missing_capability_is_named(privileged: None, name: str, number: int) -> None:
    assert run_without(number) == f"watchd needs {name}; run it as root"


def test_a_kernel_that_cannot_reconfigure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fspick(dirfd: int) -> int:
        raise OSError(errno.ENOSYS, "fspick: Function not implemented")

    monkeypatch.setattr(preflight, "fspick", fspick)
    with pytest.raises(UnsupportedError, match=r"no fspick\(2\).*use Linux 5.2"):
        preflight.check_kernel()


def test_directories_are_made_with_their_parents(tmp_path: Path) -> None:
    path = tmp_path / "a/b"
    for _ in range(2):
        preflight.make_directory(path, key="state_directory", mode=0o700)
    assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("below", [".", "below"])
def test_a_file_in_the_place_of_a_directory_is_told_with_the_key_to_change(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        WatchdError, match=r"^state_directory .*/file.* cannot be used: .*set state_directory to another"
    ):
        preflight.make_directory(tmp_path / "file" / below, key="state_directory", mode=0o700)


def test_a_directory_that_must_not_be_written_is_not_permitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(NotPermittedError, match="Permission denied"):
        preflight.make_directory(tmp_path, key="state_directory", mode=0o700)


# ---- one daemon for each runtime directory --------------------------------------------------------------------------


def test_a_second_instance_is_told_who_is_there(tmp_path: Path) -> None:
    lock = preflight.lock_runtime(tmp_path)
    try:
        with pytest.raises(UsageError, match=f"runs already in {tmp_path}, process {os.getpid()}; stop it"):
            preflight.lock_runtime(tmp_path)
    finally:
        os.close(lock)
    os.close(preflight.lock_runtime(tmp_path))


def test_a_lock_that_is_left_behind_keeps_nobody_out(tmp_path: Path) -> None:
    (tmp_path / preflight.LOCK_NAME).write_text("99999999999999999999\nrubbish")
    lock = preflight.lock_runtime(tmp_path)
    assert (tmp_path / preflight.LOCK_NAME).read_text() == f"{os.getpid()}\n"
    os.close(lock)


def test_the_lock_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / preflight.LOCK_NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        preflight.lock_runtime(tmp_path)
    assert (tmp_path / "precious").read_text() == "precious"


def test_leftover_barriers_are_cleared_away(tmp_path: Path) -> None:
    for _ in range(2):
        path = preflight.barrier_directory(tmp_path)
        assert list(path.iterdir()) == []
        (path / "1").touch()


@pytest.fixture
def limits_restored() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_all_descriptors_that_we_may_have_are_used(limits_restored: None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    preflight.raise_limits()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
