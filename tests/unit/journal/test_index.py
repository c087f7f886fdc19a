"""The index answers what reading the whole journal answers, however far behind, lost or damaged it is."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.journal.support import SMALL_SEGMENTS, Entry, change, changes, put, write
from watchd.journal import changes as changes_module
from watchd.journal import indexer as indexer_module
from watchd.journal.changes import Changes, DirectoryEntry, PathEntry, Question, collect
from watchd.journal.directories import up_from
from watchd.journal.format import LayerMark
from watchd.journal.index import FILE, Index, consult, is_valid, remove
from watchd.journal.indexer import Indexer
from watchd.journal.reader import extent
from watchd.journal.segments import list_segments, segment_path
from watchd.journal.writer import Commit, Journal
from watchd.records import Change, Desync, Kind, Record, Resync

REPOSITORY = Path(__file__).parents[3]
LAYERS = ["base", "other"]
WHOLE = Kind.RENAME | Kind.DELETE

paths = st.lists(st.sampled_from([b"a", b"b", b"a-b", b"\xff"]), max_size=4).map(b"/".join)
records: st.SearchStrategy[Record] = st.one_of(
    st.builds(
        Change,
        st.just(1),
        st.sampled_from(LAYERS),
        paths,
        st.sampled_from([1, 2, 4, 8, 5, 3]),
        st.booleans(),
        st.booleans(),
        st.none() | paths,
        st.none() | st.integers(1, 9),
    ),
    st.builds(Desync, st.just(1), st.sampled_from(LAYERS), st.just("overflow")),
    st.builds(Resync, st.just(1), st.sampled_from(LAYERS), st.integers(0, 60), st.just(0)),
)
happenings: st.SearchStrategy[Record | str] = st.one_of(records, records, st.sampled_from(LAYERS))
"""A layer's name: a source begins to watch it."""
questions = st.builds(
    Question, st.frozensets(st.sampled_from([*LAYERS, "no such"])), st.none() | paths, st.booleans(), st.booleans()
)
fates = st.sampled_from(["fed", "read", "lagging", "lost", "damaged", "an older one"])


def index(state: Path, commits: Sequence[Sequence[Entry]] = ()) -> None:
    """Writes the commits with an indexer at work, which takes in everything."""

    async def run() -> None:
        seen: list[Commit] = []
        journal = await Journal.open(state / "journal", SMALL_SEGMENTS, on_commit=seen.append)
        indexer = Indexer(state, state / "journal")
        indexer.start()
        for one in commits:
            put(journal, one)
            await journal.flush()
            for commit in seen:
                indexer.committed(commit)
            seen.clear()
        await journal.close()
        await asyncio.to_thread(indexer.close)

    asyncio.run(run())


def suffer(state: Path, fate: str, commits: Sequence[Sequence[Entry]]) -> None:
    """Writes the commits while the index has a fate."""
    if fate == "fed":
        index(state, commits)
        return
    if fate == "an older one" and (state / FILE).exists():
        shutil.copy(state / FILE, state / "older")
        index(state, commits)
        shutil.copy(state / "older", state / FILE)
        return
    write(state / "journal", commits, SMALL_SEGMENTS)
    if fate == "read":
        index(state)
    elif fate == "lost":
        remove(state)
    elif fate == "damaged":
        (state / FILE).write_bytes(b"SQLite format 3\0" + b"garbage" * 1000)


def expected_directories(history: list[Record], since: int, question: Question) -> list[DirectoryEntry]:
    """By definition: no cleverness."""
    own: dict[tuple[str, bytes], int] = {}
    whole: dict[tuple[str, bytes], int] = {}
    for seq, record in enumerate(history, 1):
        if seq <= since or not isinstance(record, Change):
            continue
        for path in {record.path, record.from_path} - {None}:
            assert path is not None
            own[record.layer, path.rpartition(b"/")[0]] = seq
            if record.is_dir:
                own[record.layer, path] = seq
                if record.kinds & WHOLE or path == record.from_path:
                    whole[record.layer, path] = seq
    below = {(layer, above) for layer, path in own for above in up_from(path)}
    told = []
    for layer, path in sorted(below if question.ancestors else own):
        seqs = [seq for (other, inner), seq in own.items() if other == layer and path in up_from(inner)]
        recursive = (layer, path) in whole
        if (not question.layers or layer in question.layers) and concerns(question.prefix, path, recursive):
            seq = max(seqs) if question.ancestors else own[layer, path]
            if not concerns(question.prefix, path, False):
                seq = whole[layer, path]
            told.append(DirectoryEntry(layer, path, seq, recursive))
    return told


def concerns(prefix: bytes | None, path: bytes, recursive: bool) -> bool:
    return not prefix or prefix in up_from(path) or (recursive and path in up_from(prefix))


