"""What is wrong outside of watchd is said in one clear line, with the right exit status; what can go on goes on."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.kernel.accidents import write
from tests.kernel.running import Daemon
from tests.kernel.sandbox import MS_RDONLY, Sandbox, mount, umount
from watchd.errors import ConfigError

WITHOUT_FSPICK = (sys.executable, str(Path(__file__).with_name("without_fspick.py")))


def assert_one_line(said: str, *parts: str) -> None:
    """Exactly one line, and these parts in it."""
    assert said.endswith("\n")
    assert said.count("\n") == 1, said
    assert said.startswith("watchd: ")
    for part in parts:
        assert part in said


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("journal:\n  segment_sise: 1MiB\n", ":2:", "segment_sise"),
        ("sources: {backend: [fanotify\n", ":", "watchd.yaml"),
        ("coherence:\n  budget: 500%\n", ":2:", "budget"),
        ("layers: [{name: x}]\n", ":1:", "path"),
    ],
)
def test_a_bad_configuration_is_78_and_names_the_line(daemon: Daemon, text: str, line: str, problem: str) -> None:
    daemon.config.write_text(text)
    status, said = daemon.fails()
    assert status == 78
    assert_one_line(said, str(daemon.config) + line, problem)


def test_a_state_directory_that_cannot_be_written_is_told(sandbox: Sandbox, daemon: Daemon) -> None:
    read_only = sandbox.directory(b"read-only")
    mount(b"tmpfs", read_only, b"tmpfs", flags=MS_RDONLY)
    try:
        daemon.configure(state_directory=os.fsdecode(read_only) + "/state")
        status, said = daemon.fails()
    finally:
        umount(read_only)
    assert status in (1, 77)
    assert_one_line(said, "state_directory", os.fsdecode(read_only), "Read-only file system")


def test_a_state_directory_that_is_a_file_is_told(sandbox: Sandbox, daemon: Daemon) -> None:
    write(sandbox.path(b"file"), b"")
    daemon.configure(state_directory=os.fsdecode(sandbox.path(b"file")))
    status, said = daemon.fails()
    assert status == 1
    assert_one_line(said, "state_directory", os.fsdecode(sandbox.path(b"file")))


def test_a_second_instance_is_refused_and_the_first_goes_on(sandbox: Sandbox, daemon: Daemon) -> None:
    daemon.start()
    second = Daemon(sandbox.directory(b"second"), settings={"runtime_directory": str(daemon.runtime_directory)})
    status, said = second.fails()
    assert status == 2
    assert_one_line(said, "runs already", str(daemon.process.pid))
    second.close()
    third = Daemon(sandbox.directory(b"third"), settings={"state_directory": daemon.settings["state_directory"]})
    status, said = third.fails()
    assert status != 0
    assert_one_line(said, daemon.settings["state_directory"])
    third.close()
    assert daemon.sync() == []


@pytest.mark.parametrize("capability", ["sys_admin", "dac_read_search"])
def test_a_missing_capability_is_77(daemon: Daemon, capability: str) -> None:
    status, said = daemon.fails(launcher=("setpriv", f"--bounding-set=-{capability}", f"--inh-caps=-{capability}"))
    assert status == 77
    assert_one_line(said, f"CAP_{capability.upper()}", "root")


def test_a_kernel_without_fspick_is_told(daemon: Daemon) -> None:
    status, said = daemon.fails(launcher=WITHOUT_FSPICK)
    assert status == 1
    assert_one_line(said, "fspick", "5.2")


def test_a_mount_point_that_is_no_overlay_is_wrong_usage(sandbox: Sandbox, daemon: Daemon) -> None:
    daemon.start()
    for words in (("sync", sandbox.directory(b"plain")), ("sync", sandbox.path(b"nowhere")), ("sync", "999:999")):
        done = daemon.verb(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert_one_line(done.stderr, os.fsdecode(words[1]))
    done = daemon.verb("invalidate", sandbox.path(b"plain"))
    assert done.returncode == 2
    assert_one_line(done.stderr, "plain")


def test_no_daemon_is_69(daemon: Daemon) -> None:
    for verb in ("status", "sync", "reload"):
        done = daemon.verb(verb)
        assert (done.returncode, done.stdout) == (69, "")
        assert_one_line(done.stderr, "watchd run")
    daemon.start()
    daemon.kill()
    assert daemon.verb("status").returncode == 69


def test_a_configured_layer_that_does_not_exist_is_told_and_the_rest_goes_on(sandbox: Sandbox, daemon: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    missing = os.fsdecode(sandbox.path(b"missing"))
    daemon.configure(layers=[{"path": missing, "name": "gone"}])
    daemon.start()
    [problem] = [problem for problem in daemon.status()["problems"] if missing in problem]
    assert "layers" in problem
    assert not os.path.exists(merged + b"/new")
    write(sandbox.path(b"low/new"), b"")
    assert daemon.sync(merged) == []
    assert os.path.exists(merged + b"/new")
    sandbox.directory(b"missing")
    daemon.sync()
    write(sandbox.path(b"missing/new"), b"")
    daemon.sync()
    assert "gone" in {layer["name"] for layer in daemon.status()["layers"]}
    assert "gone" in {record["layer"] for record in daemon.log() if record["type"] == "change"}


def test_a_lower_that_was_removed_does_not_stop_the_other_mounts(sandbox: Sandbox, daemon: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    damaged = sandbox.overlay(b"damaged", b"away", upper=b"up2")
    os.rmdir(sandbox.path(b"away"))
    daemon.start()
    assert daemon.mount(damaged)["state"] == "failed"
    assert "away" in daemon.mount(damaged)["reason"]
    done = daemon.verb("sync", damaged)
    assert done.returncode == 1
    assert "away" in done.stdout
    assert not os.path.exists(merged + b"/new")
    write(sandbox.path(b"low/new"), b"")
    assert daemon.verb("sync", merged).returncode == 0
    assert os.path.exists(merged + b"/new")


def test_a_bad_reload_keeps_the_old_configuration(sandbox: Sandbox, daemon: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    good = daemon.config.read_text()
    daemon.config.write_text("coherence: {mode: observe}\nnonsense: 1\n")
    done = daemon.verb("reload")
    # The verb cannot find the daemon through a bad file, so it fails at that; the daemon is asked through its socket.
    assert done.returncode == 78
    assert_one_line(done.stderr, "nonsense")
    with pytest.raises(ConfigError, match="nonsense"):
        daemon.ask("reload")
    daemon.signal_and_wait(signal.SIGHUP, "READY=1")
    assert daemon.mount(merged)["state"] == "coherent"
    assert "the old configuration stays" in daemon.errors()
    daemon.config.write_text(good)
    assert daemon.verb("reload").returncode == 0
    assert daemon.sync(merged) == []


def test_sighup_reads_the_configuration_again(sandbox: Sandbox, daemon: Daemon) -> None:
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    daemon.start()
    assert daemon.mount(merged)["state"] == "coherent"
    daemon.configure(coherence={"mode": "observe"}, sources={"backend": "inotify"})
    daemon.signal_and_wait(signal.SIGHUP, "READY=1")
    daemon.ask("sync", mounts=[os.fsdecode(merged)])
    assert daemon.mount(merged)["state"] == "observed"
    assert [layer["backend"] for layer in daemon.status()["layers"]] == ["inotify"]
    assert not os.path.exists(merged + b"/new")
    write(sandbox.path(b"low/new"), b"")
    [mount] = daemon.sync(merged)
    assert (mount["state"], [stale["kind"] for stale in mount["stale"]]) == ("stale", ["missing"])
    assert not os.path.exists(merged + b"/new"), "it was told to observe only"
    daemon.configure(coherence={"mode": "repair"})
    daemon.signal_and_wait(signal.SIGHUP, "READY=1")
    assert daemon.sync(merged) == []
    assert os.path.exists(merged + b"/new")


def test_a_configuration_named_by_a_relative_path_is_found_at_reload(sandbox: Sandbox, daemon: Daemon) -> None:
    relative = os.path.relpath(daemon.config)
    daemon.config, absolute = Path(relative), daemon.config
    try:
        daemon.start()
        [file] = daemon.ask("reload")["files"]
        assert Path(file).samefile(absolute)
    finally:
        daemon.config = absolute
