"""Following, changes and cursors over the control socket, asked for with both clients."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pytest

from tests.unit.served import Served, open_segments
from watchd.client import AsyncClient, Changes, Client, Cursor, Followed, PathEntry
from watchd.errors import DaemonUnreachableError, JournalError, NotPermittedError, UsageError
from watchd.journal.reader import read
from watchd.journal.writer import JournalSettings
from watchd.records import Change, Desync, Kind, Record
from watchd.service import consumers

SETTINGS = JournalSettings(max_delay_ns=0, segment_size_bytes=5_000)


def changed(*paths: bytes, layer: str = "base") -> list[Record]:
    return [Change(7, layer, path, Kind.MODIFY, True, False, pid=8, command=b"mv\xff") for path in paths]


def numbered(numbers: range) -> list[Record]:
    return changed(*(b"%d" % number for number in numbers))


def paths(found: list[Followed]) -> list[bytes]:
    return [one.record.path for one in found if isinstance(one.record, Change)]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path, SETTINGS).serving() as served:
        yield served


class Asker(Protocol):
    """Both clients, for a test."""

    def take(self, count: int, since: str = "now", **options: Any) -> list[Followed]:
        """So many records of `follow`."""

    def ask(self, question: str, *words: Any, **options: Any) -> Any:
        """What the method of this name gives."""


class Blocking:
    def __init__(self, directory: Path) -> None:
        self._client = Client(directory)

    def take(self, count: int, since: str = "now", **options: Any) -> list[Followed]:
        with self._client.follow(since, **options) as records:
            return list(itertools.islice(records, count))

    def ask(self, question: str, *words: Any, **options: Any) -> Any:
        return getattr(self._client, question)(*words, **options)


class Asynchronous:
    def __init__(self, directory: Path) -> None:
        self._client = AsyncClient(directory)

    def take(self, count: int, since: str = "now", **options: Any) -> list[Followed]:
        async def take() -> list[Followed]:
            found: list[Followed] = []
            async with self._client.follow(since, **options) as records:
                while len(found) < count:
                    found.append(await anext(records))
            return found

        return asyncio.run(take())

    def ask(self, question: str, *words: Any, **options: Any) -> Any:
        async def ask() -> Any:
            return await getattr(self._client, question)(*words, **options)

        return asyncio.run(ask())


@pytest.fixture(params=[Blocking, Asynchronous], ids=["blocking", "asyncio"])
def asker(served: Served, request: pytest.FixtureRequest) -> Asker:
    make: Callable[[Path], Asker] = request.param
    return make(served.directory)


# ---- follow ---------------------------------------------------------------------------------------------------------


def test_what_was_there_and_what_comes_are_told_once_and_in_order(served: Served, asker: Asker) -> None:
    for start in range(0, 1000, 100):  # in several segments
        served.append(numbered(range(start, start + 100)))
    found = asker.take(600, "beginning")
    served.append(numbered(range(1000, 1500)))
    found += asker.take(900, found[-1].cursor)
    assert [one.seq for one in found] == list(range(1, 1501))
    assert paths(found) == [b"%d" % number for number in range(1500)]
    assert found[-1].cursor == f"{served.journal.epoch}:1500"
    assert found[0].record == numbered(range(1))[0], "as it was appended, bytes that are not UTF-8 too"


def test_records_that_come_while_one_waits_are_told(served: Served) -> None:
    with Client(served.directory).follow() as records:
        for number in range(20):
            served.append(numbered(range(number, number + 1)))
            assert paths([next(records)]) == [b"%d" % number]


def test_nothing_is_told_that_is_not_on_disk_yet(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the file already could still be taken back by a power cut."""
    monkeypatch.setattr(consumers, "HEARTBEAT_S", 0.01)
    served.append(changed(b"durable"))
    with Client(served.directory).follow("beginning") as records, socket.socket(socket.AF_UNIX) as raw:
        assert paths([next(records)]) == [b"durable"]
        served.disk.is_fast.clear()
        served.append(changed(b"written"), durable=False)
        raw.connect(str(served.directory / "watchd.sock"))
        raw.sendall(b'{"verb": "follow", "since": "beginning"}\n')
        lines = raw.makefile("rb")
        told = [lines.readline() for _ in range(10)]
        assert b"durable" in told[1]
        assert not any(b"written" in line for line in told)
        served.disk.is_fast.set()
        assert paths([next(records)]) == [b"written"]