class Told:
    """What was told of the layers, by definition."""

    def __init__(self) -> None:
        self.history: list[Record] = []
        self.opened: dict[str, int] = {}
        self.since: dict[str, int] = {}
        """The last number when a layer was heard of for the first time."""

    def take(self, happening: Record | str) -> Entry:
        """What is written of it."""
        if isinstance(happening, str):
            self.since.setdefault(happening, len(self.history))
            return {name: LayerMark(b"/", 1, self.opened.get(name, 0), since) for name, since in self.since.items()}
        self.history.append(happening)
        if isinstance(happening, Desync | Resync):
            self.since.setdefault(happening.layer, len(self.history))
        if isinstance(happening, Desync):
            self.opened[happening.layer] = len(self.history)
        elif isinstance(happening, Resync) and happening.closes >= self.opened.get(happening.layer, 0):
            self.opened[happening.layer] = 0
        return happening

    def is_fresh(self, since: int, layers: frozenset[str]) -> bool:
        """Whether a consumer has to rescan these layers, all if there are none."""
        late = {layer for layer in layers if self.since.get(layer, 1 + len(self.history)) >= max(since, 1)}
        return bool(late) or any(seq for layer, seq in self.opened.items() if not layers or layer in layers)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(fates, st.lists(happenings, max_size=12)), max_size=5), st.data())
def test_the_index_answers_what_reading_everything_answers(
    periods: list[tuple[str, list[Record | str]]], data: st.DataObject
) -> None:
    with TemporaryDirectory() as name:
        state = Path(name)
        write(state / "journal", [])
        told = Told()
        history = told.history
        for fate, period in periods:
            entries = list(map(told.take, period))
            suffer(state, fate, [entries[:3], entries[3:]])
        epoch = extent(state / "journal").epoch
        for _ in range(4):
            since = data.draw(st.integers(0, len(history)))
            question = data.draw(questions)
            answer = ask(state, f"{epoch}:{since}", question)
            assert str(answer.cursor) == f"{epoch}:{len(history)}"
            assert answer.fresh is told.is_fresh(since, question.layers)
            if question.dirs:
                assert list(answer.entries) == expected_directories(history, since, question)
            else:
                check_paths(answer, history, since, question)
            with TemporaryDirectory() as bare:
                shutil.copytree(state / "journal", Path(bare) / "journal")
                assert ask(Path(bare), f"{epoch}:{since}", question) == answer


def ask(state: Path, since: str, asked: Question) -> Changes:
    return collect(state, since, layers=asked.layers, prefix=asked.prefix, dirs=asked.dirs, ancestors=asked.ancestors)


def check_paths(answer: Changes, history: list[Record], since: int, question: Question) -> None:
    last: dict[tuple[str, bytes], tuple[int, Change]] = {}
    for seq, record in enumerate(history, 1):
        if isinstance(record, Change) and seq > since:
            last[record.layer, record.path] = seq, record
    told = {(entry.layer, entry.path): entry for entry in answer.entries if isinstance(entry, PathEntry)}
    assert sorted(told) == [(entry.layer, entry.path) for entry in answer.entries]
    covers = {key: entry for key, entry in told.items() if entry.recursive}
    for (layer, path), (seq, record) in last.items():
        if question.layers and layer not in question.layers:
            continue
        if not concerns(question.prefix, path, False):
            continue
        entry = told.get((layer, path))
        above = [covers[layer, one] for one in up_from(path) if one != path and (layer, one) in covers]
        if entry is None:
            assert any(one.seq > seq for one in above), "a change was lost"
        elif not any(one.seq > seq for one in above):
            assert (entry.seq, entry.exists, entry.is_dir) == (seq, record.exists, record.is_dir)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """An indexed journal of 40 records in several segments."""
    index(tmp_path, [changes(5, start) for start in range(1, 41, 5)])
    assert len(list_segments(tmp_path / "journal")) > 2
    return tmp_path


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the journal from its baseline fails."""
    monkeypatch.setattr(changes_module, "_read", lambda *_: pytest.fail("the journal was read"))


@pytest.mark.usefixtures("unread")
def test_directories_and_an_unchanged_prefix_are_told_without_reading_the_journal(state: Path) -> None:
    segment_path(state / "journal", 1).write_bytes(segment_path(state / "journal", 1).read_bytes()[:-1])
    assert collect(state, "beginning", dirs=True).entries == (DirectoryEntry("base", b"etc", 40),)
    assert collect(state, "beginning", dirs=True, prefix=b"usr").entries == ()
    assert collect(state, "beginning", prefix=b"usr").entries == ()
    write(state / "journal", [[change(41, b"usr/lib/x")]])
    assert collect(state, "beginning", dirs=True, prefix=b"usr").entries == (DirectoryEntry("base", b"usr/lib", 41),)


@pytest.mark.parametrize("is_left", [False, True])
def test_asking_changes_nothing_on_disk(state: Path, *, is_left: bool) -> None:
    if is_left:  # by a daemon that was killed
        leave_open(state)
        assert (state / f"{FILE}-wal").stat().st_size

    def look() -> dict[str, tuple[bytes, int]]:
        files = [path for path in sorted(state.rglob("*")) if path.is_file()]
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = look()
    for question in ({}, {"dirs": True}, {"prefix": b"usr"}):
        collect(state, "beginning", **question)
    assert look() == before


def leave_open(state: Path) -> None:
    """Has a process take in a record and die with the index open."""
    write(state / "journal", [[change(41, b"usr/lib/x")]])
    code = f"""
