"""What a seal stands behind is checked as a whole, and nothing is overlooked because of it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.unit.journal import judge
from tests.unit.journal.support import AT_ONCE, SMALL_SEGMENTS, change, changes, flip, only_segment, write
from watchd.errors import JournalError
from watchd.journal import appender, recovery
from watchd.journal.format import HEADER_BYTES
from watchd.journal.recovery import find_seal, recover
from watchd.journal.segments import Segment
from watchd.records import Desync, Resync

SEAL_BYTES = 1000


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appender, "SEAL_BYTES", SEAL_BYTES)
    monkeypatch.setattr(recovery, "SEARCH_BYTES", 3 * SEAL_BYTES)


def seal_offset(directory: Path) -> int:
    """Where the last good seal of the only segment is; 0 when there is none."""
    path = only_segment(directory)
    with Segment(path.parent, int(path.stem)) as segment:
        seal = find_seal(segment)
    return seal.note.offset if seal else 0


def recovered_frame_by_frame(directory: Path, monkeypatch: pytest.MonkeyPatch) -> recovery.Opened:
    with monkeypatch.context() as patch:
        patch.setattr(recovery, "find_seal", lambda segment: None)
        return recover(directory)


def test_a_long_segment_is_sealed_and_the_judge_finds_the_checksums_right(tmp_path: Path) -> None:
    write(tmp_path, [changes(3, 1 + 3 * number) for number in range(60)])
    assert len(judge.records(tmp_path)) == 180
    size = only_segment(tmp_path).stat().st_size
    assert size - 2 * SEAL_BYTES < seal_offset(tmp_path) < size


def test_a_small_segment_needs_none(tmp_path: Path) -> None:
    write(tmp_path, [changes(3)])
    assert seal_offset(tmp_path) == 0
    assert recover(tmp_path).sealed == 0


@pytest.mark.parametrize("run", range(10))
def test_the_state_is_the_same_as_without_a_seal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: int) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    for _ in range(4):
        commits = []
        for number in range(chance.randrange(1, 30)):
            kind = chance.choice(("changes", "changes", "desync", "resync"))
            layer = chance.choice("ab")
            match kind:
                case "changes":
                    commits.append(changes(chance.randrange(1, 9), number))
                case "desync":
                    commits.append([Desync(number, chance.choice(("", layer)), "overflow")])
                case "resync":
                    commits.append([Resync(number, layer, chance.randrange(200), 0)])
        write(tmp_path, commits, chance.choice((AT_ONCE, SMALL_SEGMENTS)))
        slow, quick = recovered_frame_by_frame(tmp_path, monkeypatch), recover(tmp_path)
        assert (slow.checkpoint, slow.end, slow.crc, slow.last_seq) == (
            quick.checkpoint, quick.end, quick.crc, quick.last_seq
        ), f"seed {seed}"  # fmt: skip
        judge.records(tmp_path)


def test_damage_before_the_seal_is_found_and_told_with_its_place(tmp_path: Path) -> None:
    write(tmp_path, [changes(3, 1 + 3 * number) for number in range(60)])
    path, offset = only_segment(tmp_path), seal_offset(tmp_path)
    for at in (HEADER_BYTES + 30, offset // 2, offset - 1):
        flip(path, at)
        assert seal_offset(tmp_path) == 0
        with pytest.raises(JournalError, match=r"is damaged at byte \d+, behind record \d+"):
            recover(tmp_path)
        flip(path, at)
    assert seal_offset(tmp_path) == offset


def test_a_seal_that_is_damaged_itself_stands_for_nothing(tmp_path: Path) -> None:
    write(tmp_path, [changes(3, 1 + 3 * number) for number in range(60)])
    offset = seal_offset(tmp_path)
    flip(only_segment(tmp_path), offset + 25)
    assert seal_offset(tmp_path) < offset
    with pytest.raises(JournalError, match=f"is damaged at byte {offset}"):
        recover(tmp_path)


def test_a_seal_that_was_copied_to_another_place_stands_for_nothing(tmp_path: Path) -> None:
    write(tmp_path, [changes(3, 1 + 3 * number) for number in range(60)])
    path, offset = only_segment(tmp_path), seal_offset(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data + data[offset : offset + 60])
    assert seal_offset(tmp_path) == offset


def test_a_torn_tail_behind_the_seal_is_cut_and_the_next_seal_is_right(tmp_path: Path) -> None:
    write(tmp_path, [changes(3, 1 + 3 * number) for number in range(60)])
    with only_segment(tmp_path).open("ab") as file:
        file.write(b"torn" * 99)
    write(tmp_path, [[change(number)] for number in range(60)])
    assert len(judge.records(tmp_path)) == 240
    assert seal_offset(tmp_path) > 0
