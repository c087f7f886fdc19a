"""A Debian that has booted: a real systemd as process 1, with the watchd of this checkout to be started as a unit.

Facts
* systemd-nspawn boots a directory as root wherever cgroup2 is mounted, in the hybrid layout too, with
  SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1. With --keep-unit it asks no service manager of the host for anything, and moves itself
  and what it boots into the cgroups `supervisor` and `payload` below the one that it was started in.
* It says READY=1 and X_NSPAWN_LEADER_PID= (process 1 of the guest) at $NOTIFY_SOCKET, with --notify-ready=yes when the guest
  has booted.
* Its own system call filter has neither fanotify_init nor the mount calls; SYSTEMD_SECCOMP=0 leaves it out.
* When process 1 of a process namespace is killed all in it are, and with them go the guest's mounts.
* systemctl of root talks to /run/systemd/private, so no D-Bus is needed.

The guest is the host's /usr, read-only, with a /etc, /var and /run of its own. It shares the kernel, so fanotify and overlays
are the real ones; it sees nothing else of the host and has no network but its own loopback.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 60.0
"""Nothing here takes so long; who waits longer has found a hang."""

_PASSWD = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n"
_GROUPS = "root:x:0:\nadm:x:4:\ntty:x:5:\nutmp:x:43:\nsystemd-journal:x:999:\nnogroup:x:65534:\n"
_MASKED = (  # not needed, or none of a guest's business
    "dbus.service",
    "dbus.socket",
    "getty.target",
    "kmod-static-nodes.service",
    "ldconfig.service",
    "modprobe@.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-logind.service",
    "systemd-networkd.service",
    "systemd-sysctl.service",
    "systemd-sysusers.service",
    "systemd-update-done.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-update-utmp.service",
    "systemd-user-sessions.service",
)
_LAUNCH = """
for cgroup in "$@"; do
    test "$cgroup" = -- && break
    echo $$ >"$cgroup/cgroup.procs" || exit
