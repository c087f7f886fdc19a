from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.fake_daemon import FakeDaemon
from tests.unit.journal.support import records
from watchd import client, errors
from watchd.client import protocol
from watchd.client.values import record_of
from watchd.journal.render import to_json
from watchd.records import Change, Desync, Kind, Record

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


# ---- typed answers --------------------------------------------------------------------------------------------------


def test_keys_of_a_newer_daemon_are_passed_over(daemon: FakeDaemon) -> None:
    point = {"path": "/m\ufffd", "path_b64": "L23/", "namespace": 1, "pid": None, "new": {"path": 1}}
    stale = {
        "path": "a",
        "kind": "replaced",
        "new": [],
        "pinned_by": [{"pid": 1, "command": "vi", "how": "open", "new": 0}],
    }
    mount = {
        "device": "0:42", "mount_points": [point], "state": "pinned", "stale": [stale], "new": None,
        "lowerdir": ["/l\udcff"], "upperdir": None, "workdir": None, "read_only": True, "actions": {"evict": 1},
    }  # fmt: skip
    daemon.answers({"mounts": [mount], "new": 1})
    [found] = client.Client(daemon.directory).sync([b"/m\xff"], timeout=7)
    assert found == client.Mount(
        device="0:42",
        mount_points=(client.MountPoint(path=b"/m\xff", namespace=1),),
        state="pinned",
        stale=(client.Stale(path=b"a", kind="replaced", pinned_by=(client.Holder(pid=1, command=b"vi", how="open"),)),),
        lowerdir=(b"/l\xff",),
        read_only=True,
        actions={"evict": 1},
    )
    assert not found.is_coherent
    assert daemon.requests == [{"verb": "sync", "mounts": ["/m\udcff"], "timeout": 7}]


def test_what_the_daemon_says_of_itself_is_understood(daemon: FakeDaemon) -> None:
    journal = {"path": "/j", "epoch": "0" * 16, "first_seq": 1, "last_seq": 2, "bytes": 3}
    layer = {"name": "l", "path": "/l", "fstype": "ext4", "backend": None, "state": "live", "reason": "", "mounts": []}
    daemon.answers({"version": "9", "pid": 1, "mounts": [], "layers": [layer], "journal": journal, "cursors": []})
    status = client.Client(daemon.directory).status()
    assert status.layers == (client.Layer(name="l", path=b"/l", state="live", fstype="ext4"),)
    assert status.journal == client.Journal(path=b"/j", epoch="0" * 16, first_seq=1, last_seq=2, size_bytes=3)


def test_an_answer_of_other_types_is_one_clear_error(daemon: FakeDaemon) -> None:
    daemon.answers({"mounts": [{"device": 42}]})
    with pytest.raises(errors.WatchdError, match="cannot be understood; restart it"):
        client.Client(daemon.directory).sync()


def lines(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


BEGUN = {"ok": True, "result": {"cursor": "e:3", "fresh": False, "new": 1}}


def test_records_of_a_newer_daemon_are_passed_over_and_the_cursor_is_behind_them(daemon: FakeDaemon) -> None:
    head = {"time": "2026-01-31T12:00:00.000000007Z", "layer": "base", "new": 1}
    desync = {**head, "seq": 5, "type": "desync", "reason": "overflow"}
    change = {**head, "seq": 6, "type": "change", "path": "a", "kinds": ["modify", "new"], "exists": True,
              "is_dir": False, "via": "new"}  # fmt: skip
    daemon.sends(lines(BEGUN, {"cursor": "e:7", "records": [{**head, "seq": 4, "type": "new"}, desync, change]}))
    with client.Client(daemon.directory).follow("e:3", layers=["base"]) as records:
        assert (records.cursor, records.fresh) == ("e:3", False)
        time_ns = 1_769_860_800_000_000_007
        assert next(records) == client.Followed("e:5", Desync(time_ns, "base", "overflow"))
        assert records.cursor == "e:5"
        assert next(records) == client.Followed("e:6", Change(time_ns, "base", b"a", Kind.MODIFY, True, False))
        with pytest.raises(errors.DaemonUnreachableError, match="went away"):
            next(records)
        assert records.cursor == "e:7"
    assert daemon.requests == [{"verb": "follow", "since": "e:3", "layers": ["base"]}]


@pytest.mark.parametrize("line", [b"nonsense", b"{}", b'{"cursor": 1}', b'{"cursor": "e:1", "records": [{}]}', b"[]"])
def test_a_line_that_is_none_ends_the_following(daemon: FakeDaemon, line: bytes) -> None:
    daemon.sends(lines(BEGUN) + line + b"\n")
    follow = client.Client(daemon.directory).follow()
    with follow as records, pytest.raises(errors.WatchdError, match="cannot be understood"):
        next(records)


def test_a_following_that_is_refused_raises_and_leaves_nothing_open(daemon: FakeDaemon) -> None:
    daemon.refuses("too many", "usage")
    with pytest.raises(errors.UsageError, match="too many"):
        client.Client(daemon.directory).follow()


@given(record=records, seq=st.integers(1, 1 << 60))
def test_every_record_comes_back_from_json_as_it_was(record: Record, seq: int) -> None:
    assert record_of(json.loads(json.dumps(to_json(seq, record)))) == (seq, record)