import os, pathlib
from watchd.journal.index import IndexWriter
from watchd.journal.indexer import _Fold
state = pathlib.Path({str(state)!r})
writer = IndexWriter(state)
fold = _Fold(writer, state / "journal")
fold.read()
fold.flush()
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


@pytest.mark.usefixtures("unread")
def test_what_a_killed_daemon_left_is_used(state: Path) -> None:
    leave_open(state)
    assert consult(state, lambda index: index.mark.position.seq) == 41
    assert collect(state, "beginning", dirs=True, prefix=b"usr").entries == (DirectoryEntry("base", b"usr/lib", 41),)


def test_readers_are_never_turned_away_while_the_index_is_written(state: Path) -> None:
    done = threading.Event()
    missed, asked = [], 0

    def write_on() -> None:
        with sqlite3.connect(state / FILE, isolation_level=None) as connection:
            for number in range(300):
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("UPDATE directories SET own_seq = own_seq + 1, below_seq = below_seq + 1")
                connection.execute("INSERT INTO layers VALUES (?, ?)", [number + 100, f"{number}" * 1000])
                connection.execute("COMMIT")
        connection.close()
        done.set()

    writer = threading.Thread(target=write_on)
    writer.start()
    while not done.is_set():
        asked += 1
        if not (rows := consult(state, lambda index: index.changed(0, layers=["base"], prefix=None))):
            missed.append(rows)
    writer.join()
    assert asked > 1
    assert len(missed) <= asked // 100, "the first and the last moment excepted"


@pytest.mark.parametrize("damage", ["garbage", "empty", "another version", "no mark", "a directory", "half"])
def test_an_index_that_is_of_no_use_is_made_anew(state: Path, damage: str) -> None:
    path = state / FILE
    if damage == "garbage":
        path.write_bytes(b"x" * 5000)
    elif damage == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "a directory":
        path.unlink()
        path.mkdir()
    else:
        with sqlite3.connect(path) as connection:
            connection.execute(
                "PRAGMA user_version = 99" if damage == "another version" else "UPDATE mark SET content = x'00'"
            )
        connection.close()
    assert consult(state, lambda _: True) is None
    assert collect(state, "beginning", dirs=True).entries == (DirectoryEntry("base", b"etc", 40),)
    if damage == "a directory":
        path.rmdir()
    index(state)
    assert consult(state, lambda index: index.mark.position.seq) == 40


def test_an_index_of_another_or_an_older_journal_is_not_believed(state: Path, tmp_path: Path) -> None:
    mark = consult(state, lambda index: index.mark)
    assert mark is not None
    assert is_valid(mark, state / "journal")
    last = list_segments(state / "journal")[-1]
    path = segment_path(state / "journal", last)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert not is_valid(mark, state / "journal")
    path.unlink()
    assert not is_valid(mark, state / "journal")
    shutil.rmtree(state / "journal")
    write(state / "journal", [changes(3)])
    assert collect(state, "beginning", dirs=True).entries == (DirectoryEntry("base", b"etc", 3),)
    index(state)
    assert collect(state, "beginning", dirs=True).entries == (DirectoryEntry("base", b"etc", 3),)
    assert consult(state, lambda index: index.mark.position.seq) == 3


def test_recent_changes_are_told_without_reading_what_is_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer_module, "STRIDE_BYTES", 1)
    index(tmp_path, [changes(5, start) for start in range(1, 41, 5)])
    journal = tmp_path / "journal"
    places = consult(tmp_path, lambda index: [index.position(seq) for seq in range(20, 40)])
    assert places is not None
    position = next(place for place in places if place and place.segment < place.seq)
    path = segment_path(journal, position.segment)
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + bytes(position.offset - 40) + whole[position.offset :])
    epoch = consult(tmp_path, lambda index: index.mark.epoch)
    assert [entry.seq for entry in collect(tmp_path, f"{epoch}:{position.seq}").entries] == [40]


