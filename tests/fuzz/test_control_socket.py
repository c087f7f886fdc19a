"""Whatever is written to the control socket: one JSON line or a closed connection comes back, and the server lives on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.journal.support import AT_ONCE
from tests.unit.served import Served
from watchd.config.schema import Control
from watchd.config.units import FileMode
from watchd.errors import ConfigError, MountError, UsageError
from watchd.records import Change
from watchd.service import consumers
from watchd.service.control import CONNECTIONS_MAX, REQUEST_MAX_BYTES, ControlServer

PATIENCE_S = 30.0
OPEN_TO_ALL = Control(mode=FileMode.parse("0666"))


async def _echo(request: Mapping[str, Any]) -> Any:
    return dict(request)


async def _break(request: Mapping[str, Any]) -> Any:
    raise ZeroDivisionError("division by\nzero")


async def _refuse(request: Mapping[str, Any]) -> Any:
    raise MountError("no such mount", remedy="mount it")


async def _fail(request: Mapping[str, Any]) -> Any:
    raise FileNotFoundError(2, "No such file or directory", "/somewhere")


async def _unspeakable(request: Mapping[str, Any]) -> Any:
    return object()


VERBS: dict[str, Callable[[Mapping[str, Any]], Awaitable[Any]]] = {
    "echo": _echo,
    "break": _break,
    "refuse": _refuse,
    "fail": _fail,
    "unspeakable": _unspeakable,
    "reload": _echo,
}


class Server:
    """A control server in a loop of its own, as clients see it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "watchd.sock"
        self._loop = asyncio.new_event_loop()
        self._server = ControlServer(directory, VERBS, root_only=frozenset({"reload"}))
        self._thread = threading.Thread(target=self._loop.run_forever)

    @contextlib.contextmanager
    def serving(self) -> Iterator[Server]:
        self._thread.start()
        try:
            self.run(self._server.start(OPEN_TO_ALL))
            yield self
        finally:
            self.run(self._server.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def run(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=PATIENCE_S)

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.path))  # waits while the server's backlog is full
        connection.settimeout(PATIENCE_S)
        return connection

    def exchange(self, data: bytes) -> bytes:
        """Write the bytes and nothing more, and read until the server closes."""
        with self.connect() as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            return received(connection)

    def ask(self, request: Any) -> dict[str, Any]:
        return decoded(self.exchange(json.dumps(request).encode() + b"\n"))

    def is_alive(self) -> bool:
        return self.ask({"verb": "echo", "are you": "there"}) == {"ok": True, "result": {"are you": "there"}}


def received(connection: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(1 << 16):
            data += chunk
    return data


def decoded(answer: bytes) -> dict[str, Any]:
    """The one JSON object in the one line of an answer."""
    assert answer.endswith(b"\n")
    assert answer.count(b"\n") == 1
    value = json.loads(answer)
    assert isinstance(value, dict)
    if value["ok"]:
        assert set(value) == {"ok", "result"}
    else:
        assert set(value) == {"ok", "error", "kind"}
        assert "\n" not in value["error"]
    return value


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("runtime")
    directory.chmod(0o755)
    with Server(directory).serving() as server:
        yield server


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(data=st.binary(max_size=200), end=st.sampled_from([b"", b"\n", b"\n\n", b"\nmore"]))
def test_no_bytes_get_anything_but_a_refusal(server: Server, data: bytes, end: bytes) -> None:
    assert decoded(server.exchange(data + end))["kind"] == "usage"
    assert server.is_alive()


@given(request=anything)
def test_no_json_value_gets_anything_but_a_refusal(server: Server, request: Any) -> None:
    assert server.ask(request)["kind"] == "usage"


@given(verb=anything)
def test_no_verb_but_the_known_ones_gets_anything_but_a_refusal(server: Server, verb: Any) -> None:
    answer = server.ask({"verb": verb})
    assert answer.get("kind") == "usage" or verb in VERBS


@settings(max_examples=30, deadline=None)
@given(arguments=st.dictionaries(st.text().filter(lambda key: key != "verb"), anything))
def test_arguments_of_any_kind_reach_the_verb_as_they_are(server: Server, arguments: dict[str, Any]) -> None:
    answer = server.ask({"verb": "echo", **arguments})
    assert repr(answer) == repr({"ok": True, "result": arguments})  # nan is not equal to itself


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"[" * 100_000, id="nested deeply"),
        pytest.param(b'{"verb": ' + b"1" * 10_000 + b"}", id="a number without end"),
        pytest.param(b'{"verb": "echo"', id="cut short"),
        pytest.param(b"\xff\xfe{\0}\0", id="UTF-16"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_a_request_that_cannot_be_read_is_refused(server: Server, line: bytes) -> None:
    assert decoded(server.exchange(line + b"\n"))["kind"] == "usage"
    assert server.is_alive()


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["without end", "with an end"])
def test_a_line_that_is_too_long_does_not_fill_the_memory(server: Server, end: bytes) -> None:
    answer = server.exchange(b'{"verb": "' + b"x" * (4 * REQUEST_MAX_BYTES) + end)
    assert not answer or decoded(answer)["kind"] == "usage"
    assert server.is_alive()


