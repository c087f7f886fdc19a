"""A writer at work on a disk in memory, and the model of what must be there whatever happens to the disk."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.crash.memory_disk import MemoryDisk, PowerCutError
from tests.unit.journal import judge
from watchd.errors import JournalError
from watchd.journal.format import LayerMark
from watchd.journal.reader import Follower, read
from watchd.journal.recovery import Opened, lock, recover
from watchd.journal.writer import Journal, JournalSettings
from watchd.records import Change, Desync, Record, Resync, Stop

ROOT = Path("/disk")
DIRECTORY = ROOT / "journal"
SMALL = JournalSettings(max_delay_ns=0, segment_size_bytes=600)
ATTEMPTS = 3

Marks = Mapping[str, LayerMark]
Entry = Record | Marks


class Session:
    """Everything that was appended, in order, how much of it was acknowledged, and the journal it went to."""

    def __init__(self, disk: MemoryDisk, settings: JournalSettings = SMALL) -> None:
        self.disk, self._settings = disk, settings
        self.entries: list[Entry] = []
        self.acknowledged = 0
        """So many entries must survive everything."""
        self.epoch = ""
        self.failures = 0
        self._times = itertools.count(1)
        self._journal: Journal | None = None

    @property
    def journal(self) -> Journal:
        assert self._journal
        return self._journal

    async def open(self) -> None:
        self._journal = await self._insist(lambda: Journal.open(DIRECTORY, self._settings, disk=self.disk))
        self.epoch = self.epoch or self.journal.epoch
        self._survived()

    def append(self, count: int) -> None:
        self._append([Change(next(self._times), "base", b"etc/x", 1, True, False) for _ in range(count)])

    def desync(self, layer: str) -> None:
        self._append([Desync(next(self._times), layer, "overflow")])

    def resync(self, layer: str) -> None:
        self._append([Resync(next(self._times), layer, self.journal.last_seq, 0)])

    def stop(self) -> None:
        self._append([Stop(next(self._times), "1", "boot")])

    def note(self, *layers: str) -> None:
        marks = marks_after(self.entries)
        known = {name: marks.get(name, LayerMark(b"/")).open_desync for name in layers}
        noted = {name: LayerMark(b"/", next(self._times), open_desync) for name, open_desync in known.items()}
        self.entries.append(noted)
        self.journal.note(noted)

    async def flush(self) -> None:
        """What was appended is acknowledged, or the journal is opened again and what is gone is forgotten."""
        count = len(self.entries)
        try:
            await self.journal.flush()
            self.acknowledged = count
        except JournalError:
            self.failures += 1
            await self._insist(self.journal.reopen)
            self._survived()

    def look(self) -> None:
        """What a reader sees must survive as well."""
        with suppress(JournalError), Follower(DIRECTORY, disk=self.disk) as follower:
            while follower.poll():
                pass
            seen = follower.position.seq
            self.acknowledged = max(self.acknowledged, _index(self.entries, seen))

    async def close(self) -> None:
        count = len(self.entries)
        try:
            await self.journal.close()
            self.acknowledged = count
        except JournalError:
            self.failures += 1

    def _append(self, records: Sequence[Record]) -> None:
        self.entries += records
        self.journal.append(records)

    async def _insist(self, call: Callable[[], Awaitable[Any]]) -> Any:
        for _ in range(ATTEMPTS):
            with suppress(JournalError):
                return await call()
            self.failures += 1
        raise AssertionError("the journal cannot be opened again")

    def _survived(self) -> None:
        """Takes what the journal found at its opening for the truth, if it may be true."""
        count = survivors(self, self.journal.last_seq, self.journal.recovered.layers)
        assert self.journal.epoch == self.epoch
        del self.entries[count:]
        self.acknowledged = count


def records_of(entries: Sequence[Entry]) -> Iterator[Record]:
    return (entry for entry in entries if not isinstance(entry, Mapping))


def _index(entries: Sequence[Entry], seq: int) -> int:
    """How many entries the first `seq` records are, with the notes between them."""
    numbers = [number for number, entry in enumerate(entries, 1) if not isinstance(entry, Mapping)]
    return numbers[seq - 1] if seq else 0


def marks_after(entries: Sequence[Entry]) -> dict[str, LayerMark]:
    """What the layers' marks are, by the words of docs/journal.md."""
    marks: dict[str, LayerMark] = {}
    seq = 0
    for entry in entries:
        if isinstance(entry, Mapping):
            marks = dict(entry)
            continue
        seq += 1
        if not isinstance(entry, Desync | Resync):
            continue
        mark = marks.get(entry.layer, LayerMark(b"", since_seq=seq))
        if isinstance(entry, Desync):
            marks[entry.layer] = LayerMark(mark.path, mark.complete_until_ns, seq, mark.since_seq)
        elif entry.closes >= mark.open_desync:
            marks[entry.layer] = LayerMark(mark.path, mark.complete_until_ns, 0, mark.since_seq)
    return marks


def survivors(session: Session, last_seq: int, layers: Marks) -> int:
    """How many entries are left, told from the records and marks that were found; fails if that may not be."""
    entries = session.entries
    counts = [
        count
        for count in range(session.acknowledged, len(entries) + 1)
        if sum(1 for _ in records_of(entries[:count])) == last_seq
    ]
    assert counts, f"{last_seq} records are left, of {len(entries)} entries {session.acknowledged} were acknowledged"
    matching = [count for count in counts if marks_after(entries[:count]) == layers]
    assert matching, f"{layers} was never true, rather {[marks_after(entries[:count]) for count in counts]}"
    return matching[-1]


def opened_at(disk: MemoryDisk) -> Opened:
    """What the next start does."""
    with lock(DIRECTORY, disk=disk):
        return recover(DIRECTORY, disk=disk)


def check(disk: MemoryDisk, session: Session) -> Opened:
    """Recovers, and holds what is there against the model."""
    opened = opened_at(disk)
    log = [value[1] for _, value in judge.judged(disk.files(DIRECTORY))]
    assert log == [record.time_ns for record in records_of(session.entries)][: len(log)]
    assert opened.last_seq == len(log)
    assert session.epoch in ("", opened.header.epoch.hex())
    survivors(session, opened.last_seq, opened.checkpoint.layers)
    assert [seq for seq, _ in read(DIRECTORY, disk=disk)] == list(range(1, len(log) + 1))
    assert not [name for name in disk.files(DIRECTORY) if name.endswith(".tmp")]
    return opened


async def check_that_it_goes_on(disk: MemoryDisk, count: int) -> None:
    """Appending goes on where it ended, over the end of a segment."""
    journal = await Journal.open(DIRECTORY, SMALL, disk=disk)
    for _ in range(3):
        journal.append([Change(0, "base", b"etc/x", 1, True, False)] * 5)
        await journal.flush()
    await journal.close()
    assert len(judge.judged(disk.files(DIRECTORY))) == count + 15


async def until_power_cut(session: Session, work: Callable[[Session], Awaitable[None]]) -> None:
    """Runs the work, to its end or until the power goes."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)  # tasks that the power cut ended
    cut = asyncio.Event()

    def tell() -> None:
        loop.call_soon_threadsafe(cut.set)

    session.disk.on_cut = tell
    working = asyncio.ensure_future(work(session))
    waiting = asyncio.create_task(cut.wait())
    await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
    for task in (working, waiting):
        if task is waiting or session.disk.is_dead:
            task.cancel()
    results = await asyncio.gather(working, waiting, return_exceptions=True)
    if not session.disk.is_dead and results[0] is not None:
        raise results[0]
    if session._journal:
        with suppress(JournalError, PowerCutError):
            await session.journal.close()
