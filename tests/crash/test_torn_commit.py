"""A power cut in the middle of a commit: any part of what was not synced may be missing, or be garbage."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.journal import judge
from tests.unit.journal.support import changes, only_segment, write
from watchd.journal.reader import read
from watchd.journal.recovery import recover


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, bytes]:
    """A journal of two commits of 3 records, where the last one begins, and all its bytes."""
    directory = tmp_path_factory.mktemp("journal")
    write(directory, [changes(3)])
    begin = only_segment(directory).stat().st_size
    write(directory, [changes(3, 4)])
    return directory, begin, only_segment(directory).read_bytes()


def reopen(directory: Path, content: bytes) -> int:
    """Puts `content` in the segment's place and recovers; returns how many records are left."""
    path = only_segment(directory)
    path.write_bytes(content)
    opened = recover(directory)
    for torn in directory.glob("*.torn"):
        assert path.read_bytes() + torn.read_bytes() == content
        torn.unlink()
    assert len(judge.records(directory)) == opened.last_seq
    assert [seq for seq, _ in read(directory)] == list(range(1, opened.last_seq + 1))
    return opened.last_seq


def test_a_commit_cut_off_at_any_byte_keeps_every_whole_record(journal: tuple[Path, int, bytes]) -> None:
    directory, begin, data = journal
    kept = [reopen(directory, data[:end]) for end in range(begin, len(data) + 1)]
    assert sorted(set(kept)) == [3, 4, 5, 6]
    assert kept == sorted(kept)
    assert kept.count(6) == 1


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_holes_and_garbage_in_the_last_commit_harm_nothing_before_it(
    journal: tuple[Path, int, bytes], data: st.DataObject
) -> None:
    directory, begin, content = journal
    torn = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(begin, len(content) - 1))
        size = data.draw(st.integers(1, len(content) - start))
        torn[start : start + size] = data.draw(st.just(bytes(size)) | st.binary(min_size=size, max_size=size))
    intact = next((at for at, byte in enumerate(torn) if byte != content[at]), len(content))
    kept = reopen(directory, bytes(torn))
    assert kept >= 3
    assert only_segment(directory).read_bytes() == content[: only_segment(directory).stat().st_size]
    assert only_segment(directory).stat().st_size <= intact


@pytest.mark.parametrize("tail", [b"\0" * 70_000, b"\xff" * 300_000, b"\xf5\xd5" * 150_000])
def test_garbage_behind_the_end_is_set_aside_whatever_its_size(journal: tuple[Path, int, bytes], tail: bytes) -> None:
    directory, _, content = journal
    assert reopen(directory, content + tail) == 6
