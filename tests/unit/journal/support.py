"""Records to write, and ways to write and damage them, for the tests of the journal."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from hypothesis import strategies as st

from watchd.journal.format import LayerMark
from watchd.journal.writer import Journal, JournalSettings
from watchd.records import Action, Change, Damage, Desync, Record, Resync, Start, Stop

AT_ONCE = JournalSettings(max_delay_ns=0)
SMALL_SEGMENTS = JournalSettings(max_delay_ns=0, segment_size_bytes=600)


def change(number: int, path: bytes = b"etc/x") -> Change:
    return Change(number, "base", path, 1, True, False)


def changes(count: int, start: int = 1) -> list[Change]:
    return [change(number) for number in range(start, start + count)]


Entry = Record | Mapping[str, LayerMark]
"""What is appended, or noted."""


def put(journal: Journal, entries: Iterable[Entry]) -> None:
    """Queues them in order."""
    for entry in entries:
        if isinstance(entry, Mapping):
            journal.note(entry)
        else:
            journal.append([entry])


def write(directory: Path, commits: Iterable[Sequence[Entry]], settings: JournalSettings = AT_ONCE) -> None:
    """Writes each of `commits` with a commit of its own."""

    async def run() -> None:
        journal = await Journal.open(directory, settings)
        for entries in commits:
            put(journal, entries)
            await journal.flush()
        await journal.close()

    asyncio.run(run())


def only_segment(directory: Path) -> Path:
    [path] = directory.glob("*.wal")
    return path


def flip(path: Path, offset: int, bits: int = 0xFF) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= bits
    path.write_bytes(data)


_INTEGERS = st.integers(0, 2**63 - 1)
_NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_PATHS = st.binary(max_size=60)

records = st.one_of(
    st.builds(
        Change,
        _INTEGERS,
        _NAMES,
        _PATHS,
        st.integers(0, 31),
        st.booleans(),
        st.booleans(),
        st.none() | _PATHS,
        st.none() | st.integers(0, 2**64 - 1),
        st.none() | st.integers(0, 2**31),
        st.none() | _PATHS,
        st.integers(0, 2),
        st.none() | st.binary(min_size=36, max_size=36),
    ),
    st.builds(Desync, _INTEGERS, _NAMES, _NAMES),
    st.builds(Resync, _INTEGERS, _NAMES, _INTEGERS, _INTEGERS),
    st.builds(Action, _INTEGERS, _NAMES, _PATHS, _NAMES, _NAMES, _INTEGERS, _INTEGERS, _INTEGERS, _INTEGERS, _NAMES),
    st.builds(Start, _INTEGERS, _NAMES, _NAMES),
    st.builds(Stop, _INTEGERS, _NAMES, _NAMES),
    st.builds(Damage, _INTEGERS, _NAMES, _PATHS, _PATHS, _NAMES, _NAMES),
)
assert len(get_args(Record)) == 7