def test_a_line_just_short_enough_is_answered(server: Server) -> None:
    text = "x" * (REQUEST_MAX_BYTES - 100)
    assert server.ask({"verb": "echo", "text": text}) == {"ok": True, "result": {"text": text}}


def test_a_peer_that_takes_its_time_is_waited_for_and_others_are_not_kept_waiting(server: Server) -> None:
    with server.connect() as slow:
        for byte in b'{"verb": "echo", "slow": true}':
            slow.sendall(bytes([byte]))
            assert server.is_alive()
        slow.sendall(b"\n")
        assert decoded(received(slow)) == {"ok": True, "result": {"slow": True}}


def test_a_request_that_never_ends_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("watchd.service.control.REQUEST_TIMEOUT_S", 0.01)
    with server.connect() as silent:
        assert "did not arrive in time" in decoded(received(silent))["error"]


def test_peers_that_go_away_leave_the_server_unharmed(server: Server) -> None:
    for data in (b"", b'{"verb"', b'{"verb": "echo"}\n', b'{"verb": "echo", "t": "' + b"x" * 500_000 + b'"}\n'):
        for _ in range(20):
            with server.connect() as gone:
                gone.sendall(data)
    assert server.is_alive()


def test_a_flood_of_connections_is_turned_away_and_ends_nothing(server: Server) -> None:
    with contextlib.ExitStack() as flood:
        held = [flood.enter_context(server.connect()) for _ in range(CONNECTIONS_MAX)]
        for connection in held:
            connection.sendall(b"{")
        for _ in range(20):
            assert server.exchange(b'{"verb": "echo"}\n') == b""
        held[0].sendall(b'"verb": "echo"}\n')
        assert decoded(received(held[0])) == {"ok": True, "result": {}}
    while not server.exchange(b'{"verb": "echo"}\n'):  # until the server has seen all of them go
        pass
    assert server.is_alive()


@pytest.mark.parametrize(
    ("verb", "kind", "error"),
    [
        ("refuse", "mount", "no such mount; mount it"),
        ("fail", "internal", "/somewhere: No such file or directory"),
        ("break", "internal", "please report it: ZeroDivisionError"),
        ("unspeakable", "internal", "please report it: TypeError"),
    ],
)
def test_a_verb_that_fails_is_one_line_of_its_kind(server: Server, verb: str, kind: str, error: str) -> None:
    answer = server.ask({"verb": verb})
    assert answer["kind"] == kind
    assert error in answer["error"]
    assert server.is_alive()


def test_names_that_are_not_utf8_come_back_as_they_were(server: Server) -> None:
    name = os.fsdecode(b"/m/\xff\xfe")
    assert server.ask({"verb": "echo", "name": name})["result"]["name"] == name