done
while test "$1" != --; do shift; done
shift
mkdir -p /run/systemd && mount -t tmpfs none /run/systemd && exec "$@"
"""


class Booted:
    """A guest, from `boot` to `close`."""

    def __init__(self, home: Path) -> None:
        """`home` is an empty directory."""
        self._root = home / "root"
        _make_tree(self._root)
        self._output = (home / "output").open("wb")
        self._cgroups = _make_cgroups(f"watchd-test-{os.getpid()}")
        self._process: subprocess.Popen[bytes] | None = None
        self.leader = 0
        """Its process 1, as seen from here."""

    def boot(self) -> None:
        """Returns when all units that it begins with are up."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            name = f"watchd-test-booted-{os.getpid()}"
            manager.bind(f"\0{name}")
            self._process = subprocess.Popen(
                [*_launcher(self._cgroups), *_nspawn(self._root)],
                env={
                    "PATH": os.environ["PATH"],
                    "NOTIFY_SOCKET": f"@{name}",
                    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
                    "SYSTEMD_SECCOMP": "0",
                },
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
            )
            self._wait_until_ready(manager, self._process)
        assert self.leader

    def close(self) -> None:
        """Pull its plug and leave nothing of it."""
        if self._process is not None:
            if self.leader:
                subprocess.run(["kill", "-KILL", str(self.leader)], check=False)
            else:
                self._process.terminate()
            self._process.wait(PATIENCE_S)
        self._output.close()
        for cgroup in self._cgroups:
            for directory, _, _ in os.walk(cgroup, topdown=False):
                os.rmdir(directory)

    def path(self, inside: str) -> Path:
        """Where a path of the guest, mounts included, is found from here. To be used, not to be held open."""
        return Path(f"/proc/{self.leader}/root") / inside.lstrip("/")

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command in the guest, as root, to its end."""
        done = subprocess.run(
            [*self.entering(), *command], capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stdout}{done.stderr}\n{self.log()}"
        return done

    def entering(self) -> list[str]:
        """What to put before a command for it to run in the guest."""
        namespaces = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd")
        return ["nsenter", f"--target={self.leader}", *namespaces]

    def systemctl(self, *words: str, check: bool = True) -> str:
        """What systemctl(1) prints."""
        return self.run("systemctl", *words, check=check).stdout.strip()

    def log(self, unit: str = "watchd") -> str:
        """What the unit and its manager have said."""
        command = [
            *self.entering(),
            "journalctl",
            "--no-pager",
            "--quiet",
            "--output=short-monotonic",
            f"--unit={unit}",
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False).stdout

    def _wait_until_ready(self, manager: socket.socket, process: subprocess.Popen[bytes]) -> None:
        pidfd = os.pidfd_open(process.pid)
        poll = select.poll()
        for descriptor in (manager.fileno(), pidfd):
            poll.register(descriptor, select.POLLIN)
        try:
            while ready := dict(poll.poll(PATIENCE_S * 1000)):
                assert manager.fileno() in ready, f"the guest did not boot:\n{self.output()}"
                said = dict(line.partition("=")[::2] for line in manager.recv(65536).decode().splitlines())
                self.leader = int(said.get("X_NSPAWN_LEADER_PID", self.leader))
                if "READY" in said:
                    return
        finally:
            os.close(pidfd)
        raise AssertionError(f"the guest did not boot within {PATIENCE_S:g} s:\n{self.output()}")

    def output(self) -> str:
        """What was said on its console."""
        return Path(self._output.name).read_text(errors="replace")


def _make_tree(root: Path) -> None:
    """What is not the host's."""
    for directory in (
        "usr",
        "var",
        "run",
        "tmp",
        "proc",
        "sys",
        "dev",
        "root",
        "srv",
        "etc/systemd/system",
        "etc/watchd",
    ):
        (root / directory).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if (host := Path("/") / name).is_symlink():
            (root / name).symlink_to(host.readlink())
    for file in ("os-release", "ld.so.cache", "group"):
        shutil.copy(Path("/etc") / file, root / "etc" / file)
    (root / "etc/passwd").write_text(_PASSWD)
    (root / "etc/group").write_text(_GROUPS)
    (root / "etc/machine-id").write_text("")
    units = root / "etc/systemd/system"
    (units / "default.target").symlink_to("/usr/lib/systemd/system/basic.target")
    for name in _MASKED:
        (units / name).symlink_to("/dev/null")


def _nspawn(root: Path) -> list[str]:
    read_only = dict.fromkeys(["/usr", str(REPOSITORY), sys.prefix, sys.base_prefix])
    return [
        "systemd-nspawn",
        "--quiet",
        "--boot",
        f"--directory={root}",
        "--machine=watchd-test",
        "--register=no",
        "--keep-unit",
        "--notify-ready=yes",
        "--kill-signal=SIGKILL",
        "--console=pipe",
        "--link-journal=no",
        "--resolv-conf=off",
        "--timezone=off",
        "--private-network",
        "--capability=all",
        *(f"--bind-ro={path}" for path in read_only if path == "/usr" or not path.startswith("/usr/")),
    ]


def _launcher(cgroups: Sequence[Path]) -> list[str]:
    """Runs the command that follows in these cgroups, and no longer than we live. What it mounts, nobody else sees."""
    return [
        *("setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--propagation=private"),
        *("sh", "-c", _LAUNCH, "launch", *map(str, cgroups), "--"),
    ]


def _make_cgroups(name: str) -> list[Path]:
    """A cgroup below ours, in each hierarchy in which systemd keeps processes."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    made = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        fstype, _, options = fields[fields.index("-") + 1 :][:3]
        controllers = "" if fstype == "cgroup2" else "name=systemd" if "name=systemd" in options else None
        if fstype in ("cgroup", "cgroup2") and controllers is not None:
            cgroup = Path(fields[4]) / own[controllers].lstrip("/") / name
            cgroup.mkdir()
            made.append(cgroup)
    return made
