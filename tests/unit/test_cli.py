from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from click.testing import CliRunner, Result

from tests.unit.fake_daemon import FakeDaemon
from watchd import cli, client, errors
from watchd.cli.options import mount_patterns
from watchd.config import Config, flatten

PINNED = {
    "device": "0:50",
    "mount_points": [{"path": "/srv/app", "namespace": 4026531840, "pid": None}],
    "state": "pinned",
    "stale": [
        {
            "path": "lib/libc.so",
            "kind": "replaced",
            "pinned_by": [{"pid": 7, "command": "a\nb", "how": "mapped"}, {"pid": 8, "command": "c", "how": "open"}],
        },
        {"path": "bad\x1b[2J\ufffd", "path_b64": "YmFkG1sySv8=", "kind": "ghost", "pinned_by": []},
    ],
}
COHERENT = {
    "device": "0:51",
    "mount_points": [
        {"path": "/m n", "namespace": 4026531840, "pid": None},
        {"path": "/inside", "namespace": 4026532000, "pid": 99},
    ],
    "state": "coherent",
    "stale": [],
}
STATUS = {
    "version": "0.1.0",
    "pid": 42,
    "mounts": [PINNED, COHERENT],
    "layers": [
        {
            "name": "base",
            "path": "/srv/[red]base",
            "fstype": "ext4",
            "backend": "fanotify",
            "state": "live",
            "reason": "",
            "mounts": ["0:50"],
        }
    ],
    "journal": {"path": "/var/lib/watchd/journal", "epoch": "e1", "first_seq": 1, "last_seq": 99, "bytes": 4096},
    "cursors": [{"name": "backup", "cursor": "e1:7", "lag": 3}],
}
STATUS_TEXT = r"""
watchd 0.1.0, pid 42

Mounts
  DEVICE  STATE     STALE  MOUNT POINT  SEEN BY
  0:50    pinned    2      /srv/app
  0:51    coherent  0      /m n
                           /inside      pid 99

Stale
  /srv/app/lib/libc.so: replaced, held by 7 (a\nb, mapped), 8 (c, open)
  /srv/app/bad\x1b[2J\xff: ghost

Layers
  NAME  STATE  BACKEND   FSTYPE  PATH            REASON
  base  live   fanotify  ext4    /srv/[red]base

Journal
  EPOCH  FIRST  LAST  BYTES  PATH
  e1     1      99    4096   /var/lib/watchd/journal

Cursors
  NAME    CURSOR  LAG
  backup  e1:7    3
""".lstrip("\n")


def invoke(*arguments: str, **extra: Any) -> Result:
    return CliRunner().invoke(cli.main, arguments, **extra)


@pytest.fixture
def ask(daemon: FakeDaemon) -> Any:
    """Invokes a verb with a configuration that leads to the fake daemon."""
    file = daemon.directory / "watchd.yaml"
    file.write_text(f"runtime_directory: {daemon.directory}\n")
    return lambda *arguments: invoke(*arguments, env={"WATCHD_CONFIG": str(file)})


@pytest.fixture
def no_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("watchd.config.DEFAULT_FILE", tmp_path / "none.yaml")


