from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.unit.fake_daemon import FakeDaemon
from watchd import client, errors
from watchd.client import protocol

ANY_TIME = 60.0
NO_TIME = 0.01


def test_request_and_result_travel_as_one_line_each(daemon: FakeDaemon) -> None:
    daemon.answers({"mounts": ["line\nbreak"]})
    result = client.request(daemon.directory, "sync", timeout=ANY_TIME, arguments={"mounts": ["/a\udcff", "b\n"]})
    assert result == {"mounts": ["line\nbreak"]}
    assert daemon.requests == [{"verb": "sync", "mounts": ["/a\udcff", "b\n"]}]


def test_an_answer_of_many_reads_is_put_together(daemon: FakeDaemon) -> None:
    daemon.answers({"mounts": ["x" * 5_000_000]})
    assert len(client.request(daemon.directory, "status", timeout=ANY_TIME)["mounts"][0]) == 5_000_000


@pytest.mark.parametrize(("kind", "error"), [*client.ERROR_KINDS.items(), ("from the future", errors.WatchdError)])
def test_a_refusal_is_raised_as_its_kind(daemon: FakeDaemon, kind: str, error: type[errors.WatchdError]) -> None:
    daemon.refuses("no such mount; name another", kind)
    with pytest.raises(errors.WatchdError) as caught:
        client.request(daemon.directory, "sync", timeout=ANY_TIME)
    assert type(caught.value) is error
    assert str(caught.value) == "no such mount; name another"


def test_a_missing_socket_says_how_to_start_the_daemon(tmp_path: Path) -> None:
    with pytest.raises(errors.DaemonUnreachableError, match="systemctl start watchd"):
        client.request(tmp_path / "absent", "status", timeout=ANY_TIME)


def test_the_socket_of_a_dead_daemon_is_no_daemon(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "watchd.sock"))
    with pytest.raises(errors.DaemonUnreachableError, match=r"no daemon answers on .*watchd\.sock"):
        client.request(tmp_path, "status", timeout=ANY_TIME)


def test_a_daemon_that_dies_in_between_is_told_from_a_bad_answer(daemon: FakeDaemon) -> None:
    daemon.sends(b"")
    with pytest.raises(errors.DaemonUnreachableError, match="went away before it answered"):
        client.request(daemon.directory, "status", timeout=ANY_TIME)


def test_a_daemon_that_hangs_does_not_hang_the_client(daemon: FakeDaemon) -> None:
    daemon.stays_silent()
    with pytest.raises(errors.DeadlineError, match=r"did not answer within 0\.01 s"):
        client.request(daemon.directory, "status", timeout=NO_TIME)


def test_a_full_backlog_waits_and_then_is_a_deadline(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(str(tmp_path / "watchd.sock"))
        busy.listen(0)
        first.connect(str(tmp_path / "watchd.sock"))
        with pytest.raises(errors.DeadlineError):
            client.request(tmp_path, "status", timeout=NO_TIME)


def test_an_endless_answer_does_not_fill_the_memory(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "ANSWER_LIMIT_BYTES", 1 << 20)
    daemon.sends(b"x" * (4 << 20))
    with pytest.raises(errors.WatchdError, match="larger than 1 MiB"):
        client.request(daemon.directory, "status", timeout=ANY_TIME)


@pytest.mark.parametrize(
    "raw",
    [b"\n", b"nonsense\n", b"[]\n", b"{}\n", b'{"ok": true}\n', b'{"ok": false}\n', b"\xff\n", b"[" * 100_000 + b"\n"],
)
def test_an_answer_that_is_none_is_one_clear_error(daemon: FakeDaemon, raw: bytes) -> None:
    daemon.sends(raw)
    with pytest.raises(errors.WatchdError, match="cannot be understood; restart it"):
        client.request(daemon.directory, "status", timeout=ANY_TIME)
