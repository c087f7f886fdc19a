"""The worker's thread, with a source that is a pipe."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import pytest

from watchd.errors import WatchdError
from watchd.records import Change, Kind
from watchd.sources import worker as worker_module
from watchd.sources.base import Batch, WatchedLayer
from watchd.sources.worker import GATHER_RECORDS, Worker

PATIENCE_S = 30.0


def change(path: bytes) -> Change:
    return Change(1, "layer", path, Kind.CREATE, True, False)


class PipeSource:
    """Each line that is written to it is a batch of one change; `fail` breaks it."""

    backend = "pipe"

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.error: Exception | None = None
        self.names_in_a_batch = 1
        self.barriers: tuple[bytes, ...] = ()
        self.asked = 0
        self.closed = threading.Event()
        self.idled = threading.Event()
        self.collected: Callable[[], None] = lambda: None

    def write(self, *names: bytes) -> None:
        os.write(self._writing, b"".join(name + b"\n" for name in names))

    def fileno(self) -> int:
        return self._reading

    def collect(self) -> Batch | None:
        self.asked += 1
        if self.error is not None:
            raise self.error
        name = b""
        try:
            while (byte := os.read(self._reading, 1)) != b"\n":
                name += byte
        except BlockingIOError:
            return None
        self.collected()
        if name == b"outside":
            return Batch([], {}, read_ns=1, complete_ns=1)
        return Batch([change(name)], {"layer": self.names_in_a_batch}, read_ns=1, barriers=self.barriers)

    def idle(self) -> None:
        self.idled.set()

    def add(self, layer: WatchedLayer) -> None: ...

    def remove(self, name: str) -> None: ...

    def recover(self) -> None: ...

    def close(self) -> None:
        os.close(self._reading)
        os.close(self._writing)
        self.closed.set()


class Told:
    """Everything the worker says, in order."""

    def __init__(self) -> None:
        self._said: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self.threads: set[str] = set()

    def next(self) -> tuple[str, Any]:
        return self._said.get(timeout=PATIENCE_S)

    def until(self, what: str) -> list[tuple[str, Any]]:
        said = [self.next()]
        while said[-1][0] != what:
            said.append(self.next())
        return said

    def nothing(self) -> bool:
        return self._said.empty()

    def say(self, what: str, value: Any = None) -> None:
        self.threads.add(threading.current_thread().name)
        self._said.put((what, value))

    def batch(self, worker: Worker, batch: Batch) -> None:
        self.say("batch", batch.changes[0].path)

    def flush(self) -> None:
        self.say("flush")

    def lost(self, worker: Worker, error: Exception) -> None:
        self.say("lost", error)


@pytest.fixture
def source() -> PipeSource:
    return PipeSource()


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def worker(source: PipeSource, told: Told) -> Iterator[Worker]:
    worker = Worker(source, told, name="worker under test")
    worker.start()
    yield worker
    if worker.is_alive():
        worker.stop()


def result_of(future: Future[Any]) -> Any:
    return future.result(timeout=PATIENCE_S)


def held(worker: Worker) -> threading.Event:
    """Keep the worker busy until the event is set."""
    release, begun = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert release.wait(PATIENCE_S)

    worker.submit(wait)
    assert begun.wait(PATIENCE_S)
    return release


def test_what_concerns_no_layer_wakes_nobody(source: PipeSource, told: Told, worker: Worker) -> None:
    source.write(*[b"outside"] * 100, b"inside")
    assert told.until("batch") == [("batch", b"inside")]
    assert source.asked > 100


def test_batches_are_told_in_order_and_recorded_when_there_is_rest(
    source: PipeSource, told: Told, worker: Worker
) -> None:
    source.write(*(b"%d" % number for number in range(100)))
    said: list[tuple[str, Any]] = []
    while [value for what, value in said if what == "batch"][-1:] != [b"99"]:
        said.append(told.next())
    assert [value for what, value in said if what == "batch"] == [b"%d" % number for number in range(100)]
    assert told.next() == ("flush", None)
    assert told.threads == {"worker under test"}


def test_without_rest_records_are_not_held_back_for_ever(
    source: PipeSource, told: Told, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("watchd.sources.worker.FLUSH_MAX_NS", 0)
    release = held(worker)
    source.write(b"a", b"b", b"c")
    release.set()
    assert [told.next() for _ in range(3)] == [("batch", b"a"), ("batch", b"b"), ("flush", None)]


def test_nobody_who_waits_for_a_barrier_waits_for_rest(
    source: PipeSource, told: Told, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("watchd.sources.worker.FLUSH_MAX_NS", 1 << 62)
    release = held(worker)
    source.barriers = (b"token",)
    source.names_in_a_batch = GATHER_RECORDS
    source.write(b"a", b"b")
    release.set()
    assert [told.next() for _ in range(4)] == [("batch", b"a"), ("flush", None), ("batch", b"b"), ("flush", None)]


def test_after_a_while_without_events_the_source_lets_go_of_what_is_open(
    source: PipeSource, told: Told, worker: Worker
) -> None:
    source.write(b"a")
    assert told.until("flush")
    assert source.idled.wait(PATIENCE_S)


def test_a_broken_source_is_told_once_and_not_asked_again(source: PipeSource, told: Told, worker: Worker) -> None:
    source.error = OSError(5, "Input/output error")
    source.write(b"a")
    assert told.next() == ("lost", source.error)
    assert told.next() == ("flush", None)
    source.idled.clear()
    source.write(b"b")
    assert result_of(worker.submit(lambda: "still here")) == "still here"
    assert source.asked == 1
    assert worker.queued_bytes() == 0
    worker.stop()
    assert source.closed.is_set()
    assert not source.idled.is_set()
    assert told.nothing()


def test_a_source_that_breaks_while_it_lets_go_is_lost_too(source: PipeSource, told: Told, worker: Worker) -> None:
    error = OSError(5, "Input/output error")

    def idle() -> None:
        raise error

    source.idle = idle  # type: ignore[method-assign]
    assert result_of(worker.submit(lambda: 1)) == 1
    assert told.next() == ("lost", error)


def test_what_is_asked_of_the_source_happens_in_its_thread_and_errors_come_back(worker: Worker) -> None:
    assert result_of(worker.submit(lambda: threading.current_thread().name)) == worker.name
    with pytest.raises(ZeroDivisionError):
        result_of(worker.submit(lambda: 1 // 0))
    assert result_of(worker.submit(lambda: "unharmed")) == "unharmed"


def test_a_request_that_was_cancelled_is_not_carried_out(worker: Worker) -> None:
    release = held(worker)
    done: list[str] = []
    cancelled = worker.submit(lambda: done.append("cancelled"))
    assert cancelled.cancel()
    after = worker.submit(lambda: done.append("after"))
    release.set()
    result_of(after)
    assert done == ["after"]


def test_what_the_kernel_holds_is_counted(source: PipeSource, worker: Worker) -> None:
    release = held(worker)
    source.write(b"12345")
    assert worker.queued_bytes() == 6
    release.set()
    worker.stop()
    assert worker.queued_bytes() == 0


# ---- scans ----------------------------------------------------------------------------------------------------------


def scan(worker: Worker, told: Told, slices: Generator[list[Change], None, object]) -> None:
    worker.scan(slices, lambda changes: told.say("found", changes[0].path), lambda error: told.say("done", error))


def slices(*names: bytes) -> Generator[list[Change], None, None]:
    for name in names:
        yield [change(name)] if name else []


def test_a_scan_tells_its_slices_and_its_end(told: Told, worker: Worker) -> None:
    scan(worker, told, slices(b"a", b"", b"b"))
    assert [entry for entry in told.until("done") if entry[0] != "flush"] == [
        ("found", b"a"),
        ("found", b"b"),
        ("done", None),
    ]


def test_a_scan_that_fails_says_so_and_the_next_one_goes_on(told: Told, worker: Worker) -> None:
    error = OSError(5, "Input/output error")

    def failing() -> Generator[list[Change], None, None]:
        yield [change(b"a")]
        raise error

    scan(worker, told, failing())
    scan(worker, told, slices(b"b"))
    assert [entry for entry in told.until("done") if entry[0] != "flush"] == [("found", b"a"), ("done", error)]
    assert [entry for entry in told.until("done") if entry[0] != "flush"] == [("found", b"b"), ("done", None)]


def test_events_are_collected_during_a_long_scan(source: PipeSource, told: Told, worker: Worker) -> None:
    def long() -> Generator[list[Change], None, None]:
        for number in range(50):
            source.write(b"event %d" % number)
            yield [change(b"slice %d" % number)]

    scan(worker, told, long())
    said = [value for what, value in told.until("done") if what in ("batch", "found")]
    assert [value for value in said if value.startswith(b"event")][:49] == [b"event %d" % n for n in range(49)]
    for number in range(49):
        assert said.index(b"event %d" % number) < said.index(b"slice %d" % (number + 1))


def test_a_scan_comes_to_its_end_though_events_never_stop(source: PipeSource, told: Told, worker: Worker) -> None:
    """Else a layer that lost events under load would stay out of step for as long as the load lasts."""
    source.collected = lambda: source.write(b"again")
    source.write(b"first")
    scan(worker, told, slices(b"a", b"b", b"c"))
    assert [value for what, value in told.until("done") if what == "found"] == [b"a", b"b", b"c"]


# ---- the end --------------------------------------------------------------------------------------------------------


def test_what_happened_during_a_slice_is_told_before_what_the_slice_found(
    source: PipeSource, told: Told, worker: Worker
) -> None:
    def slices() -> Generator[list[Change], None, None]:
        source.write(b"event")
        yield [change(b"found")]

    worker.scan(slices(), lambda changes: told.say("found", changes[0].path), lambda error: told.say("done"))
    said = [what for what in told.until("done") if what[0] in ("batch", "found")]
    assert said == [("batch", b"event"), ("found", b"found")]


def test_a_scan_in_the_background_lets_others_go_first(told: Told, worker: Worker) -> None:
    may_go_on = threading.Event()

    def long() -> Generator[list[Change], None, None]:
        yield []
        assert may_go_on.wait(PATIENCE_S)
        yield []

    def done(what: str) -> Callable[[Exception | None], None]:
        return lambda error: told.say("done", what)

    worker.scan(long(), lambda changes: None, done("background"), background=True)
    worker.scan(iter_of([]), lambda changes: None, done("urgent"))
    may_go_on.set()
    assert [told.until("done")[-1] for _ in range(2)] == [("done", "urgent"), ("done", "background")]


def test_a_scan_in_the_background_does_not_hold_up_events(
    source: PipeSource, told: Told, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "BACKGROUND_WAIT_S", 3600.0)

    def slices() -> Generator[list[Change], None, None]:
        source.write(*[b"event"] * 20)
        yield []
        told.say("slice")
        yield []

    worker.scan(slices(), lambda changes: None, lambda error: told.say("done"), background=True)
    assert [what for what, _ in told.until("slice") if what == "batch"] == ["batch"] * 20
    told.until("done")


def test_a_scan_in_the_background_ends_even_if_events_never_do(
    source: PipeSource, told: Told, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "BACKGROUND_WAIT_S", 0.001)
    ended = threading.Event()
    source.collected = lambda: source.write(b"one more")
    source.write(b"the first")
    told.until("batch")
    worker.scan(iter_of([], []), lambda changes: None, lambda error: ended.set(), background=True)
    assert ended.wait(PATIENCE_S)
    source.collected = lambda: None


def iter_of(*slices: list[Change]) -> Generator[list[Change], None, None]:
    yield from slices


def test_stop_closes_the_source_and_the_scans(source: PipeSource, told: Told, worker: Worker) -> None:
    closed = threading.Event()

    def endless() -> Generator[list[Change], None, None]:
        try:
            while True:
                yield [change(b"a")]
        finally:
            closed.set()

    scan(worker, told, endless())
    told.until("found")
    worker.stop()
    assert closed.is_set()
    assert source.closed.is_set()
    assert not worker.is_alive()


def test_nothing_is_taken_on_after_the_end(worker: Worker) -> None:
    worker.stop()
    with pytest.raises(WatchdError, match="was stopped"):
        result_of(worker.submit(lambda: "never"))


def test_who_asked_before_the_end_is_answered(source: PipeSource, worker: Worker) -> None:
    """Else whoever waits for the answer waits for ever."""
    collecting, release = threading.Event(), threading.Event()

    def collected() -> None:
        collecting.set()
        assert release.wait(PATIENCE_S)

    source.collected = collected
    source.write(b"a")
    assert collecting.wait(PATIENCE_S)
    waiting = worker.submit(lambda: "too late")
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    while not worker._stopping:
        stopper.join(0.001)
    release.set()
    stopper.join(PATIENCE_S)
    with pytest.raises(WatchdError, match="was stopped"):
        result_of(waiting)
