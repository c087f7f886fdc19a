"""Commands of the configuration, run for real: what they get, what they may say, and that each of them ends."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from watchd.service import command as module
from watchd.service import launch
from watchd.service.command import LINE_MAX_BYTES, Ended, run

FOREVER_S = 1000.0
ENVIRONMENT = {b"PATH": os.fsencode(os.environ["PATH"]), b"LANG": b"C.UTF-8", b"GIVEN": b"caf\xe9"}


class Stage:
    """Runs commands and keeps what they say."""

    def __init__(self) -> None:
        self.stop = os.eventfd(0)
        self.stop_at: bytes | None = None
        self.said: list[bytes] = []

    def run(self, *command: str, paths: bytes = b"", timeout_s: float = FOREVER_S) -> Ended:
        return run(
            command, paths=paths, environment=ENVIRONMENT, timeout_s=timeout_s, stop=self.stop, tell=self._take_in
        )

    def shell(self, script: str, *arguments: str, paths: bytes = b"", timeout_s: float = FOREVER_S) -> Ended:
        return self.run("sh", "-c", script, *arguments, paths=paths, timeout_s=timeout_s)

    def shell_until_ready(self, script: str) -> Ended:
        """Stops it when it says `ready`."""
        self.stop_at = b"ready"
        return self.shell(script)

    def _take_in(self, line: bytes) -> None:
        self.said.append(line)
        if line == self.stop_at:
            os.eventfd_write(self.stop, 1)


@pytest.fixture
def stage() -> Iterator[Stage]:
    before = children()  # other tests of the same session may have some
    descriptors = os.listdir("/proc/self/fd")
    stage = Stage()
    yield stage
    os.close(stage.stop)
    assert os.listdir("/proc/self/fd") == descriptors
    assert children() == before


def children() -> set[str]:
    """The processes that are ours, dead ones that nobody has waited for included."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_paths_arrive_byte_by_byte_however_many(stage: Stage, tmp_path: Path) -> None:
    paths = b"".join(b"d/n\xe4me %d\n" % number for number in range(100_000))
    assert stage.shell('cat >"$0"', str(tmp_path / "got"), paths=paths).result == "ok"
    assert (tmp_path / "got").read_bytes() == paths


@pytest.mark.parametrize("script", ["true", "exec 0<&-", "head -c 1"])
def test_who_does_not_read_the_paths_keeps_nobody_waiting(stage: Stage, script: str) -> None:
    assert stage.shell(script, paths=b"p\n" * 1_000_000).result == "ok"


def test_nothing_of_the_daemon_is_passed_on(stage: Stage) -> None:
    leak = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leak, True)
    try:
        assert stage.shell("echo $PPID; pwd; env; ls /proc/$$/fd | tr '\\n' ' '; ulimit -Sn").result == "ok"
    finally:
        os.close(leak)
    parent, directory, *environment, descriptors = stage.said
    assert (int(parent), directory) == (os.getpid(), b"/")
    assert {line.split(b"=")[0] for line in environment} <= {
        b"PATH",
        b"LANG",
        b"GIVEN",
        b"PWD",
        b"SHLVL",
        b"_",
        b"OLDPWD",
    }
    assert b"GIVEN=caf\xe9" in environment
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert descriptors.split() == [b"0", b"1", b"2", b"%d" % min(soft, 1024)]


def test_signals_that_python_ignores_are_not_ignored_in_the_command(stage: Stage) -> None:
    stage.shell("grep SigIgn /proc/self/status")
    ignored = int(stage.said[0].split()[1], 16)
    # Nobody can set signals 32 and 33, which are glibc's own; its posix_spawn, which make uses, leaves them ignored.
    assert ignored & ~(0b11 << 31) == 0


def test_no_shell_takes_the_words_apart(stage: Stage) -> None:
    stage.run("printf", "<%s>", "$HOME; `id` *", "two words")
    assert stage.said == [b"<$HOME; `id` *><two words>"]


@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("kill -9 $$", -9)])
def test_a_failure_tells_how(stage: Stage, script: str, status: int) -> None:
    ended = stage.shell(script)
    assert (ended.result, ended.status) == ("failed", status)


