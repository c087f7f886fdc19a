"""What a ledger says to the process that comes after the one that kept it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import msgspec
import pytest

from watchd.kernel.files import FileHandle
from watchd.service.ledger import DATA_AT, LEDGER_BYTES, SLOTS, SLOTS_AT, GroupLedger, Purpose
from watchd.sources.base import WatchedLayer

PURPOSE = Purpose(device=1, flags=2, mask=3)
EPOCH = "00112233aabbccdd"
ROOT = FileHandle(1, b"root")


def layer(name: str, path: bytes = b"/low", root: FileHandle = ROOT) -> WatchedLayer:
    return WatchedLayer(name, path, 1, root, open=lambda: -1, open_mount=lambda: -1)


Reopen = Callable[[], GroupLedger]


@pytest.fixture
def ledger() -> Iterator[GroupLedger]:
    """A new one."""
    ledger = GroupLedger.create(PURPOSE, EPOCH)
    yield ledger
    ledger.close()


@pytest.fixture
def reopen(ledger: GroupLedger) -> Iterator[Reopen]:
    """`reopen()`: as the next process sees it."""
    opened: list[GroupLedger] = []

    def reopen() -> GroupLedger:
        opened.append(GroupLedger(os.dup(ledger.descriptor)))
        return opened[-1]

    yield reopen
    for one in opened:
        one.close()


def test_a_ledger_says_what_its_group_is_for(ledger: GroupLedger, reopen: Reopen) -> None:
    ledger.enter(layer("one"))
    ledger.enter(layer("two", b"/\xff"))
    ledger.leave("one")
    after = reopen()
    assert after.purpose == PURPOSE
    assert after.remembers(layer("two", b"/\xff"))
    assert not after.remembers(layer("one"))
    assert not after.remembers(layer("two", b"/other"))
    assert not after.remembers(layer("two", b"/\xff", FileHandle(1, b"another directory")))


def read(ledger: GroupLedger, *readings: bytes) -> int:
    """What the thread does that reads the group; the number of the last reading."""
    for data in readings:
        take(ledger, data)
    return ledger.told()


def take(ledger: GroupLedger, data: bytes) -> None:
    queue = os.memfd_create("queue")
    os.write(queue, data)
    os.lseek(queue, 0, os.SEEK_SET)
    assert ledger.read(queue, max(len(data), 1)) == data
    os.close(queue)


def test_what_was_read_can_be_had_until_it_was_recorded(ledger: GroupLedger, reopen: Reopen) -> None:
    assert reopen().go_on(EPOCH, 0) == []
    ledger.recorded(read(ledger, b"one", b"two"), upto=7, scans=0)
    ledger.recorded(read(ledger, b"three"), upto=8, scans=0)
    assert reopen().go_on("another", 10) is None
    assert reopen().go_on(EPOCH, 7) == [b"three"]


def test_what_was_never_given_to_the_journal_is_had_again(ledger: GroupLedger, reopen: Reopen) -> None:
    read(ledger, b"one")
    take(ledger, b"two")  # and nobody was told
    assert reopen().go_on(EPOCH, 10) == [b"one", b"two"]


def test_what_was_committed_is_not_had_again(ledger: GroupLedger, reopen: Reopen) -> None:
    ledger.recorded(read(ledger, b"one"), upto=7, scans=0)
    ledger.committed(6)
    ledger.committed(7)
    assert reopen().go_on(EPOCH, 6) is None, "the journal has lost its end"
    assert reopen().go_on(EPOCH, 7) == []


EVENTS = b"".join(length.to_bytes(4, "little") + b"x" * (length - 4) for length in (24, 56, 40))


class Killed(Exception):
    """Before read(2) could return."""


def killed_in_read(ledger: GroupLedger, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    def readv(descriptor: int, buffers: list[memoryview]) -> int:
        buffers[0][: len(data)] = data
        image.append(os.pread(ledger.descriptor, LEDGER_BYTES, 0))
        raise Killed

    image: list[bytes] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "readv", readv)
        with pytest.raises(Killed):
            ledger.read(-1, 4096)
    os.pwrite(ledger.descriptor, image[0], 0)


def test_what_was_read_by_whoever_was_killed_in_read_is_known(
    ledger: GroupLedger, reopen: Reopen, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(ledger, b"before")
    killed_in_read(ledger, monkeypatch, EVENTS)
    after = reopen()
    assert after.go_on(EPOCH, 0) == [b"before", EVENTS]
    read(after, b"later")
    assert reopen().go_on(EPOCH, 0) == [b"before", EVENTS, b"later"]


def test_who_was_killed_before_it_could_read_has_read_nothing(
    ledger: GroupLedger, reopen: Reopen, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.recorded(read(ledger, EVENTS), upto=1, scans=0)
    ledger.committed(1)
    killed_in_read(ledger, monkeypatch, b"")
    assert reopen().go_on(EPOCH, 1) == []


def test_a_reading_that_was_counted_already_is_not_counted_again(
    ledger: GroupLedger, reopen: Reopen, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_in_read(ledger, monkeypatch, EVENTS)
    after = reopen()
    assert after.go_on(EPOCH, 0) == [EVENTS]
    os.pwrite(ledger.descriptor, (DATA_AT).to_bytes(8, sys.byteorder), 16)  # killed before that was taken back
    os.pwrite(ledger.descriptor, bytes(8), 64)
    assert reopen().go_on(EPOCH, 0) == [EVENTS]


def test_a_queue_that_is_empty_has_nothing_to_be_kept(ledger: GroupLedger, reopen: Reopen) -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        ledger.read(reader, 4096)
    os.close(reader)
    os.close(writer)
    assert reopen().go_on(EPOCH, 0) == []


def test_what_was_read_when_the_ring_was_full_is_not_known(
    ledger: GroupLedger, reopen: Reopen, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(ledger, *(b"x" * (1 << 20) for _ in range(4)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", lambda descriptor, size: kept.append(reopen().go_on(EPOCH, 0)) or b"")
        kept: list[object] = []
        ledger.read(-1, 4096)
    assert kept == [None]


def test_what_concerns_nobody_is_forgotten_at_once(ledger: GroupLedger, reopen: Reopen) -> None:
    last = read(ledger, b"told")
    take(ledger, b"nothing")
    take(ledger, b"nothing either")
    ledger.nothing()
    assert read(ledger, b"told too") == last + 1
    assert reopen().go_on(EPOCH, 0) == [b"told", b"told too"]


def test_a_directory_that_came_in_counts_until_it_was_scanned(ledger: GroupLedger, reopen: Reopen) -> None:
    first = ledger.recorded(read(ledger, b"came in"), upto=1, scans=1)
    ledger.recorded(read(ledger, b"later"), upto=2, scans=0)
    ledger.committed(2)
    assert reopen().go_on(EPOCH, 9) == [b"came in"]
    ledger.scanned(first, 3)
    assert reopen().go_on(EPOCH, 3) == []


def test_what_was_had_again_is_recorded_under_new_numbers(ledger: GroupLedger, reopen: Reopen) -> None:
    ledger.recorded(read(ledger, b"one"), upto=5, scans=0)  # and the journal is killed before it has written that
    after = reopen()
    assert after.go_on(EPOCH, 3) == [b"one"]
    read(after, b"two")
    assert reopen().go_on(EPOCH, 5) == [b"one", b"two"], "record 5 is another one by now"
    third = reopen()
    assert third.go_on(EPOCH, 5) is None, "whoever got it died of it"
    after.recorded(after.told(), upto=6, scans=0)
    after.committed(6)
    assert reopen().go_on(EPOCH, 6) == []


@pytest.mark.parametrize("length", [1, 1000, 256 << 10, 1 << 20])
def test_readings_without_end_are_kept_as_long_as_they_are_needed(
    ledger: GroupLedger, reopen: Reopen, length: int
) -> None:
    pending: list[tuple[int, bytes]] = []
    for number in range(3 * SLOTS if length < 10_000 else 40):
        data = bytes([number % 256]) * (length + number % 7)
        pending.append((read(ledger, data), data))
        ledger.recorded(pending[-1][0], upto=number + 1, scans=0)
        if len(pending) == 3:
            ledger.committed(number)
            pending = pending[2:]
    assert reopen().go_on(EPOCH, number - len(pending) + 1) == [data for _, data in pending]


@pytest.mark.parametrize(("count", "length"), [(SLOTS + 1, 1), (5, 1 << 20)])
def test_more_than_fits_is_not_known(ledger: GroupLedger, reopen: Reopen, count: int, length: int) -> None:
    for number in range(count):
        ledger.recorded(read(ledger, b"x" * length), upto=number + 1, scans=0)
    assert reopen().go_on(EPOCH, 0) is None
    ledger.committed(count)
    ledger.recorded(read(ledger, b"one more"), upto=count + 1, scans=0)
    assert reopen().go_on(EPOCH, count) == [b"one more"]


def test_a_new_beginning_forgets_the_layers(ledger: GroupLedger, reopen: Reopen) -> None:
    ledger.enter(layer("one"))
    read(ledger, b"one")
    after = reopen()
    assert after.go_on("another", 0) is None
    after.begin_anew("another")
    assert reopen().go_on("another", 0) == []
    assert not reopen().remembers(layer("one"))
    assert reopen().purpose == PURPOSE


def test_more_layers_than_fit_are_all_forgotten(ledger: GroupLedger, reopen: Reopen) -> None:
    ledger.enter(layer("one"))
    ledger.enter(layer("two", b"x" * SLOTS_AT))
    assert reopen().purpose is None
    ledger.leave("two")
    assert reopen().remembers(layer("one"))


@pytest.mark.parametrize("content", [b"", b"\xff" * 4096, msgspec.msgpack.encode(["x"])])
def test_a_memfd_that_is_no_ledger_says_nothing(content: bytes) -> None:
    descriptor = os.memfd_create("anything")
    os.truncate(descriptor, LEDGER_BYTES)
    os.pwrite(descriptor, content, 0)
    ledger = GroupLedger(descriptor)
    assert ledger.purpose is None
    assert ledger.go_on(EPOCH, 0) is None
    ledger.close()


def test_what_was_killed_while_writing_is_not_believed(ledger: GroupLedger, reopen: Reopen) -> None:
    ledger.enter(layer("one"))
    os.pwrite(ledger.descriptor, bytes(8), 8)  # the length, which is taken away before anything else is written
    assert reopen().purpose is None
    assert not reopen().remembers(layer("one"))
    assert reopen().go_on(EPOCH, 9) is None


def test_something_too_small_is_refused() -> None:
    descriptor = os.memfd_create("anything")
    with pytest.raises(ValueError, match="mmap"):
        GroupLedger(descriptor)
    os.close(descriptor)
