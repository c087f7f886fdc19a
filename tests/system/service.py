"""watchd as a unit of a guest that has booted, an overlay for it to look after, and ways to be unkind to it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.system.booted import REPOSITORY, Booted
from watchd import client

_GATE = "/run/watchd-gate"
_DROP_IN = f"""[Unit]
StartLimitIntervalSec=0
[Service]
ExecStartPre=/bin/sh -c 'test ! -p {_GATE} || read line <{_GATE}'
"""
_PROGRAM = f"""#!/bin/sh
export PYTHONPATH='{REPOSITORY}' PYTHONDONTWRITEBYTECODE=1
exec '{sys.executable}' -W always::ResourceWarning -m watchd "$@"
"""
PATIENCE_S = 30.0

Json = dict[str, Any]


class Service:
    """`watchd.service` as the checkout has it."""

    def __init__(self, guest: Booted) -> None:
        self.guest = guest
        program = guest.path("/opt/bin/watchd")
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(_PROGRAM)
        program.chmod(0o755)
        units = guest.path("/etc/systemd/system")
        unit = (REPOSITORY / "systemd/watchd.service").read_text()
        (units / "watchd.service").write_text(unit.replace("@BINDIR@", "/opt/bin"))
        (units / "watchd.service.d").mkdir(exist_ok=True)
        (units / "watchd.service.d/test.conf").write_text(_DROP_IN)
        guest.systemctl("daemon-reload")
        guest.run("mkdir", "/srv/place")
        guest.run("mount", "-t", "tmpfs", "none", "/srv/place")
        guest.run("mkdir", "/srv/place/low", "/srv/place/up", "/srv/place/work", "/srv/place/merged")
        self.low, self.merged = guest.path("/srv/place/low"), guest.path("/srv/place/merged")
        self.outside = guest.path("/srv/place")
        """On the lower's filesystem, and in no layer."""
        self.configure()

    def configure(self, **sources: Any) -> None:
        """Write the configuration, with these settings of its sources."""
        settings = {"discovery": {"include": ["/srv/*"]}, "metrics": {"listen": "off"}, "sources": sources}
        self.guest.path("/etc/watchd/watchd.yaml").write_text(json.dumps(settings))

    def mount(self) -> None:
        """The overlay that it is to look after."""
        options = "lowerdir=/srv/place/low,upperdir=/srv/place/up,workdir=/srv/place/work"
        self.guest.run("mount", "-t", "overlay", "none", "-o", options, "/srv/place/merged")

    def start(self) -> None:
        """Returns when it says that it is ready."""
        self.guest.systemctl("start", "watchd")

    def restart(self) -> None:
        """In good order."""
        self.guest.systemctl("restart", "watchd")

    def kill(self) -> None:
        """SIGKILL; the manager starts it again by itself."""
        self.guest.systemctl("kill", "--kill-whom=main", "--signal=KILL", "watchd")

    @contextlib.contextmanager
    def dead(self) -> Iterator[None]:
        """Killed, and at the end running again. The manager has begun to start it, and cannot go on meanwhile."""
        gate = self.guest.path(_GATE)
        os.mkfifo(gate)
        try:
            self.kill()
            with gate.open(
                "w"
            ) as opened:  # waits until the other end is opened, which is when the old process is no more
                yield
                gate.unlink()
                opened.write("go on\n")
        finally:
            gate.unlink(missing_ok=True)
        self.start()  # waits for what the manager does already

    def stored(self) -> int:
        """How many descriptors the manager keeps for it."""
        return int(self.guest.systemctl("show", "--property=NFileDescriptorStore", "--value", "watchd"))

    def sync(self) -> list[Json]:
        """The barrier; returns the mounts that are not coherent."""
        answer = client.request(self.guest.path("/run/watchd"), "sync", timeout=PATIENCE_S, arguments={})
        return [mount for mount in answer["mounts"] if mount["state"] != "coherent"]

    def log(self) -> list[Json]:
        """The journal, which must be readable and without holes."""
        printed = self.guest.run("/opt/bin/watchd", "log", "--json").stdout
        records = [json.loads(line) for line in printed.splitlines()]
        assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
        return records

    def close(self) -> None:
        """Stop it, look back, and take everything away."""
        try:
            self.guest.systemctl("stop", "watchd")
            said = self.guest.log()
            assert not re.search(r"Traceback|ResourceWarning|internal error|never retrieved", said), said
        finally:
            self.guest.systemctl("reset-failed", "watchd", check=False)
            self.guest.run("umount", "/srv/place/merged", check=False)
            self.guest.run("umount", "/srv/place")
            self.guest.run("rmdir", "/srv/place")
            self.guest.run("rm", "-r", "/var/lib/watchd")
            self.guest.run("journalctl", "--quiet", "--rotate", "--vacuum-time=1us")


def tree(root: Path) -> dict[str, bytes | None]:
    """What is below a directory: the content of each file, None for a directory."""
    found: dict[str, bytes | None] = {}
    for directory, names, files in os.walk(root):
        for name in names:
            found[os.path.relpath(os.path.join(directory, name), root)] = None
        for name in files:
            path = os.path.join(directory, name)
            found[os.path.relpath(path, root)] = Path(path).read_bytes()
    return found


def of_type(log: list[Json], *kinds: str) -> list[Json]:
    """The records of these types."""
    return [record for record in log if record["type"] in kinds]
