from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from tests.conftest import Require
from watchd.overlay.build import MOUNTER_CAPABILITIES

UNIT = Path(__file__).parents[2] / "systemd" / "watchd.service"

GIVES_A_MOUNT_NAMESPACE = re.compile(
    r"^(PrivateTmp|PrivateDevices|PrivateMounts|PrivateNetwork|Protect\w+|ReadOnlyPaths|ReadWritePaths|InaccessiblePaths"
    r"|ExecPaths|NoExecPaths|TemporaryFileSystem|Bind\w*Paths|RootDirectory|RootImage|MountFlags|DynamicUser)=",
    re.MULTILINE,
)


def test_systemd_understands_every_line_of_the_unit(require: Require, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    require(analyze, "systemd-analyze, Debian package systemd")
    (tmp_path / "watchd").write_text("#!/bin/sh\n")
    (tmp_path / "watchd").chmod(0o755)
    unit = tmp_path / "watchd.service"
    unit.write_text(UNIT.read_text().replace("@BINDIR@", str(tmp_path)))
    command = [str(analyze), "verify", "--man=no", "--recursive-errors=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    about_this_unit = [line for line in done.stderr.splitlines() if "watchd" in line]
    assert (done.returncode, about_this_unit) == (0, [])


def test_the_unit_does_not_hide_the_mounts_of_the_host() -> None:
    assert GIVES_A_MOUNT_NAMESPACE.search(UNIT.read_text()) is None


def test_the_unit_may_mount_overlays_that_copy_up_everything() -> None:
    granted = re.findall(r"^CapabilityBoundingSet=(.+)$", UNIT.read_text(), re.MULTILINE)
    assert {*MOUNTER_CAPABILITIES} <= {*" ".join(granted).split()}