def test_help_lists_every_verb_and_imports_none() -> None:
    code = (
        "import sys\nfrom watchd.cli import main\n"
        "try: main(['--help'])\nfinally: print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"\n  {verb} " in done.stdout for verb in cli.VERBS)
    loaded = set(done.stderr.split())
    assert not loaded & {"rich", "asyncio", "yaml", "msgspec", *(f"watchd.cli.{verb}" for verb in cli.VERBS)}


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_its_module_and_its_help(verb: str) -> None:
    done = invoke(verb, "--help")
    assert done.exit_code == 0
    assert done.stdout.startswith(f"Usage: watchd {verb} ")


def test_version() -> None:
    assert invoke("--version").stdout == "watchd 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command; see `watchd --help`"),
        (["stat"], "No such command 'stat'"),
        (["sync", "--timeout", "soon"], "Invalid value for '--timeout'"),
        (["sync", "--timeout", "-1"], "Invalid value for '--timeout'"),
        (["sync", "--timeout", "nan"], "--timeout is no number; give seconds"),
        (["status", "extra"], "Got unexpected extra argument (extra); see `watchd status --help`"),
        (["invalidate"], "Missing argument 'MOUNT...'; see `watchd invalidate --help`"),
        (["invalidate", "/m", "--method", "hope"], "Invalid value for '--method'"),
        (["config"], "Missing command; see `watchd config --help`"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], message: str) -> None:
    done = invoke(*arguments)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"watchd: {message}")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (errors.UsageError("bad", remedy="do well"), 2, "bad; do well"),
        (errors.DeadlineError("late"), 3, "late"),
        (errors.DaemonUnreachableError("gone"), 69, "gone"),
        (errors.NotPermittedError("no"), 77, "no"),
        (errors.ConfigError("f:1: key"), 78, "f:1: key"),
        (errors.JournalError("torn"), 1, "torn"),
        (errors.MountError("two\nlines\x1b"), 1, r"two\nlines\x1b"),
        (PermissionError(13, "Permission denied", "/f"), 77, "/f: Permission denied"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_an_error_is_one_line_and_its_exit_status(
    monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, line: str
) -> None:
    def fail(_: object) -> NoReturn:
        raise error

    monkeypatch.setattr("watchd.service.run", fail, raising=False)
    done = invoke("run")
    assert (done.exit_code, done.stdout, done.stderr) == (status, "", f"watchd: {line}\n")


def test_a_bug_is_told_with_its_place_and_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("watchd.service.run", lambda _: {}["absent"], raising=False)
    done = invoke("run")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("watchd: internal error, please report it: KeyError: 'absent' (")


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("watchd.service.run", interrupt, raising=False)
    done = invoke("run")
    assert (done.exit_code, done.stdout, done.stderr.strip()) == (130, "", "")


def run_verb(*arguments: str, stdout: int, config: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from watchd.cli import main; main()", *arguments]
    environment = os.environ | {"WATCHD_CONFIG": str(config), "PYTHONUNBUFFERED": ""}  # buffered, as users have it
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, check=False)


def test_a_reader_that_went_away_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run_verb("config", "dump", stdout=writing, config=tmp_path / "c.yaml")
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_output_to_a_full_disk_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("")
    with open("/dev/full", "w") as full:
        done = run_verb("config", "dump", stdout=full.fileno(), config=tmp_path / "c.yaml")
    assert (done.returncode, done.stderr) == (1, "watchd: No space left on device\n")


def test_run_hands_the_configuration_file_on(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Path | None] = []
    monkeypatch.setattr("watchd.service.run", served.append, raising=False)
    invoke("run", "--config", "/a.yaml")
    invoke("run", env={"WATCHD_CONFIG": "/b.yaml"})
    invoke("run")
    assert served == [Path("/a.yaml"), Path("/b.yaml"), None]


def test_status_in_a_pipe_is_plain_and_names_cannot_move_the_cursor(ask: Any, daemon: FakeDaemon) -> None:
    daemon.answers(STATUS)
    done = ask("status")
    assert (done.exit_code, done.stdout) == (0, STATUS_TEXT)
    assert daemon.requests == [{"verb": "status"}]


def test_status_says_that_nothing_is_recorded_and_why(ask: Any, daemon: FakeDaemon) -> None:
    failed = {"state": "failed", "reason": "cannot write: No space left; make\nroom"}
    daemon.answers({**STATUS, "journal": {**STATUS["journal"], **failed}})
    assert "/journal\n  failed: cannot write: No space left; make\\nroom\n" in ask("status").stdout


def test_status_json_is_the_daemons_answer(ask: Any, daemon: FakeDaemon) -> None:
    daemon.answers(STATUS)
    assert json.loads(ask("status", "--json").stdout) == STATUS


def test_names_on_a_terminal_are_not_taken_for_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.importlib.import_module("watchd.cli.render").echo_table(
        "Layers", ["PATH"], [["/srv/[red]a:smile:"], ["a\x1b[2J"]]
    )
    shown = capsys.readouterr().out
    assert "/srv/[red]a:smile:" in shown
    assert r"a\x1b[2J" in shown


def test_sync_says_nothing_when_all_is_coherent(ask: Any, daemon: FakeDaemon) -> None:
    daemon.answers({"mounts": [COHERENT]})
    done = ask("sync", "0:51", "/srv/*", "--timeout", "2")
    assert (done.exit_code, done.stdout) == (0, "")
    assert daemon.requests == [{"verb": "sync", "mounts": ["0:51", "/srv/*"], "timeout": 2.0}]


def test_sync_names_what_is_stale_and_who_pins_it(ask: Any, daemon: FakeDaemon) -> None:
    daemon.answers({"mounts": [COHERENT, PINNED, {**COHERENT, "state": "failed", "mount_points": []}]})
    done = ask("sync")
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        r"/srv/app/lib/libc.so: replaced, held by 7 (a\nb, mapped), 8 (c, open)",
        r"/srv/app/bad\x1b[2J\xff: ghost",
        "0:51: failed",
    ]


