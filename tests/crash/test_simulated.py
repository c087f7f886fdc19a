"""Power cuts and errors at every single operation on a disk in memory: what was acknowledged is there, and nothing else.

After each the real code recovers, and the log is judged by the independent reader and held against the model.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Iterator

import msgspec
import pytest

from tests.crash.memory_disk import READING, Loss, MemoryDisk, PowerCutError
from tests.crash.model import DIRECTORY, ROOT, SMALL, Session, check, check_that_it_goes_on, opened_at, until_power_cut
from tests.soak import rounds
from watchd.errors import JournalError
from watchd.journal.writer import Journal, JournalSettings
from watchd.records import Change

SEEDS = {Loss.DROP: 1, Loss.APPLY: 1, Loss.REORDER: rounds(6), Loss.TEAR: rounds(6)}


async def work(session: Session) -> None:
    """Some segments, commits of many records, notes, gaps that open and close, a reader, a stop and a start."""
    await session.open()
    session.append(3)
    await session.flush()
    session.note("base")
    session.append(5)
    session.append(2)
    await session.flush()
    session.desync("base")
    session.note("base", "other")
    await session.flush()
    session.append(20)
    await session.flush()
    session.look()
    session.append(1)
    await session.flush()
    session.append(4)
    session.resync("base")
    session.note("base", "other")
    await session.flush()
    session.stop()
    await session.close()
    await session.open()
    session.append(9)
    await session.flush()
    session.desync("other")
    session.append(9)
    await session.flush()
    session.look()
    session.append(2)
    session.stop()
    await session.close()


def ran(
    *,
    cut_at: int | None = None,
    errors: dict[int, int] | None = None,
    seed: int = 0,
    settings: JournalSettings = SMALL,
) -> Session:
    """The work on a disk of its own."""
    disk = MemoryDisk(ROOT)
    disk.cut_at, disk.errors, disk.chance = cut_at, errors or {}, random.Random(seed)
    session = Session(disk, settings)
    asyncio.run(until_power_cut(session, work))
    return session


OPERATIONS = ran().disk.operations
WRITING = [number for number, name in enumerate(OPERATIONS) if name not in READING]


def losses() -> Iterator[tuple[Loss, int]]:
    return ((loss, seed) for loss, count in SEEDS.items() for seed in range(count))


def test_the_work_is_worth_it() -> None:
    session = ran()
    assert session.failures == 0
    assert session.acknowledged == len(session.entries)
    assert len([name for name in session.disk.files(DIRECTORY) if name.endswith(".wal")]) > 3
    assert len(WRITING) > 70


@pytest.mark.parametrize("cut_at", WRITING, ids=lambda number: f"{number}-{OPERATIONS[number]}")
def test_a_power_cut_at_any_operation_loses_nothing_acknowledged(cut_at: int) -> None:
    session = ran(cut_at=cut_at)
    assert session.disk.is_dead

    async def check_all() -> None:
        for loss, seed in losses():
            disk = session.disk.after_power_cut(loss, seed)
            opened = check(disk, session)
            await check_that_it_goes_on(disk, opened.last_seq)

    asyncio.run(check_all())


@pytest.mark.parametrize("cut_at", WRITING, ids=lambda number: f"{number}-{OPERATIONS[number]}")
def test_a_power_cut_during_recovery_is_another_crash_and_no_more(cut_at: int) -> None:
    session = ran(cut_at=cut_at)
    chance = random.Random(cut_at)
    for _ in range(rounds(1)):
        first = chance.choice(list(Loss)), chance.randrange(2**32)
        second_at = 0
        while True:
            disk = session.disk.after_power_cut(*first)
            disk.cut_at = second_at
            try:
                opened_at(disk)
                break
            except PowerCutError:
                check(disk.after_power_cut(chance.choice(list(Loss)), chance.randrange(2**32)), session)
            second_at += 1
        assert second_at > 5


def test_without_sync_a_power_cut_takes_the_end_only_and_a_kill_nothing() -> None:
    settings = msgspec.structs.replace(SMALL, sync="off", segment_size_bytes=2000)
    for cut_at in range(len(ran(settings=settings).disk.operations)):
        session = ran(cut_at=cut_at, settings=settings)
        acknowledged, session.acknowledged = session.acknowledged, 0
        for loss, seed in losses():
            check(session.disk.after_power_cut(loss, seed), session)
        session.acknowledged = acknowledged
        check(session.disk.after_kill(), session)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, 0], ids=["EIO", "ENOSPC", "short"])
def test_an_error_of_any_operation_is_survived_in_place_and_nothing_is_believed(error: int) -> None:
    """What the failed sync left in memory only is gone with the power afterwards, if anybody believed in it."""
    failures = 0
    for number, _name in enumerate(OPERATIONS):
        session = ran(errors={number: error}, seed=number)
        failures += session.failures
        check(session.disk.after_power_cut(Loss.DROP, 0), session)
        check(session.disk.after_kill(), session)
    assert failures > len(OPERATIONS) / 3


def test_a_journal_is_not_opened_again_on_a_disk_that_would_be_full_at_once() -> None:
    """Else every attempt would end in another gap, and another scan of everything."""

    async def main() -> None:
        disk = MemoryDisk(ROOT)
        journal = await Journal.open(DIRECTORY, SMALL, disk=disk)
        disk.room = 200
        for _ in range(9):
            journal.append([Change(1, "base", b"etc/x", 1, True, False)])
        with pytest.raises(JournalError, match="No space left"):
            await journal.flush()
        for _ in range(3):
            with pytest.raises(JournalError, match="No space left on device; make room"):
                await journal.reopen()
            assert "No space left" in str(journal.failure)
        disk.room = None
        await journal.reopen()
        await journal.close()
        assert set(disk.files(DIRECTORY)) == {"lock", "00000000000000000001.wal"}

    asyncio.run(main())


@pytest.mark.parametrize("name", ["sync", "pwrite", "sync_directory"])
def test_a_power_cut_soon_after_an_error_loses_nothing_acknowledged(name: str) -> None:
    for number in [number for number, operation in enumerate(OPERATIONS) if operation == name]:
        for later in range(1, 30, 3 if rounds(1) == 1 else 1):
            session = ran(errors={number: errno.EIO}, seed=later, cut_at=number + later)
            for loss in Loss:
                check(session.disk.after_power_cut(loss, later), session)


def test_a_daemon_that_dies_of_a_failed_sync_leaves_nothing_that_the_next_one_believes() -> None:
    """The next process reads from memory what never reached the disk, and its own sync succeeds."""
    for number in [number for number, operation in enumerate(OPERATIONS) if operation == "sync"]:
        for seed in range(rounds(4)):
            session = ran(errors={number: errno.EIO}, cut_at=number + 1, seed=seed)
            disk = session.disk.after_kill()
            opened = check(disk, session)
            session.acknowledged = 0  # the next one acknowledges by its opening
            assert check(disk.after_power_cut(Loss.DROP, 0), session).last_seq == opened.last_seq