def test_only_the_layers_asked_for_are_told_and_the_cursor_passes_the_others(served: Served, asker: Asker) -> None:
    served.append(changed(b"a", layer="one") + changed(b"b", layer="two") + [Desync(7, "one", "overflow")])
    served.append(changed(b"c", layer="one"))
    found = asker.take(2, "beginning", layers=["one"])
    assert [(one.seq, type(one.record)) for one in found] == [(1, Change), (3, Desync)]
    assert paths(asker.take(1, found[-1].cursor, layers=["one"])) == [b"c"]
    with Client(served.directory).follow("beginning", layers=["two"]) as records:
        assert paths([next(records)]) == [b"b"]
        served.append(changed(b"d", layer="two"))
        assert paths([next(records)]) == [b"d"]
        assert records.cursor == f"{served.journal.epoch}:5"


def test_who_takes_nothing_makes_nobody_remember(served: Served) -> None:
    """The daemon reads on only when what it read is taken."""
    with Client(served.directory).follow("beginning") as records:
        for start in range(0, 30_000, 3000):
            served.append(numbered(range(start, start + 3000)))
        [reading] = served.look(lambda: [*served.consumers.readings])
        assert served.journal.durable_seq == 30_000
        assert reading.seq < 15_000
        assert paths(list(itertools.islice(records, 30_000))) == [b"%d" % number for number in range(30_000)]


def test_followers_are_bounded_and_one_that_went_makes_room(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumers, "FOLLOWERS_MAX", 3)
    monkeypatch.setattr(consumers, "HEARTBEAT_S", 0.01)
    client = Client(served.directory)
    held = [client.follow() for _ in range(3)]
    with pytest.raises(UsageError, match="3 connections follow already"):
        client.follow()
    held.pop().close()
    while served.look(lambda: len(served.consumers.readings)) == 3:  # until a heartbeat meets nobody
        os.sched_yield()
    client.follow().close()
    for one in held:
        one.close()
    while len(open_segments(served.directory)) > 1:  # the writer's own
        os.sched_yield()


def test_a_daemon_that_stops_says_so_behind_the_last_record(served: Served) -> None:
    with Client(served.directory).follow("beginning") as records:
        served.append(changed(b"last"))
        served.run(served.stop())
        assert paths([next(records)]) == [b"last"]
        for _ in range(2):
            with pytest.raises(DaemonUnreachableError, match="it was told to stop; start it"):
                next(records)
        assert records.cursor == f"{served.journal.epoch}:1"


def test_a_daemon_that_stops_does_not_wait_for_who_takes_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers, "END_S", 0.01)
    served.append(numbered(range(20_000)))
    with Client(served.directory).follow("beginning") as records:
        served.run(served.stop())
        with pytest.raises(DaemonUnreachableError):
            for _ in records:
                pass
        assert int(records.cursor.partition(":")[2]) < 20_000


def test_a_daemon_that_gives_no_sign_of_life_is_lost(
    served: Served, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DaemonUnreachableError, match="no sign of life for"):
        asker.take(1, silence=0.01)
    monkeypatch.setattr(consumers, "HEARTBEAT_S", 0.001)
    with Client(served.directory).follow(silence=10) as records:
        served.append(changed(b"heard"))
        assert paths([next(records)]) == [b"heard"]


def test_who_comes_too_late_is_told(served: Served) -> None:
    served.append(numbered(range(1000)))
    served.journal.first_seq = 500  # as retention leaves it
    client = Client(served.directory)
    for since, fresh, first in ((":100", True, 500), (":498", True, 500), (":499", False, 500), (":600", False, 601)):
        with client.follow(f"{served.journal.epoch}{since}") as records:
            assert records.fresh is fresh
            assert next(records).seq == first


@pytest.mark.parametrize(("gone", "message"), [(1, "is damaged"), (-1, "lacks the records behind")])
def test_a_journal_that_breaks_ends_the_following_with_an_error(served: Served, gone: int, message: str) -> None:
    for start in range(0, 1000, 100):
        served.append(numbered(range(start, start + 100)))
    segments = sorted((served.directory / "state/journal").glob("*.wal"))
    segments[gone].unlink()
    with Client(served.directory).follow("beginning") as records, pytest.raises(JournalError, match=message):
        list(records)


def test_what_a_failed_disk_took_back_was_told_to_nobody(served: Served) -> None:
    async def recover() -> None:
        await asyncio.wait([served.journal.failed])
        served.disk.is_broken = False
        await served.journal.reopen()

    told: list[bytes] = []
    with Client(served.directory).follow("beginning") as records:
        for number in range(5):
            served.append(changed(b"good%d" % number))
            served.disk.is_broken = True
            served.append(changed(b"doubtful%d" % number), durable=False)
            served.run(recover())
        last = served.append(changed(b"last"))
        while len(told) < last:
            told += paths([next(records)])
    assert told == [one.record.path for one in read_all(served)]
    assert told[-1] == b"last"


