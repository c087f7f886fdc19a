from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from watchd.service.notify import has_manager, inherited, notify, reloading, watchdog_interval_s


@pytest.fixture
def manager() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        yield sock


@pytest.fixture
def address(manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = str(tmp_path / "notify")
    manager.bind(path)
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    return path


def test_the_manager_is_told_a_line_for_each_field(manager: socket.socket, address: str) -> None:
    notify(READY=1, STATUS="3 mounts, ümlaut")
    assert manager.recv(4096).decode() == "READY=1\nSTATUS=3 mounts, ümlaut"


def test_an_abstract_address_is_understood(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    manager.bind(f"\0watchd-test-{os.getpid()}")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@watchd-test-{os.getpid()}")
    notify(WATCHDOG=1)
    assert manager.recv(4096) == b"WATCHDOG=1"


def test_descriptors_are_handed_over(manager: socket.socket, address: str) -> None:
    reader, writer = os.pipe()
    notify(FDSTORE=1, FDNAME="pipe", descriptors=[writer])
    os.close(writer)
    message, [copy], _, _ = socket.recv_fds(manager, 4096, 4)
    assert message == b"FDSTORE=1\nFDNAME=pipe"
    os.write(copy, b"x")
    assert os.read(reader, 1) == b"x"
    os.close(copy)
    os.close(reader)


@pytest.mark.parametrize(
    ("pid", "count", "names", "found"),
    [
        (None, "2", "one:two", {"one": [3], "two": [4]}),
        (None, "3", "one:two:one", {"one": [3, 5], "two": [4]}),
        (None, "2", "one", {"one": [3], "": [4]}),
        (None, "2", "", {"": [3, 4]}),
        (None, "", "one", {}),
        (None, "-1", "one", {}),
        (1, "2", "one:two", {}),
    ],
)
def test_what_the_manager_passes_is_found_by_name_and_not_passed_on(
    monkeypatch: pytest.MonkeyPatch, pid: int | None, count: str, names: str, found: dict[str, list[int]]
) -> None:
    secluded: list[tuple[int, bool]] = []
    monkeypatch.setattr(os, "set_inheritable", lambda descriptor, yes: secluded.append((descriptor, yes)))
    monkeypatch.setenv("LISTEN_PID", str(pid or os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", count)
    monkeypatch.setenv("LISTEN_FDNAMES", names)
    assert inherited() == found
    assert sorted(secluded) == sorted((descriptor, False) for group in found.values() for descriptor in group)
    assert not {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} & os.environ.keys()
    assert inherited() == {}


def test_a_reload_tells_when_it_began(manager: socket.socket, address: str) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    reloading()
    fields = dict(line.split("=") for line in manager.recv(4096).decode().splitlines())
    assert fields.keys() == {"RELOADING", "MONOTONIC_USEC"}
    assert before <= int(fields["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not has_manager()
    notify(READY=1)
    monkeypatch.setenv("NOTIFY_SOCKET", "")
    notify(READY=1)


def test_a_manager_that_is_gone_is_no_error(address: str) -> None:
    os.unlink(address)
    notify(WATCHDOG=1)


def test_a_manager_that_does_not_read_stops_nobody(manager: socket.socket, address: str) -> None:
    for _ in range(2000):  # more than any queue of datagrams holds
        notify(STATUS="x" * 1000)
    assert manager.recv(4096).startswith(b"STATUS=x")


@pytest.mark.parametrize(
    ("limit_us", "pid", "interval_s"),
    [
        ("30000000", None, 15.0),
        ("30000000", os.getpid(), 15.0),
        ("30000000", 1, None),
        ("0", None, None),
        ("never", None, None),
        (None, None, None),
    ],
)
def test_the_watchdog_is_fed_twice_in_its_time_if_it_is_ours(
    monkeypatch: pytest.MonkeyPatch, limit_us: str | None, pid: int | None, interval_s: float | None
) -> None:
    for name, value in (("WATCHDOG_USEC", limit_us), ("WATCHDOG_PID", pid)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(value))
    assert watchdog_interval_s() == interval_s