def test_sync_json_has_the_same_exit_status(ask: Any, daemon: FakeDaemon) -> None:
    daemon.answers({"mounts": [PINNED]})
    done = ask("sync", "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (1, {"mounts": [PINNED]})


def test_sync_that_takes_too_long_exits_with_3(ask: Any, daemon: FakeDaemon) -> None:
    daemon.refuses("the mounts were not verified within 30 s", "deadline")
    assert ask("sync").exit_code == 3


def test_the_daemon_is_given_time_to_report_the_deadline_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def request(directory: Path, verb: str, *, timeout: float, arguments: object) -> dict[str, Any]:
        asked.append(timeout)
        return {"mounts": []}

    monkeypatch.setattr(client, "request", request)
    invoke("sync", "--timeout", "100")
    assert asked[0] > 100


@pytest.mark.usefixtures("no_defaults")
def test_without_a_daemon_the_exit_status_says_so(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"runtime_directory: {tmp_path}")
    for verb in ("status", "sync", "reload"):
        done = invoke(verb, "--config", str(tmp_path / "c.yaml"))
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (69, "", 1)


def test_reload_tells_a_bad_configuration(ask: Any, daemon: FakeDaemon) -> None:
    daemon.refuses("/etc/watchd/watchd.yaml:3: log.level: 'loud' is none of debug", "config")
    done = ask("reload")
    assert (done.exit_code, done.stderr) == (
        78,
        "watchd: /etc/watchd/watchd.yaml:3: log.level: 'loud' is none of debug\n",
    )
    daemon.answers({"files": [], "after_restart": []})
    done = ask("reload")
    assert (done.exit_code, done.stderr) == (0, "")


def test_reload_names_what_waits_for_a_restart(ask: Any, daemon: FakeDaemon) -> None:
    daemon.answers({"files": [], "after_restart": ["journal"]})
    done = ask("reload")
    assert (done.exit_code, done.stderr) == (0, "watchd: journal takes effect at the next start of the daemon\n")


def outcome(result: str) -> dict[str, Any]:
    return {
        "device": "0:50",
        "mount_point": "/m\x1b",
        "method": "invalidate",
        "result": result,
        "stale_before": 3,
        "stale_after": 0,
        "duration_ns": 1_250_000,
    }


@pytest.mark.parametrize(("results", "status"), [(["coherent"], 0), (["coherent", "stale"], 1), (["failed"], 1)])
def test_invalidate_prints_what_it_did_and_whether_it_helped(
    monkeypatch: pytest.MonkeyPatch, results: list[str], status: int
) -> None:
    asked: list[tuple[Sequence[str], str]] = []

    def act(patterns: Sequence[str], method: str) -> list[dict[str, Any]]:
        asked.append((patterns, method))
        return [outcome(result) for result in results]

    manual = types.SimpleNamespace(invalidate=act)
    monkeypatch.setitem(sys.modules, "watchd.coherence.manual", manual)  # type: ignore[arg-type]
    monkeypatch.setattr("watchd.coherence.manual", manual, raising=False)
    done = invoke("invalidate", "/m/../m")
    assert done.exit_code == status
    assert done.stdout.splitlines()[-1] == (
        rf"/m\x1b (0:50): invalidate: {results[-1]} (3 stale before, 0 after, 1.25 ms)"
    )
    assert len(json.loads(invoke("invalidate", "0:50", "--json").stdout)["actions"]) == len(results)
    assert asked == [(["/m"], "invalidate"), (["0:50"], "invalidate")]


def test_mount_arguments_mean_the_same_in_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "a[1]").mkdir()
    monkeypatch.chdir(tmp_path)
    assert mount_patterns(["link", "./gone/", "0:50", "*", "/x/*", "a[1]", "a[2]"]) == [
        f"{tmp_path}/real",
        f"{tmp_path}/gone",
        "0:50",
        "*",
        "/x/*",
        f"{tmp_path}/a[1]",
        "a[2]",
    ]