def test_a_place_to_begin_at_that_retention_removed_does_not_make_an_answer_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(tmp_path, [changes(5, start) for start in range(1, 41, 5)])
    first, second, *_ = list_segments(tmp_path / "journal")
    segment_path(tmp_path / "journal", first).unlink()
    epoch = extent(tmp_path / "journal").epoch
    for since in range(second - 1, 40):
        answer = collect(tmp_path, f"{epoch}:{since}")
        assert (answer.fresh, [entry.seq for entry in answer.entries]) == (False, [40])
    assert collect(tmp_path, f"{epoch}:{second - 2}").fresh


def test_what_waits_too_long_is_read_from_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer_module, "WAITING_MAX", 3)
    index(tmp_path, [changes(2, start) for start in range(1, 41, 2)])
    assert consult(tmp_path, lambda index: index.mark.position.seq) == 40


def test_many_directories_do_not_wait_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer_module, "INTERVAL_S", 3600.0)
    monkeypatch.setattr(indexer_module, "TAKE_IN", 1)
    monkeypatch.setattr(indexer_module, "DIRECTORIES_MAX", 3)

    async def run() -> None:
        indexer = Indexer(tmp_path, tmp_path / "journal")
        journal = await Journal.open(tmp_path / "journal", SMALL_SEGMENTS, on_commit=indexer.committed)
        indexer.start()
        for number in range(8):
            path = b"%d/name" % number
            journal.append([Change(1, "base", path, int(Kind.CREATE), True, False)])
            await journal.flush()
        await asyncio.to_thread(wait_for, indexer, 5)
        indexer.close()
        await journal.close()

    asyncio.run(run())
    assert consult(tmp_path, lambda index: index.mark.position.seq) == 8


def wait_for(indexer: Indexer, seq: int) -> None:
    deadline = time.monotonic() + 20
    while indexer.read_upto < seq:
        assert time.monotonic() < deadline
        os.sched_yield()


def test_an_index_that_cannot_be_written_is_told_once_and_made_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(indexer_module, "RETRY_S", 0.001)
    write(tmp_path / "journal", [changes(5)])
    (tmp_path / FILE).mkdir()
    tries = []
    monkeypatch.setattr(indexer_module, "is_damage", lambda error: tries.append(error))
    indexer = Indexer(tmp_path, tmp_path / "journal")
    indexer.start()
    while len(tries) < 3:
        os.sched_yield()
    (tmp_path / FILE).rmdir()
    wait_for(indexer, 5)
    indexer.close()
    assert [record.getMessage() for record in caplog.records] == [
        "cannot keep the index of the journal: unable to open database file; `watchd changes` reads the journal meanwhile"
    ]


def test_the_daemon_does_not_wait_for_an_index_that_is_far_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "journal", [changes(5)])
    monkeypatch.setattr(indexer_module, "CLOSE_S", -1.0)
    indexer = Indexer(tmp_path, tmp_path / "journal")
    indexer.close()  # before it has read anything
    indexer.start()
    indexer.join()
    assert consult(tmp_path, lambda index: index.mark.position.seq) in (None, 0)
    assert collect(tmp_path, "beginning", dirs=True).entries == (DirectoryEntry("base", b"etc", 5),)
    monkeypatch.setattr(indexer_module, "CLOSE_S", 1.0)
    index(tmp_path)
    assert consult(tmp_path, lambda index: index.mark.position.seq) == 5


def test_pruning_drops_what_the_journal_does_not_hold_any_more(tmp_path: Path) -> None:
    early = [change(number, b"old%d/x" % number) for number in range(3)]
    index(tmp_path, [early, [Change(1, "gone", b"x", 1, True, False)], [change(9, b"new/x")]])
    indexer = Indexer(tmp_path, tmp_path / "journal")
    indexer.start()
    indexer.gone_before(5)
    indexer.close()
    rows = consult(tmp_path, lambda index: index.changed(0, layers=index.layers, prefix=None))
    assert rows is not None
    assert {layer: sorted(found) for layer, found in rows.items()} == {"base": [b"", b"new"]}
    index(tmp_path, [[Change(1, "gone", b"x", 1, True, False)]])
    assert collect(tmp_path, "beginning", layers=frozenset({"gone"}), dirs=True).entries == (
        DirectoryEntry("gone", b"", 6),
    )


def test_the_index_is_nobody_elses_to_read(state: Path) -> None:
    assert (state / FILE).stat().st_mode & 0o777 == 0o600


def test_a_reader_makes_no_index(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.Error):
        Index(tmp_path)
    assert list(tmp_path.iterdir()) == []
