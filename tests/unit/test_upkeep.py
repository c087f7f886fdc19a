"""The journal stays within its limits while it is written and read."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from tests.soak import rounds
from tests.unit.journal.support import SMALL_SEGMENTS, changes, write
from watchd.config.schema import Journal as JournalConfig
from watchd.config.units import Size
from watchd.errors import JournalError
from watchd.journal.changes import collect
from watchd.journal.cursors import Cursor, Cursors
from watchd.journal.reader import Follower, read
from watchd.journal.retention import Limits
from watchd.journal.segments import list_segments
from watchd.journal.writer import Journal
from watchd.records import Change
from watchd.service.upkeep import Upkeep, limits_of

FOR_EVER = 1 << 62


class State:
    """A state directory with a journal of 60 records, open."""

    def __init__(self, path: Path, journal: Journal) -> None:
        self.path, self.journal = path, journal
        self.cursors = Cursors(path / "cursors")

    def upkeep(self, size: int, hard: int, *folds: Reader) -> Upkeep:
        return Upkeep(self.journal, self.cursors, Limits(size, FOR_EVER, hard), folds=folds)

    def set(self, name: str, seq: int, *, epoch: str = "") -> None:
        self.cursors.set(name, Cursor(epoch or self.journal.epoch, seq))


def on_a_journal(path: Path, test: Callable[[State], Awaitable[None]]) -> None:
    write(path / "journal", [changes(5, 1 + 5 * number) for number in range(12)], SMALL_SEGMENTS)

    async def run() -> None:
        journal = await Journal.open(path / "journal", SMALL_SEGMENTS)
        await test(State(path, journal))
        await journal.close()

    asyncio.run(run())


class Reader:
    """Something that is folded from the journal; reads `pace` records when it is asked to."""

    def __init__(
        self, read_upto: int, pace: int = 0, *, error: JournalError | None = None, name: str = "the reader"
    ) -> None:
        self.read_upto, self.pace, self.error, self.name = read_upto, pace, error, name
        self.told: list[int] = []

    async def read_on(self, upto: int) -> None:
        if self.error:
            raise self.error
        self.read_upto = min(upto, self.read_upto + self.pace)

    def gone_before(self, first_seq: int) -> None:
        self.told.append(first_seq)


def test_the_hard_limit_is_twice_the_size_unless_it_is_said() -> None:
    config = JournalConfig()
    assert limits_of(config) == Limits(1 << 30, 30 * 86_400 * 10**9, 2 << 30)
    said = msgspec.structs.replace(config, retain_limit=Size.parse("4GiB"))
    assert limits_of(said).hard_bytes == 4 << 30
    less = msgspec.structs.replace(config, retain_limit=Size.parse("1MiB"))
    assert limits_of(less).hard_bytes == 1 << 30, "never less than what is wished"


def test_a_journal_within_its_limits_is_left_alone(tmp_path: Path) -> None:
    async def test(state: State) -> None:
        await state.upkeep(state.journal.bytes, state.journal.bytes).look()
        assert state.journal.first_seq == 1

    on_a_journal(tmp_path, test)


def test_only_the_last_segment_stays_when_nobody_reads(tmp_path: Path) -> None:
    async def test(state: State) -> None:
        last = list_segments(state.journal.directory)[-1]
        await state.upkeep(0, 0).look()
        assert list_segments(state.journal.directory) == [last]
        assert state.journal.first_seq == last
        await state.upkeep(0, 0).look()

    on_a_journal(tmp_path, test)


def test_a_named_cursor_holds_what_it_needs(tmp_path: Path) -> None:
    async def test(state: State) -> None:
        firsts = list_segments(state.journal.directory)
        state.set("reader", firsts[2] - 1)
        state.set("elsewhere", 3, epoch="0123456789abcdef")
        state.set("ahead", 9999)
        await state.upkeep(0, 1 << 30).look()
        assert list_segments(state.journal.directory) == firsts[2:]
        answer = collect(state.path, "reader")
        assert not answer.fresh
        state.set("reader", 60)
        await state.upkeep(0, 1 << 30).look()
        assert list_segments(state.journal.directory) == firsts[-1:]

    on_a_journal(tmp_path, test)


def test_over_the_hard_limit_a_cursor_is_left_behind_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(state: State) -> None:
        state.set("slow", 3)
        state.set("quick", 60)
        for _ in range(3):
            await state.upkeep(0, 0).look()
            state.journal.append(changes(30))
            await state.journal.flush()
        said = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
        assert len(said) == 2
        assert said[0].startswith("cursor slow had not read up to record")
        assert said[1].startswith("cursor quick had not read")
        assert collect(state.path, "slow").fresh

    on_a_journal(tmp_path, test)


def test_what_is_folded_is_asked_to_read_on_first(tmp_path: Path) -> None:
    async def test(state: State) -> None:
        last = list_segments(state.journal.directory)[-1]
        reader = Reader(3, pace=57)
        await state.upkeep(0, 1 << 30, reader).look()
        assert (reader.read_upto, reader.told) == (last - 1, [last])
        assert state.journal.first_seq == last

    on_a_journal(tmp_path, test)


def test_what_is_folded_and_does_not_come_along_is_waited_for_up_to_the_hard_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(state: State) -> None:
        firsts = list_segments(state.journal.directory)
        reader = Reader(firsts[1] - 1)
        await state.upkeep(0, 1 << 30, reader).look()
        assert (state.journal.first_seq, reader.told) == (firsts[1], [firsts[1]])
        assert not [one for one in caplog.records if one.levelno == logging.WARNING]
        await state.upkeep(0, 0, reader).look()
        assert (state.journal.first_seq, reader.told) == (firsts[-1], [firsts[1], firsts[-1]])
        assert "the reader had not read up to record" in caplog.text

    on_a_journal(tmp_path, test)


def test_what_is_folded_and_fails_keeps_the_rest_from_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(state: State) -> None:
        firsts = list_segments(state.journal.directory)
        broken, good = Reader(firsts[1] - 1, error=JournalError("no disk")), Reader(0, pace=60, name="another")
        await state.upkeep(0, 1 << 30, broken, good).look()
        assert (state.journal.first_seq, good.read_upto) == (firsts[1], firsts[-1] - 1)
        assert "the reader could not read the journal: no disk" in caplog.text

    on_a_journal(tmp_path, test)


def test_it_looks_again_when_it_is_told_and_its_limits_may_change(tmp_path: Path) -> None:
    async def test(state: State) -> None:
        upkeep = state.upkeep(1 << 30, 1 << 30)
        task = asyncio.create_task(upkeep.run())
        upkeep.configure(Limits(0, FOR_EVER, 0))
        while state.journal.first_seq == 1:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    on_a_journal(tmp_path, test)


def test_who_follows_closely_does_not_notice(tmp_path: Path) -> None:
    async def test(state: State) -> None:
        with Follower(state.journal.directory, 60) as quick:
            for seq in range(61, 91, 10):
                assert quick.poll() == []
                state.journal.append(changes(10))
                await state.journal.flush()
                await state.upkeep(0, 0).look()
                assert quick.poll()[0][0] == seq

    on_a_journal(tmp_path, test)


def test_a_journal_that_cannot_be_read_is_told_once_and_the_daemon_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(state: State) -> None:
        looks = 0

        class Broken(Upkeep):
            async def look(self) -> None:
                nonlocal looks
                looks += 1
                raise JournalError("no disk", remedy="get one")

        upkeep = Broken(state.journal, state.cursors, Limits(0, 0, 0))
        task = asyncio.create_task(upkeep.run())
        while looks < 3:
            upkeep.wake()
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert caplog.text.count("cannot be kept within its limits: no disk; get one") == 1

    on_a_journal(tmp_path, test)


# ---- at random -------------------------------------------------------------------------------------------------------


class Model:
    """What was written, in memory."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.records: dict[int, Change] = {}
        self.cursors: dict[str, int] = {}

    def some_changes(self) -> list[Change]:
        paths = [b"d%d/%d" % (self._chance.randrange(3), self._chance.randrange(9)) for _ in range(9)]
        made = [Change(len(self.records) + at, "base", path, 1, True, False) for at, path in enumerate(paths, 1)]
        self.records |= {len(self.records) + at: one for at, one in enumerate(made, 1)}
        return made

    def behind(self, seq: int) -> dict[bytes, int]:
        """Each path that changed behind `seq`, with its last record."""
        return {one.path: number for number, one in self.records.items() if number > seq}


