"""Power cuts at every single operation of a repair and of retention, on a disk in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.crash.memory_disk import Loss, MemoryDisk, PowerCutError
from tests.crash.model import DIRECTORY, ROOT
from tests.soak import rounds
from tests.unit.journal import judge
from tests.unit.journal.support import SMALL_SEGMENTS, changes, write
from watchd.journal.disk import write_all
from watchd.journal.reader import read
from watchd.journal.recovery import recover
from watchd.journal.repair import repair
from watchd.journal.retention import remove, stored
from watchd.journal.segments import list_segments
from watchd.journal.verify import verify

SEEDS = {Loss.DROP: 1, Loss.APPLY: 1, Loss.REORDER: rounds(6), Loss.TEAR: rounds(6)}


def losses() -> Iterator[tuple[Loss, int]]:
    return ((loss, seed) for loss, count in SEEDS.items() for seed in range(count))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A journal of 100 records in several segments."""
    place = tmp_path_factory.mktemp("journal")
    write(place, [changes(5, 1 + 5 * number) for number in range(20)], SMALL_SEGMENTS)
    return {path.name: path.read_bytes() for path in sorted(place.glob("*.wal"))}


def disk_with(files: dict[str, bytes], *, cut_at: int | None = None) -> MemoryDisk:
    """A disk on which they are, for certain; the power goes at an operation behind that."""
    disk = MemoryDisk(ROOT)
    disk.make_directory(DIRECTORY)
    for name, content in files.items():
        with disk.open(DIRECTORY / name, os.O_WRONLY | os.O_CREAT) as file:
            write_all(file, content, 0)
            file.sync()
    disk.sync_directory(DIRECTORY)
    disk.sync_directory(ROOT)
    if cut_at is not None:
        disk.cut_at = len(disk.operations) + cut_at
    return disk


def changes_in(disk: MemoryDisk) -> dict[int, list[Any]]:
    return {seq: value for seq, value in judge.judged(disk.files(DIRECTORY)) if value[0] == 1}


def damaged(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same with an accident of each sort: bits, a header, a whole segment, one that is missing."""
    bits, header, whole, missing, *_, last = sorted(files)
    spoilt = {name: content for name, content in files.items() if name != missing}
    spoilt[bits] = _flipped(files[bits], 200)
    spoilt[header] = bytes(60) + files[header][60:]
    spoilt[whole] = b""
    spoilt[last] = _flipped(files[last], 100)
    return spoilt


def _flipped(content: bytes, offset: int) -> bytes:
    return content[:offset] + bytes([content[offset] ^ 255]) + content[offset + 1 :]


def test_a_power_cut_at_any_operation_of_a_repair_costs_no_good_record(files: dict[str, bytes]) -> None:
    spoilt = damaged(files)
    whole = disk_with(spoilt)
    before = len(whole.operations)
    repair(DIRECTORY, disk=whole)
    saved = changes_in(whole)
    assert 40 < len(saved) < 100
    for cut_at in range(len(whole.operations) - before):
        disk = disk_with(spoilt, cut_at=cut_at)
        with pytest.raises(PowerCutError):
            repair(DIRECTORY, disk=disk)
        for loss, seed in losses():
            after = disk.after_power_cut(loss, seed)
            repair(DIRECTORY, disk=after)
            assert changes_in(after) == saved, (cut_at, loss, seed)
            assert verify(DIRECTORY, disk=after).is_sound
            assert recover(DIRECTORY, disk=after).checkpoint.every_layer > 100


def test_a_power_cut_while_old_segments_are_removed_leaves_no_hole(files: dict[str, bytes]) -> None:
    for count in range(1, len(files)):
        for cut_at in range(2 * count):
            disk = disk_with(files, cut_at=None)
            gone = list(stored(DIRECTORY, disk=disk))[:count]
            disk.cut_at = len(disk.operations) + cut_at
            with pytest.raises(PowerCutError):
                remove(DIRECTORY, gone, disk=disk)
            for loss, seed in losses():
                after = disk.after_power_cut(loss, seed)
                first = list_segments(DIRECTORY, disk=after)[0]
                assert [seq for seq, _ in read(DIRECTORY, disk=after)] == list(range(first, 101))
                assert first <= gone[-1].last_seq + 1
                assert recover(DIRECTORY, disk=after).first_seq == first
