"""Somebody else on the host mounts and unmounts all the time, which makes lockless lookups miss what is cached."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.kernel.accidents import replace, write
from tests.kernel.running import REPOSITORY, Daemon
from tests.kernel.sandbox import Sandbox

ROUNDS = 300
STORM = """
import os
from watchd.kernel.mounts import open_tree_clone
print(flush=True)
while True:
    os.close(open_tree_clone(-100, b"/"))
"""


@pytest.fixture
def storm(sandbox: Sandbox) -> Iterator[None]:
    """A process that makes and drops mounts as fast as it can."""
    with subprocess.Popen([sys.executable, "-c", STORM], cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


@pytest.mark.usefixtures("storm")
def test_nothing_stale_is_taken_for_uncached(sandbox: Sandbox, daemon: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    write(sandbox.path(b"low/file"), b"first")
    daemon.start()
    for number in range(ROUNDS):
        with open(merged + b"/file", "rb") as file:
            file.read()
        replace(sandbox.path(b"low/file"), b"%d" % number)
        daemon.sync(merged)
        with open(merged + b"/file", "rb") as file:
            assert file.read() == b"%d" % number