def test_a_command_that_is_not_there_or_no_program_has_failed_and_says_so(stage: Stage, tmp_path: Path) -> None:
    assert stage.run("no-such-command").status == 127
    (tmp_path / "words").write_text("echo no first line\n")
    assert stage.run(str(tmp_path / "words")).status == 126
    (tmp_path / "words").chmod(0o755)
    assert stage.run(str(tmp_path / "words")).status == 126
    first, second, third = stage.said
    assert first == b"no-such-command: No such file or directory"
    assert second.endswith(b"words: Permission denied")
    assert third.endswith(b"words: Exec format error")


def test_lines_are_told_whole_and_long_ones_cut(stage: Stage) -> None:
    stage.shell("printf 'one\\ntw'; printf 'o\\n' >&2; head -c 200000 /dev/zero | tr '\\0' x; printf '\\nlast'")
    assert stage.said == [b"one", b"two", b"x" * LINE_MAX_BYTES, b"last"]


def is_gone(pid: int) -> bool:
    """Whether a process has ended, or is a zombie that somebody else has to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until_gone(pid: int) -> None:
    while not is_gone(pid):
        os.sched_yield()


def test_at_the_deadline_it_is_ended(stage: Stage) -> None:
    ended = stage.run("sleep", "1000", timeout_s=0.1)
    assert (ended.result, ended.status) == ("timeout", -signal.SIGTERM)


def test_its_children_end_with_it(stage: Stage) -> None:
    ended = stage.shell_until_ready("sleep 1000 & echo $!; trap 'echo told; exit 7' TERM; echo ready; wait")
    assert (ended.result, ended.status) == ("stopped", 7)
    child, _, told = stage.said
    assert told == b"told"
    wait_until_gone(int(child))


def test_who_ignores_sigterm_is_killed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.1)
    ended = stage.shell_until_ready("trap '' TERM; sleep 1000 & echo $!; echo ready; while :; do wait; done")
    assert (ended.result, ended.status) == ("stopped", -signal.SIGKILL)
    wait_until_gone(int(stage.said[0]))


def test_a_child_that_ignores_sigterm_does_not_outlive_it(stage: Stage) -> None:
    child = 'sh -c "trap : TERM; echo \\$\\$; echo ready; while :; do sleep 1000; done"'
    stage.shell_until_ready(f"{child} & wait")
    wait_until_gone(int(stage.said[0]))


def test_what_goes_on_in_the_background_is_neither_waited_for_nor_ended(stage: Stage) -> None:
    assert stage.shell("sleep 1000 & echo $!").result == "ok"
    child = int(stage.said[0])
    assert not is_gone(child)
    os.kill(child, signal.SIGKILL)


def test_a_flood_of_output_does_not_put_off_the_deadline(stage: Stage) -> None:
    assert stage.run("yes", timeout_s=0.3).result == "timeout"


def test_a_flood_from_the_background_does_not_put_off_the_end(stage: Stage) -> None:
    assert stage.shell("yes & echo $!").result == "ok"
    wait_until_gone(int(stage.said[0]))  # of SIGPIPE


def test_what_has_not_begun_when_all_is_stopped_does_not_begin(stage: Stage) -> None:
    os.eventfd_write(stage.stop, 1)
    assert stage.shell("echo begun") == Ended("stopped", None, 0.0)
    assert stage.said == []


def test_without_descriptors_nothing_is_left_behind(stage: Stage) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    failures = set()
    for spare in range(12):
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, hard))
        try:
            stage.run("true")
            break
        except OSError as error:
            failures.add(error.errno)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    else:
        raise AssertionError("twelve descriptors are not enough")
    assert failures == {errno.EMFILE}
    for thread in threading.enumerate():
        if thread.name == "reaper":
            thread.join()


def test_the_launcher_imports_next_to_nothing() -> None:
    """It starts for every run, so it must be quick about it."""
    command = [sys.executable, "-I", "-S", "-X", "importtime", launch.__file__, "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "resource" in imported
    assert not {"watchd", "subprocess", "asyncio", "re", "typing"} & imported