def read_all(served: Served) -> list[Followed]:
    """What the files hold."""
    return [
        Followed(f"{served.journal.epoch}:{seq}", record) for seq, record in read(served.directory / "state/journal")
    ]


def test_a_journal_that_was_begun_anew_ends_the_following(served: Served) -> None:
    served.append(changed(b"a"))
    with Client(served.directory).follow("beginning") as records:
        assert paths([next(records)]) == [b"a"]
        served.journal.epoch = "0" * 16
        served.append(changed(b"b"))
        with pytest.raises(JournalError, match="begun anew"):
            next(records)


# ---- changes and cursors --------------------------------------------------------------------------------------------


def test_changes_are_each_path_once_with_exact_names(served: Served, asker: Asker) -> None:
    served.append(changed(b"d/\xff", b"d/\xff", b"e"))
    answer = asker.ask("changes", "beginning", prefix=b"d")
    assert answer == Changes(
        cursor=f"{served.journal.epoch}:3",
        fresh=False,
        entries=(PathEntry(layer="base", path=b"d/\xff", kinds=("modify",), exists=True, is_dir=False, seq=2),),
    )
    assert asker.ask("changes", answer.cursor).entries == ()
    assert asker.ask("changes", "beginning", layers=["other"]).entries == ()
    told = asker.ask("changed_directories", "beginning", ancestors=True)
    assert [(one.path, one.seq) for one in told.entries] == [(b"", 3), (b"d", 2)]


def test_named_cursors_are_set_listed_taken_as_baseline_and_deleted(served: Served, asker: Asker) -> None:
    served.append(changed(b"a"))
    here = asker.ask("set_cursor", "mirror")
    assert here == f"{served.journal.epoch}:1"
    assert asker.ask("set_cursor", "start", "beginning") == f"{served.journal.epoch}:0"
    served.append(changed(b"b"))
    assert asker.ask("cursors") == (
        Cursor(name="mirror", cursor=here), Cursor(name="start", cursor=f"{served.journal.epoch}:0"),
    )  # fmt: skip
    assert [one.path for one in asker.ask("changes", "mirror").entries] == [b"b"]
    assert paths(asker.take(1, "mirror")) == [b"b"]
    asker.ask("delete_cursor", "mirror")
    with pytest.raises(UsageError, match="there is no cursor 'mirror'"):
        asker.ask("changes", "mirror")


@pytest.mark.parametrize(
    ("since", "message"),
    [
        ("nonsense!", "is no cursor"),
        ("absent", "there is no cursor"),
        ("0123456789abcdef:1", "belongs to another journal"),
        ("{epoch}:9", "lies beyond the journal's end"),
        ("{epoch}:99999999999999999999", "is no cursor"),
    ],
)
def test_a_cursor_that_means_nothing_is_refused(served: Served, asker: Asker, since: str, message: str) -> None:
    since = since.format(epoch=served.journal.epoch)
    for question in (lambda: asker.ask("changes", since), lambda: asker.take(1, since)):
        with pytest.raises(UsageError, match=message):
            question()
    with pytest.raises(UsageError, match=message):
        asker.ask("set_cursor", "name", since)
    assert asker.ask("cursors") == ()


def test_an_answer_without_bound_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumers, "CHANGES_MAX_BYTES", 1000)
    served.append(numbered(range(100)))
    with pytest.raises(UsageError, match="ask for the directories only"):
        Client(served.directory).changes("beginning")
    assert len(Client(served.directory).changed_directories("beginning").entries) == 1


def test_a_stranger_may_follow_but_set_no_cursor(served: Served) -> None:
    def as_stranger() -> None:
        client = Client(served.directory)
        client.follow().close()
        with pytest.raises(NotPermittedError, match="cursor_set is for root only"):
            client.set_cursor("mine")

    served.directory.chmod(0o755)
    for parent in served.directory.parents:
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o001)
    child = os.fork()
    if child == 0:
        try:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            as_stranger()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_larger_record_than_a_read_is_put_together(served: Served) -> None:
    served.append([msgspec.structs.replace(changed(b"x")[0], command=b"y" * 3_000_000)])
    with Client(served.directory).follow("beginning") as records:
        record = next(records).record
    assert isinstance(record, Change)
    assert record.command is not None
    assert len(record.command) == 3_000_000