@pytest.mark.parametrize("run", range(rounds(20)))
def test_every_cursor_gets_the_right_answer_or_is_told_to_start_over(tmp_path: Path, run: int) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    model = Model(chance)

    async def live() -> None:
        journal = await Journal.open(tmp_path / "journal", SMALL_SEGMENTS)
        state = State(tmp_path, journal)
        for _ in range(chance.randrange(1, 12)):
            what = chance.choice(("append", "append", "cursor", "remove"))
            if what == "append":
                journal.append(model.some_changes())
                await journal.flush()
            elif what == "cursor" and model.records:
                name, seq = f"c{chance.randrange(3)}", chance.randint(journal.first_seq - 1, journal.last_seq)
                state.set(name, seq)
                model.cursors[name] = seq
            elif what == "remove":
                size, hard = chance.choice(((0, 1 << 30), (2000, 4000), (0, 1500)))
                held = min((seq for seq in model.cursors.values() if seq >= journal.first_seq - 1), default=FOR_EVER)
                await state.upkeep(size, hard).look()
                assert journal.first_seq - 1 <= held or hard < 1 << 30, f"seed {seed}"
        await journal.close()

    for _ in range(6):
        asyncio.run(live())
        assert_answers(tmp_path, model, f"seed {seed}")


def assert_answers(state: Path, model: Model, why: str) -> None:
    firsts = list_segments(state / "journal")
    kept = [seq for seq, _ in read(state / "journal")]
    assert kept == list(range(firsts[0], len(model.records) + 1)), why
    for name, seq in model.cursors.items():
        answer = collect(state, name)
        assert answer.fresh == (seq + 1 < firsts[0]), why
        if not answer.fresh:
            assert {one.path: one.seq for one in answer.entries} == model.behind(seq), why
            told = [record for _, record in read(state / "journal", seq)]
            assert told == [model.records[number] for number in sorted(model.records) if number > seq], why