def test_a_stranger_may_ask_but_not_change_anything(server: Server) -> None:
    """The file's mode lets him in here; who he is tells the kernel."""
    program = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "for verb in ('echo', 'reload'):\n"
        "    peer = socket.socket(socket.AF_UNIX); peer.connect('watchd.sock')\n"
        "    peer.sendall(b'{\"verb\": \"%s\"}\\n' % verb.encode()); print(peer.makefile().readline(), end='')\n"
    )
    command = [sys.executable, "-I", "-c", program]
    answers = subprocess.run(command, cwd=server.directory, capture_output=True, check=True).stdout.splitlines()
    asked, changed = map(json.loads, answers)
    assert asked == {"ok": True, "result": {}}
    assert (changed["ok"], changed["kind"]) == (False, "permission")
    assert "uid 65534" in changed["error"]
    assert server.ask({"verb": "reload"})["ok"]


# ---- the file -------------------------------------------------------------------------------------------------------


def test_mode_and_group_of_the_socket_are_those_of_the_configuration(tmp_path: Path) -> None:
    with Server(tmp_path).serving() as server:
        assert server.path.stat().st_mode & 0o777 == 0o666
        server._server.permit(Control(mode=FileMode.parse("0600")))
        assert server.path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(ConfigError, match="there is no group"):
            server._server.permit(Control(group="no such group"))
    assert not server.path.exists()


def test_a_socket_left_behind_by_a_crash_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(tmp_path / "watchd.sock"))
    with Server(tmp_path).serving() as server:
        assert server.is_alive()


def test_a_file_that_is_no_socket_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "watchd.sock").write_text("precious")
    with pytest.raises(UsageError, match="is in the way"), Server(tmp_path).serving():
        pass
    assert (tmp_path / "watchd.sock").read_text() == "precious"


# ---- the verbs for consumers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch, Served(tmp_path_factory.mktemp("served"), AT_ONCE).serving() as served:
        patch.setattr(consumers, "HEARTBEAT_S", 0.01)  # so that those who left make room
        served.append([Change(1, "base", b"d/\xff", 1, True, False)] * 3)
        yield served


words = st.text() | st.sampled_from(
    ["now", "beginning", "a-name", "../x", "a/b", "0" * 16 + ":1", "\ud800", "\udcff", "\0"]
)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "since": words | anything,
        "layers": st.lists(words) | anything,
        "prefix": words | anything,
        "dirs": st.booleans() | anything,
        "ancestors": st.booleans() | anything,
        "name": words | anything,
        "cursor": words | anything,
    },
)


@settings(deadline=None)
@given(verb=st.sampled_from(["changes", "cursors", "cursor_set", "cursor_delete"]), arguments=arguments)
def test_a_consumer_with_odd_wishes_gets_an_answer_or_a_refusal(
    served: Served, verb: str, arguments: dict[str, Any]
) -> None:
    answer = decoded(exchange(served, {**arguments, "verb": verb}))
    assert answer["ok"] or answer["kind"] == "usage", answer
    inside = {path.name for path in served.directory.iterdir()}
    assert inside == {"state", "watchd.sock"}, "a cursor with a name that leads elsewhere"


@settings(deadline=None)
@given(arguments=arguments, taken=st.integers(0, 300))
def test_who_follows_with_odd_wishes_or_leaves_at_any_byte_harms_nobody(
    served: Served, arguments: dict[str, Any], taken: int
) -> None:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(PATIENCE_S)
        peer.connect(str(served.directory / "watchd.sock"))
        peer.sendall(json.dumps({"since": "beginning", **arguments, "verb": "follow"}).encode() + b"\n")
        first = peer.makefile("rb").readline()
        answer = decoded(first)
        assert answer["ok"] or answer["kind"] == "usage"
        if answer["ok"] and taken:
            peer.recv(taken)
    assert decoded(exchange(served, {"verb": "cursors"}))["ok"]


def exchange(served: Served, request: dict[str, Any]) -> bytes:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(PATIENCE_S)
        peer.connect(str(served.directory / "watchd.sock"))
        peer.sendall(json.dumps(request).encode() + b"\n")
        return received(peer)
