"""Whoever follows the journal with a named cursor sees every record once, whatever dies meanwhile."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.crash.test_killed_writer import Writers
from tests.soak import rounds
from tests.unit.journal.support import write
from watchd.errors import RecordsGoneError
from watchd.journal.cursors import DIRECTORY, Cursor, Cursors, resolve_kept
from watchd.journal.reader import Follower, NumberedRecord, extent, read
from watchd.journal.segments import list_segments, segment_path

ROUNDS = 12
STEPS = 40
FOLLOWERS = 3


class Consumer:
    """Reads on, stores its cursor now and then, and dies now and then: then it has what it had when it stored it."""

    def __init__(self, state: Path, name: str) -> None:
        self._journal, self._name = state / "journal", name
        self._cursors = Cursors(state / DIRECTORY)
        self._cursors.set(name, Cursor(extent(self._journal).epoch, 0))
        self.kept: list[NumberedRecord] = []
        self._seen: list[NumberedRecord] = []
        self._follower = self._begin()

    def _begin(self) -> Follower:
        there = extent(self._journal)
        return Follower(self._journal, resolve_kept(self._name, there, self._cursors))

    @property
    def stored_seq(self) -> int:
        return self._cursors.get(self._name).seq

    def poll(self) -> bool:
        records = self._follower.poll()
        self._seen += records
        return bool(records)

    def store(self) -> None:
        self._cursors.set(self._name, Cursor(self._follower.epoch, self._follower.seq))
        self.kept += self._seen
        self._seen = []

    def die(self) -> None:
        self._follower.close()
        self._seen = []
        self._follower = self._begin()

    def finish(self) -> None:
        while self.poll():
            pass
        self.store()
        self._follower.close()

    def step(self, chance: random.Random) -> None:
        chance.choices([self.poll, self.store, self.die], [6, 2, 1])[0]()


@pytest.fixture
def writers() -> Iterator[Writers]:
    writers = Writers()
    yield writers
    writers.close()


def tear(journal: Path, chance: random.Random) -> None:
    """What a power cut may leave behind the last frame: the beginning of another one, zeros, garbage."""
    last = segment_path(journal, list_segments(journal)[-1])
    whole = last.read_bytes()
    tail = chance.choice([b"", bytes(100), chance.randbytes(300), whole[40 : 40 + chance.randrange(60)]])
    with last.open("ab") as file:
        file.write(tail)


def remove_what_all_have(journal: Path, upto: int) -> list[NumberedRecord]:
    """Like retention: the oldest segments whose records everybody has. Returns them."""
    firsts = list_segments(journal)
    gone = [first for first, following in pairwise(firsts) if following - 1 <= upto]
    records = [(seq, record) for seq, record in read(journal) if gone and seq < firsts[len(gone)]]
    for first in gone:
        segment_path(journal, first).unlink()
    return records


def test_followers_see_every_record_once_whoever_dies_and_whatever_is_removed_behind_them(
    tmp_path: Path, writers: Writers
) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    journal = tmp_path / "journal"
    write(journal, [])
    consumers = [Consumer(tmp_path, f"consumer-{number}") for number in range(FOLLOWERS)]
    removed: list[NumberedRecord] = []
    for _ in range(rounds(ROUNDS)):
        said = writers.begin(journal)
        assert next(said)[0] == "acknowledged"
        for _ in range(chance.randrange(STEPS)):
            chance.choice(consumers).step(chance)
        writers.kill()
        assert all(word == "acknowledged" for word, _ in said)
        tear(journal, chance)
        for _ in range(chance.randrange(4)):
            chance.choice(consumers).step(chance)
        removed += remove_what_all_have(journal, min(consumer.stored_seq for consumer in consumers))
    write(journal, [])
    for consumer in consumers:
        consumer.finish()
    log = removed + list(read(journal))
    assert [seq for seq, _ in log] == list(range(1, len(log) + 1)), f"seed {seed}"
    assert len(log) > rounds(ROUNDS), f"seed {seed}"
    assert removed, f"seed {seed}"
    for consumer in consumers:
        assert consumer.kept == log, f"seed {seed}"


def test_a_consumer_that_retention_overtook_is_told_once_and_exactly(tmp_path: Path, writers: Writers) -> None:
    journal = tmp_path / "journal"
    write(journal, [])
    slow, fast = Consumer(tmp_path, "slow"), Consumer(tmp_path, "fast")
    said = writers.begin(journal)
    assert next(said)[0] == "acknowledged"
    while len(list_segments(journal)) < 4:
        fast.poll()
    writers.kill()
    assert all(word == "acknowledged" for word, _ in said)
    fast.finish()
    gone = remove_what_all_have(journal, fast.stored_seq)
    with pytest.raises(RecordsGoneError) as told:
        slow.die()
    assert (told.value.first_seq, told.value.last_seq) == (1, gone[-1][0])
