"""What is known of layers, without layers: folded from records that a test writes."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.journal.support import write
from watchd.journal.known import LAYERS_MAX, Known, KnownError, set_aside
from watchd.journal.reader import extent
from watchd.journal.segments import segment_path
from watchd.journal.writer import JournalSettings
from watchd.records import STATUS, Change, Desync, Kind, Record, Via
from watchd.wire.listing import Listing, listing_of

FILE, DIRECTORY = 0o100644, 0o040755
CREATE, DELETE, RENAME, MODIFY, ATTRIB = Kind.CREATE, Kind.DELETE, Kind.RENAME, Kind.MODIFY, Kind.ATTRIB
SMALL = JournalSettings(max_delay_ns=0, segment_size_bytes=600)

Tree = dict[bytes, tuple[int, int]]
"""Path -> inode and size."""


def status(size: int = 0, *, is_dir: bool = False) -> bytes:
    return STATUS.pack(DIRECTORY if is_dir else FILE, 0, 0, size, 1, 1)


def file(path: bytes, inode: int, size: int = 0, kinds: int = CREATE, layer: str = "base") -> Change:
    return Change(1, layer, path, kinds, True, False, inode=inode, status=status(size))


def directory(path: bytes, inode: int, kinds: int = CREATE, from_path: bytes | None = None) -> Change:
    return Change(1, "base", path, kinds, True, True, from_path, inode, status=status(is_dir=True))


def gone(path: bytes, kinds: int = DELETE, *, is_dir: bool = False) -> Change:
    return Change(1, "base", path, kinds, False, is_dir)


class Fold:
    """A journal, and what is known by it of the layer `base`, which was empty at first."""

    def __init__(self, home: Path) -> None:
        self.journal, self.path = home / "journal", home / "known.db"
        write(self.journal, [])
        self.known = self.open()
        self._times = itertools.count(2)
        self.learn("base")

    def open(self) -> Known:
        extent_ = extent(self.journal)
        return Known(self.path, journal=self.journal, epoch=extent_.epoch, last_seq=extent_.last_seq)

    def reopen(self) -> None:
        self.known.close()
        self.known = self.open()

    def learn(self, name: str, upto: int = 0) -> None:
        number, root = self.known.begin(name, b"/" + name.encode(), upto), self.known.next_number()
        self.known.store(number, [(root, Listing())])
        self.known.complete(number, root, (1).to_bytes(8, "little") + status(is_dir=True))

    def tell(self, *records: Record) -> None:
        """Record and fold changes that were looked at one after the other."""
        self.tell_together(*(msgspec.structs.replace(record, time_ns=next(self._times)) for record in records))

    def tell_together(self, *records: Record, settings: JournalSettings = SMALL) -> None:
        """Record and fold changes that were looked at at one time."""
        write(self.journal, [[record] for record in records], settings)
        self.fold(extent(self.journal).last_seq)

    def fold(self, upto: int) -> int:
        return self.known.fold(upto, epoch=extent(self.journal).epoch)

    def tree(self, name: str = "base") -> Tree:
        tree = self.known.tree(name)
        found, pending = {}, [(b"", tree.root)]
        while pending:
            path, number = pending.pop()
            listing = tree.listing(number)
            for entry, state in listing.entries().items():
                found[path + entry] = (int.from_bytes(state[:8], "little"), STATUS.unpack(state[8:])[3])
            pending += [(path + entry + b"/", child) for entry, child in listing.directories().items()]
        tree.close()
        return found

    def rows(self) -> int:
        with sqlite3.connect(self.path) as db:
            [[count]] = db.execute("SELECT count(*) FROM directories")
        db.close()
        return count


@pytest.fixture
def fold(tmp_path: Path) -> Iterator[Fold]:
    fold = Fold(tmp_path)
    yield fold
    fold.known.close()


GROWN = (directory(b"d", 2), directory(b"d/e", 3), file(b"d/e/f", 4, 10), file(b"g", 5, 11))
GROWN_TREE = {b"d": (2, 0), b"d/e": (3, 0), b"d/e/f": (4, 10), b"g": (5, 11)}


def test_what_was_told_is_known_and_telling_it_again_changes_nothing(fold: Fold) -> None:
    fold.tell(*GROWN)
    assert fold.tree() == GROWN_TREE
    fold.tell(*GROWN)
    assert fold.tree() == GROWN_TREE
    fold.tell(file(b"g", 5, 12, MODIFY), gone(b"d/e/f"))
    assert fold.tree() == {b"d": (2, 0), b"d/e": (3, 0), b"g": (5, 12)}


def test_a_fold_that_is_ended_early_is_taken_up_where_it_was(fold: Fold, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [msgspec.structs.replace(file(b"f%d" % number, 10 + number), time_ns=number) for number in range(50)]
    write(fold.journal, [[record] for record in files], SMALL)
    last_seq = extent(fold.journal).last_seq
    check = fold.known._check_gap

    def end(*arguments: Any) -> None:
        fold.known.is_enough = True
        check(*arguments)

    monkeypatch.setattr(fold.known, "_check_gap", end)
    fold.fold(last_seq)
    assert 0 < len(fold.tree()) < len(files)
    assert fold.fold(last_seq) == 0
    fold.reopen()
    fold.fold(last_seq)
    assert fold.tree().keys() == {record.path for record in files}


def test_a_directory_that_is_gone_takes_all_below_it_with_it(fold: Fold) -> None:
    fold.tell(*GROWN, gone(b"d", is_dir=True))
    assert fold.tree() == {b"g": (5, 11)}


@pytest.mark.parametrize("is_old_name_first", [True, False])
def test_a_renamed_directory_keeps_what_is_below_whichever_name_is_told_first(
    fold: Fold, is_old_name_first: bool
) -> None:
    old, new = gone(b"d", RENAME, is_dir=True), directory(b"h", 2, RENAME, b"d")
    fold.tell(*GROWN)
    before = fold.rows()
    fold.tell(*((old, new) if is_old_name_first else (new, old)))
    assert fold.tree() == {b"h": (2, 0), b"h/e": (3, 0), b"h/e/f": (4, 10), b"g": (5, 11)}
    assert fold.rows() == before


def test_the_halves_of_a_rename_may_be_folded_at_different_times_and_by_different_runs(fold: Fold) -> None:
    fold.tell(*GROWN)
    fold.tell(gone(b"d", RENAME, is_dir=True))
    assert fold.tree() == {b"g": (5, 11)}
    fold.reopen()
    fold.tell(directory(b"h", 2, RENAME, b"d"))
    assert fold.tree() == {b"h": (2, 0), b"h/e": (3, 0), b"h/e/f": (4, 10), b"g": (5, 11)}


def test_names_told_in_a_directory_before_its_own_new_name_wait_for_it(fold: Fold) -> None:
    fold.tell(*GROWN)
    fold.tell(file(b"h/new", 6), gone(b"h/e/f"), directory(b"h", 2, ATTRIB), directory(b"h", 2, RENAME, b"d"))
    fold.tell(gone(b"d", RENAME, is_dir=True))
    assert fold.tree() == {b"h": (2, 0), b"h/e": (3, 0), b"h/new": (6, 0), b"g": (5, 11)}


def test_two_directories_that_were_exchanged_keep_what_is_theirs(fold: Fold) -> None:
    fold.tell(*GROWN, directory(b"o", 7), file(b"o/x", 8))
    fold.tell(directory(b"d", 7, RENAME, b"o"), directory(b"o", 2, RENAME, b"d"))
    assert fold.tree() == {b"d": (7, 0), b"d/x": (8, 0), b"o": (2, 0), b"o/e": (3, 0), b"o/e/f": (4, 10), b"g": (5, 11)}


def test_a_directory_taken_out_of_one_that_was_removed_keeps_what_is_below(fold: Fold) -> None:
    fold.tell(*GROWN)
    fold.tell_together(gone(b"d", is_dir=True), gone(b"d/e", RENAME, is_dir=True), directory(b"k", 3, RENAME, b"d/e"))
    assert fold.tree() == {b"k": (3, 0), b"k/f": (4, 10), b"g": (5, 11)}


def test_a_directory_that_ends_up_in_one_that_was_below_it_is_followed(fold: Fold) -> None:
    fold.tell(*GROWN)
    fold.tell(
        directory(b"e/d", 2, RENAME, b"d"), gone(b"e/d/e", RENAME, is_dir=True), directory(b"e", 3, RENAME, b"e/d/e")
    )
    fold.tell(gone(b"d", RENAME, is_dir=True))
    assert fold.tree() == {b"e": (3, 0), b"e/f": (4, 10), b"e/d": (2, 0), b"g": (5, 11)}


def test_what_was_told_of_a_removed_directory_does_not_reach_the_one_that_was_moved_away_before(fold: Fold) -> None:
    fold.tell(*GROWN, directory(b"o", 7), file(b"o/e", 8))
    fold.tell_together(  # exchanged, d removed with what was in it, and something made in o
        gone(b"d/e", is_dir=True),
        gone(b"d", RENAME | DELETE, is_dir=True),
        file(b"o/e", 9, kinds=CREATE | DELETE),
        directory(b"o", 2, RENAME, b"d"),
    )
    assert fold.tree() == {b"o": (2, 0), b"o/e": (9, 0), b"g": (5, 11)}


def test_a_removal_told_in_vain_does_not_wait_for_a_directory_that_takes_the_name_later(fold: Fold) -> None:
    fold.tell(*GROWN)
    fold.tell_together(gone(b"h/e", CREATE | DELETE, is_dir=True), gone(b"h", CREATE | DELETE, is_dir=True))
    fold.tell_together(directory(b"h", 2, RENAME, b"d"), gone(b"d", RENAME, is_dir=True))
    assert fold.tree() == {b"h": (2, 0), b"h/e": (3, 0), b"h/e/f": (4, 10), b"g": (5, 11)}


def test_a_directory_that_was_made_and_renamed_at_once_does_not_wait_for_what_was_in_it(fold: Fold) -> None:
    fold.tell_together(directory(b"d", 2, RENAME, b"t"), gone(b"t", CREATE | RENAME, is_dir=True))
    fold.tell_together(directory(b"d/e", 3), file(b"d/e/f", 4, 10))
    fold.tell_together(directory(b"d", 7, CREATE | RENAME), directory(b"h", 2, RENAME, b"d"))
    fold.tell_together(directory(b"d", 2, RENAME, b"h"), directory(b"h", 7, RENAME, b"d"))
    assert fold.tree() == {b"d": (2, 0), b"d/e": (3, 0), b"d/e/f": (4, 10), b"h": (7, 0)}


def test_a_new_directory_with_the_inode_number_of_a_removed_one_does_not_inherit_what_was_in_that(fold: Fold) -> None:
    fold.tell(*GROWN)
    fold.tell_together(
        gone(b"d/e", is_dir=True),
        gone(b"d", is_dir=True),
        gone(b"t", CREATE | RENAME, is_dir=True),
        directory(b"h", 2, RENAME, b"t"),
    )
    assert fold.tree() == {b"h": (2, 0), b"g": (5, 11)}


def test_a_directory_that_was_outside_of_the_layer_begins_with_what_is_told_then(fold: Fold) -> None:
    fold.tell(*GROWN)
    fold.tell(gone(b"d", RENAME, is_dir=True))
    fold.tell(directory(b"d", 2, RENAME), directory(b"d/new", 6))
    assert fold.tree() == {b"d": (2, 0), b"d/new": (6, 0), b"g": (5, 11)}


def test_of_two_words_about_a_name_at_one_time_the_one_of_what_is_there_holds(fold: Fold) -> None:
    fold.tell(*GROWN, directory(b"o", 7))
    fold.tell_together(
        directory(b"d/x", 8), directory(b"d", 7, RENAME | DELETE, b"o"), gone(b"d/x"), gone(b"o", RENAME, is_dir=True)
    )
    assert fold.tree() == {b"d": (7, 0), b"d/x": (8, 0), b"g": (5, 11)}


@pytest.mark.parametrize("records", [1, 2, 3])
def test_changes_that_were_looked_at_together_are_folded_together_in_several_transactions(
    fold: Fold, monkeypatch: pytest.MonkeyPatch, records: int
) -> None:
    fold.tell(*GROWN)
    monkeypatch.setattr("watchd.journal.known.COMMIT_RECORDS", records)
    fold.tell_together(
        directory(b"e/d", 2, RENAME, b"d"),
        gone(b"e/d/e", RENAME, is_dir=True),
        file(b"e/d/new", 6),
        gone(b"d", RENAME, is_dir=True),
        directory(b"e", 3, RENAME, b"e/d/e"),
    )
    expected = {b"e": (3, 0), b"e/f": (4, 10), b"e/d": (2, 0), b"e/d/new": (6, 0), b"g": (5, 11)}
    assert fold.tree() == expected


def test_a_directory_made_anew_under_its_name_begins_empty_even_with_the_same_inode(fold: Fold) -> None:
    fold.tell(*GROWN, directory(b"d", 2, CREATE | DELETE))
    assert fold.tree() == {b"d": (2, 0), b"g": (5, 11)}


def test_what_is_known_is_never_ahead_of_what_was_asked_for_and_goes_on_where_it_ended(fold: Fold) -> None:
    write(fold.journal, [[record] for record in GROWN], SMALL)
    assert [fold.fold(upto) for upto in (1, 3, 3, 4)] == [1, 2, 0, 1]
    assert fold.tree() == GROWN_TREE
    assert fold.known.upto == 4


def test_records_from_before_the_walk_of_a_layer_are_not_folded_onto_it(fold: Fold) -> None:
    fold.tell(*GROWN)
    fold.learn("other", upto=4)
    fold.tell(file(b"late", 9, layer="other"), Desync(1, "base", "limit"))
    assert fold.tree("other") == {b"late": (9, 0)}
    assert fold.tree() == GROWN_TREE


def test_a_walk_that_is_not_done_keeps_the_journal_and_is_forgotten_by_the_next_run(fold: Fold) -> None:
    fold.tell(*GROWN)
    number = fold.known.begin("new", b"/new", 4)
    fold.known.store(number, [(fold.known.next_number(), Listing())])
    fold.tell(file(b"more", 6))
    assert fold.known.upto == 4
    fold.reopen()
    fold.known.tidy()
    assert fold.known.upto == 5
    assert set(fold.known.layers) == {"base"}
    assert fold.rows() == 3


def test_with_a_new_journal_what_is_known_is_kept_and_followed_from_its_beginning(fold: Fold, tmp_path: Path) -> None:
    fold.tell(*GROWN)
    fold.known.close()
    fold.journal = tmp_path / "another"
    write(fold.journal, [[gone(b"g")]])
    fold.known = fold.open()
    assert fold.tree() == GROWN_TREE
    fold.tell()
    assert fold.tree().keys() == GROWN_TREE.keys() - {b"g"}


def test_what_is_ahead_of_the_journal_is_not_believed(fold: Fold) -> None:
    fold.tell(*GROWN)
    fold.known.close()
    fold.known = Known(fold.path, journal=fold.journal, epoch=extent(fold.journal).epoch, last_seq=2)
    assert fold.known.layers == {}


def test_records_that_are_gone_from_the_journal_end_what_is_known_by_them(fold: Fold) -> None:
    write(fold.journal, [[file(b"%d" % number, number)] for number in range(2, 30)], SMALL)
    fold.fold(2)
    segments = sorted(fold.journal.glob("*.wal"))
    assert len(segments) > 2
    for path in segments[:-1]:
        path.unlink()
    assert segment_path(fold.journal, 1) == segments[0]
    fold.fold(28)
    assert fold.known.layers == {}
    with pytest.raises(KnownError, match="knows no layer"):
        fold.known.tree("base")


def test_a_fold_of_more_directories_than_fit_into_memory_loses_none(
    fold: Fold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("watchd.journal.folding.CACHED_MAX", 10)
    made = [directory(b"d%d" % number, 100 + number) for number in range(30)]
    files = [file(b"d%d/%d" % (number % 30, number), 200 + number) for number in range(90)]
    write(fold.journal, [[*made, *files]])
    fold.fold(120)
    assert len(fold.tree()) == 120


def test_a_damaged_file_is_told_from_one_that_is_out_of_reach_and_set_aside(fold: Fold, tmp_path: Path) -> None:
    fold.known.close()
    fold.path.write_bytes(b"garbage" * 1000)
    with pytest.raises(KnownError) as caught:
        fold.open()
    assert caught.value.is_damage
    assert set_aside(fold.path).read_bytes().startswith(b"garbage")
    with pytest.raises(KnownError) as caught:
        Known(tmp_path / "missing" / "known.db", journal=fold.journal, epoch="", last_seq=0)
    assert not caught.value.is_damage
    fold.known = fold.open()
    assert fold.known.layers == {}


def test_layers_beyond_the_bound_are_forgotten_the_longest_unseen_first(fold: Fold) -> None:
    for number in range(LAYERS_MAX):
        fold.learn(f"layer-{number}")
    assert len(fold.known.layers) == LAYERS_MAX
    assert "base" not in fold.known.layers


def test_an_entry_takes_less_than_120_bytes_on_disk(fold: Fold) -> None:
    number, root, per_directory = fold.known.begin("big", b"/big", 0), fold.known.next_number(), 12
    names = {b"directory-%05d" % name: fold.known.next_number() for name in range(2000)}
    state = (12345).to_bytes(8, "little") + status(is_dir=True)
    rows = [(root, listing_of(dict.fromkeys(names, state), names))]
    leaf = listing_of({b"libexample-%d.so.1.2.3" % name: bytes(8) + status(name) for name in range(per_directory)}, {})
    rows += [(child, leaf) for child in names.values()]
    fold.known.store(number, rows)
    fold.known.complete(number, root, state)
    fold.known.close()
    size = fold.path.stat().st_size
    fold.known = fold.open()
    assert size / (2000 * (per_directory + 1)) < 120


def test_what_a_scan_tells_as_gone_does_not_come_back_with_what_it_tells_as_created(fold: Fold) -> None:
    fold.tell(*GROWN)
    scanned = [
        gone(b"d", is_dir=True),
        gone(b"d/e", is_dir=True),
        gone(b"d/e/f"),
        directory(b"h", 2),
        directory(b"h/e", 3),
        file(b"h/new", 6),
    ]
    # An event of the meantime, told before the scan came to what is above.
    fold.tell(directory(b"h/e", 3, ATTRIB), *(msgspec.structs.replace(change, via=Via.SCAN) for change in scanned))
    assert fold.tree() == {b"h": (2, 0), b"h/e": (3, 0), b"h/new": (6, 0), b"g": (5, 11)}