@pytest.mark.usefixtures("no_defaults")
def test_config_check_says_which_files_were_read(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "c.yaml").write_text("")
    (tmp_path / "conf.d" / "x.yaml").write_text("")
    files = [f"{tmp_path}/c.yaml", f"{tmp_path}/conf.d/x.yaml"]
    assert invoke("config", "check", files[0]).stdout == f"ok: {files[0]}, {files[1]}\n"
    assert json.loads(invoke("config", "check", "--json", "--config", files[0]).stdout) == {
        "ok": True,
        "files": files,
        "warnings": [],
    }
    (tmp_path / "conf.d" / "x.yaml").unlink()
    (tmp_path / "c.yaml").unlink()
    (tmp_path / "conf.d").rmdir()
    assert invoke("config", "check").stdout == "ok: no file is present, the built-in defaults hold\n"


def test_config_check_warns_of_a_program_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "mounts: [{match: /a, after: [true]}, {match: /b, after: [relaod, app]}, {match: /c, after: [/no/such]}]"
    )
    done = invoke("config", "check", str(tmp_path / "c.yaml"))
    assert (done.exit_code, done.stdout) == (0, f"ok: {tmp_path}/c.yaml\n")
    assert [line.split(" is ")[0] for line in done.stderr.splitlines()] == [
        "warning: mounts[1].after: relaod",
        "warning: mounts[2].after: /no/such",
    ]


def test_config_check_of_a_bad_file_exits_with_78(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("log:\n  levle: info")
    done = invoke("config", "check", str(tmp_path / "c.yaml"))
    assert (done.exit_code, done.stdout) == (78, "")
    assert done.stderr == f"watchd: {tmp_path}/c.yaml:2: log.levle: unknown key, did you mean level?\n"


def test_config_dump_gives_each_value_with_its_origin(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("metrics: off\nmounts:\n- match: /a*\n  budget: 5%\ncontrol:\n  mode: 0600\n")
    lines = invoke("config", "dump", str(file)).stdout.splitlines()
    assert f"  listen: off  # {file}:1" in lines
    assert f'- match: "/a*"  # {file}:3' in lines
    assert f"  budget: 5%  # {file}:4" in lines
    assert f'  mode: "0600"  # {file}:6' in lines
    assert "  group: root  # default" in lines


def test_config_dump_json_has_every_key_whatever_was_configured(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("\nmounts: [{match: /a, actions: [invalidate, evict]}]")
    dumped = json.loads(invoke("config", "dump", "--json", str(file)).stdout)
    assert set(dumped) == {key for key, _ in flatten(Config())}
    assert dumped["mounts"] == {
        "value": [{"match": "/a", "actions": ["invalidate", "evict"], "after": [], "after_timeout": "30s"}],
        "origin": f"{file}:2",
    }
    assert dumped["journal.max_delay"] == {"value": "10ms", "origin": "default"}
    assert dumped["sources.content"]["value"] is True
    assert dumped["metrics.listen"]["value"] == "127.0.0.1:9877"
