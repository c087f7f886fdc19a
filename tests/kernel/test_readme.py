"""What the README shows is run for real, so that it stays true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from demo.daemon import Daemon
from tests.kernel.sandbox import Sandbox

README = Path(__file__).parents[2] / "README.md"
PROMPT = "# "


def transcripts() -> list[str]:
    """The terminal sessions that the README shows."""
    return re.findall(r"^```console\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def replay(transcript: str, *, directory: Path, environment: dict[str, str]) -> str:
    """The same session with what its commands print here and now."""
    lines = []
    for line in transcript.splitlines(keepends=True):
        if line.startswith(PROMPT):
            command = line.removeprefix(PROMPT)
            done = subprocess.run(
                command, shell=True, cwd=directory, env=environment, text=True, check=False,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            lines += [line, done.stdout]
    return "".join(lines)


def test_the_readme_shows_what_really_happens(sandbox: Sandbox) -> None:
    directory, binaries, state = (Path(os.fsdecode(sandbox.directory(name))) for name in (b"home", b"bin", b"state"))
    (binaries / "watchd").write_text(f'#!/bin/sh\nexec {sys.executable} -m watchd "$@"\n')
    (binaries / "watchd").chmod(0o755)
    config = state / "daemon" / "watchd.yaml"
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": str(README.parent),
        "WATCHD_CONFIG": str(config),
    }
    without, with_watchd = transcripts()
    assert replay(without, directory=directory, environment=environment) == without
    try:
        with Daemon(config.parent, mounts=directory, ladders=state / "none"):
            assert replay(with_watchd, directory=directory, environment=environment) == with_watchd
    finally:
        subprocess.run(["umount", directory / "merged"], check=True)
