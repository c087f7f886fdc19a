"""What docs/client.md shows is run for real, so that it stays true."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.kernel.running import PATIENCE_S, REPOSITORY, Daemon
from tests.kernel.sandbox import Sandbox

PAGE = (REPOSITORY / "docs/client.md").read_text(encoding="utf-8")
PLACE = "/run/watchd"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def watched(sandbox: Sandbox, daemon: Daemon) -> Daemon:
    """A daemon that has journalled something."""
    sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    with open(sandbox.path(b"low/file"), "wb"):
        pass
    assert daemon.sync() == []
    return daemon


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_every_program_of_the_page_runs(watched: Daemon, number: int) -> None:
    program = blocks("python")[number].replace("Client()", f"Client({str(watched.runtime_directory)!r})")
    done = run([sys.executable, "-W", "error", "-c", program])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout or "set_cursor" in program


def test_the_session_of_the_page_is_what_really_happens(watched: Daemon) -> None:
    [session] = blocks("console")
    command, _, shown = session.removeprefix("# ").rpartition(f"{PLACE}/watchd.sock\n")
    done = run(["sh", "-c", f"{command}{shlex.quote(f'{watched.runtime_directory}/watchd.sock')}"])
    assert (done.stdout.strip(), done.stderr) == (shown.strip(), "")


def test_the_page_has_every_verb_of_the_socket(watched: Daemon) -> None:
    source = (REPOSITORY / "watchd/service/daemon.py").read_text(encoding="utf-8")
    served = set(re.findall(r'^ +"(\w+)": self\._(?:\w+\.)?\w+,$', source, re.MULTILINE)) | {"follow"}
    assert len(served) > 6
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == served - {"reload"}


def test_no_link_of_the_page_leads_nowhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE)
    assert links
    assert [link for link in links if not (REPOSITORY / "docs" / link).exists()] == []
