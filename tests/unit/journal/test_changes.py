"""The answer to "what changed since my baseline?"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.journal.support import SMALL_SEGMENTS, change, changes, write
from watchd.errors import UsageError
from watchd.journal.changes import DirectoryEntry, PathEntry, collect
from watchd.journal.format import LayerMark
from watchd.journal.reader import extent
from watchd.journal.render import changes_to_json
from watchd.journal.segments import list_segments, segment_path
from watchd.records import Change, Desync, Kind, Record, Resync, Start

CREATE, DELETE, RENAME, MODIFY, ATTRIB = (int(kind) for kind in Kind)


def file(path: bytes, kinds: int, *, exists: bool = True, layer: str = "base", inode: int | None = None) -> Change:
    return Change(1, layer, path, kinds, exists, False, inode=inode)


def directory(path: bytes, kinds: int, *, exists: bool = True, from_path: bytes | None = None) -> Change:
    return Change(1, "base", path, kinds, exists, True, from_path)


def answer(
    tmp_path: Path, records: list[Record], *, since: str = "beginning", **question: Any
) -> list[PathEntry | DirectoryEntry]:
    write(tmp_path / "journal", [records])
    return list(collect(tmp_path, since, **question).entries)


def paths(entries: list[PathEntry | DirectoryEntry]) -> list[bytes]:
    return [entry.path for entry in entries]


def test_each_path_is_told_once_with_its_last_state(tmp_path: Path) -> None:
    told = answer(
        tmp_path,
        [
            file(b"etc/x", CREATE, inode=7),
            file(b"etc/x", MODIFY, layer="other"),
            file(b"etc/x", MODIFY, inode=7),
            file(b"a", CREATE),
            file(b"etc/x", DELETE, exists=False),
        ],
    )
    assert told == [
        PathEntry("base", b"a", CREATE, True, False, 4),
        PathEntry("base", b"etc/x", CREATE | MODIFY | DELETE, False, False, 5),
        PathEntry("other", b"etc/x", MODIFY, True, False, 2),
    ]


def test_only_what_lies_behind_the_baseline_and_in_the_layers_and_below_the_prefix(tmp_path: Path) -> None:
    records: list[Record] = [file(b"etc/x", 1), file(b"etcetera", 1), file(b"etc", 16, layer="other"), file(b"z", 1)]
    assert paths(answer(tmp_path, records, since="beginning", prefix=b"etc")) == [b"etc/x", b"etc"]
    epoch = extent(tmp_path / "journal").epoch
    assert paths(list(collect(tmp_path, f"{epoch}:2").entries)) == [b"z", b"etc"]
    assert paths(list(collect(tmp_path, "beginning", layers=frozenset({"other"})).entries)) == [b"etc"]
    assert collect(tmp_path, "now").entries == ()


def test_a_renamed_directory_stands_for_all_below_it_under_both_names(tmp_path: Path) -> None:
    moved = directory(b"new/d", RENAME, from_path=b"old/d")
    assert answer(tmp_path, [moved]) == [
        PathEntry("base", b"new/d", RENAME, True, True, 1, b"old/d", recursive=True),
        PathEntry("base", b"old/d", RENAME, False, True, 1, recursive=True),
    ]
    assert list(collect(tmp_path, "beginning", dirs=True).entries) == [
        DirectoryEntry("base", b"new", 1),
        DirectoryEntry("base", b"new/d", 1, recursive=True),
        DirectoryEntry("base", b"old", 1),
        DirectoryEntry("base", b"old/d", 1, recursive=True),
    ]


def gone(path: bytes) -> Change:
    return directory(path, RENAME, exists=False)


def told_of(tmp_path: Path, records: list[Record]) -> dict[bytes, tuple[bool, bool, bytes | None]]:
    """By path: whether it exists, whether it is recursive, and where it came from."""
    entries = answer(tmp_path, records)
    return {one.path: (one.exists, one.recursive, one.from_path) for one in entries if isinstance(one, PathEntry)}


@pytest.mark.parametrize("is_new_name_first", [False, True])
def test_a_directory_that_was_renamed_twice_can_be_followed_to_where_it_was(
    tmp_path: Path, *, is_new_name_first: bool
) -> None:
    first, second = (
        [gone(b"a"), directory(b"b", RENAME, from_path=b"a")],
        [gone(b"b"), directory(b"c", RENAME, from_path=b"b")],
    )
    if is_new_name_first:
        first.reverse()
        second.reverse()
    assert told_of(tmp_path, [*first, *second, file(b"c/x", MODIFY)]) == {
        b"a": (False, True, None),
        b"b": (False, True, b"a"),
        b"c": (True, True, b"b"),
        b"c/x": (True, False, None),
    }


def test_what_was_below_a_directory_that_went_is_not_said_to_exist(tmp_path: Path) -> None:
    told = told_of(
        tmp_path, [file(b"a/x", MODIFY), file(b"a/d/y", CREATE), gone(b"a"), directory(b"b", RENAME, from_path=b"a")]
    )
    assert told == {
        b"a": (False, True, None),
        b"a/d/y": (False, False, None),
        b"a/x": (False, False, None),
        b"b": (True, True, b"a"),
    }


def test_what_another_directory_brought_under_an_old_name_is_left_to_the_directory(tmp_path: Path) -> None:
    exchanged = [directory(b"a", RENAME, from_path=b"b"), directory(b"b", RENAME, from_path=b"a")]
    told = told_of(tmp_path, [file(b"a/x", MODIFY), *exchanged, file(b"b/x", MODIFY)])
    assert told == {b"a": (True, True, b"b"), b"b": (True, True, b"a"), b"b/x": (True, False, None)}


def test_a_directory_that_was_removed_and_made_again_is_another_one(tmp_path: Path) -> None:
    told = told_of(
        tmp_path,
        [
            file(b"a/x", DELETE, exists=False),
            directory(b"a", DELETE, exists=False),
            directory(b"a", CREATE),
            file(b"a/y", CREATE),
        ],
    )
    assert told == {b"a": (True, True, None), b"a/x": (False, False, None), b"a/y": (True, False, None)}


def test_a_directory_that_was_made_or_whose_mode_changed_covers_nothing(tmp_path: Path) -> None:
    assert told_of(tmp_path, [directory(b"a", CREATE), directory(b"b", ATTRIB)]) == {
        b"a": (True, False, None),
        b"b": (True, False, None),
    }


def test_paths_as_deep_as_they_can_be_are_told(tmp_path: Path) -> None:
    deep = b"/".join([b"d"] * 2040)
    assert paths(answer(tmp_path, [gone(b"e"), file(deep, CREATE)], prefix=b"d")) == [deep]
    assert len(collect(tmp_path, "beginning", dirs=True, ancestors=True).entries) == 2041


@pytest.mark.parametrize("dirs", [False, True])
@pytest.mark.parametrize("prefix", [b"a/deep/tree", b"b/deep/tree"])
def test_a_tree_whose_ancestor_was_renamed_is_not_called_unchanged(
    tmp_path: Path, prefix: bytes, *, dirs: bool
) -> None:
    told = answer(tmp_path, [directory(b"b", RENAME, from_path=b"a"), file(b"c", 1)], prefix=prefix, dirs=dirs)
    assert paths(told) == [prefix[:1]]


def test_directories_are_told_with_the_last_change_in_them_and_ancestors_with_that_below(tmp_path: Path) -> None:
    told = answer(tmp_path, [file(b"usr/lib/x/y", 1), file(b"etc/x", 1), file(b"usr/lib/x/z", 2)], dirs=True)
    assert told == [DirectoryEntry("base", b"etc", 2), DirectoryEntry("base", b"usr/lib/x", 3)]
    assert list(collect(tmp_path, "beginning", dirs=True, ancestors=True).entries) == [
        DirectoryEntry("base", b"", 3),
        DirectoryEntry("base", b"etc", 2),
        DirectoryEntry("base", b"usr", 3),
        DirectoryEntry("base", b"usr/lib", 3),
        DirectoryEntry("base", b"usr/lib/x", 3),
    ]


def test_the_cursor_of_an_answer_is_the_next_baseline(tmp_path: Path) -> None:
    write(tmp_path / "journal", [changes(3)])
    cursor = str(collect(tmp_path, "beginning").cursor)
    write(tmp_path / "journal", [[change(4, b"new")]])
    assert paths(list(collect(tmp_path, cursor).entries)) == [b"new"]


@pytest.mark.parametrize(
    ("records", "layers", "fresh"),
    [
        ([Start(1, "v", "b"), Desync(2, "base", "overflow")], [], True),
        ([Desync(2, "base", "overflow")], ["base"], True),
        ([Desync(2, "base", "overflow")], ["other"], False),
        ([Desync(2, "base", "overflow"), Resync(3, "base", 1, 0)], ["base"], False),
        ([Desync(2, "base", "overflow"), Resync(3, "other", 1, 0)], ["base"], True),
        ([Desync(2, "base", "overflow"), Desync(3, "base", "overflow"), Resync(4, "base", 1, 0)], ["base"], True),
        ([Desync(2, "", "limit")], ["base"], True),
    ],
)
@pytest.mark.parametrize("since", ["beginning", "now"])
def test_an_answer_is_fresh_while_a_gap_of_its_layers_is_open(
    tmp_path: Path, records: list[Record], layers: list[str], since: str, *, fresh: bool
) -> None:
    marks = {"base": LayerMark(b"/b"), "other": LayerMark(b"/o")}
    write(tmp_path / "journal", [[marks, *records]], SMALL_SEGMENTS)
    assert collect(tmp_path, since, layers=frozenset(layers)).fresh is fresh


def test_a_layer_is_fresh_for_every_baseline_from_before_it_was_watched(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    marks = {"base": LayerMark(b"/b")}
    write(journal, [[marks, *changes(4)], [{**marks, "new": LayerMark(b"/n", 1, 0, 4)}, *changes(3)]], SMALL_SEGMENTS)
    epoch = extent(journal).epoch

    def fresh(since: int, *layers: str) -> bool:
        return collect(tmp_path, f"{epoch}:{since}", layers=frozenset(layers)).fresh

    assert [fresh(since, "new") for since in range(8)] == [True] * 5 + [False] * 3
    assert [fresh(since, "new", "base") for since in range(8)] == [True] * 5 + [False] * 3
    assert not any(fresh(since, "base") or fresh(since) for since in range(8))
    assert all(fresh(since, "unknown") for since in range(8))


def test_an_answer_is_fresh_when_its_baseline_is_older_than_the_journal(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    write(journal, [changes(5, start) for start in range(1, 41, 5)], SMALL_SEGMENTS)
    second = list_segments(journal)[1]
    segment_path(journal, 1).unlink()
    epoch = extent(journal).epoch
    assert collect(tmp_path, "beginning").fresh
    assert collect(tmp_path, f"{epoch}:{second - 2}").fresh
    assert not collect(tmp_path, f"{epoch}:{second - 1}").fresh
    assert not collect(tmp_path, "now").fresh


def test_a_cursor_of_another_journal_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "journal", [changes(3)])
    with pytest.raises(UsageError, match="belongs to another journal"):
        collect(tmp_path, f"{'0' * 16}:1")


def test_json_has_the_keys_of_the_contract(tmp_path: Path) -> None:
    moved = Change(1, "base", b"b\xff", 4, True, True, b"a", 12)
    write(tmp_path / "journal", [[moved]])
    found = collect(tmp_path, "beginning")
    assert changes_to_json(found) == {
        "cursor": f"{extent(tmp_path / 'journal').epoch}:1",
        "fresh": False,
        "entries": [
            {
                "layer": "base",
                "path": "a",
                "kinds": ["rename"],
                "exists": False,
                "is_dir": True,
                "seq": 1,
                "recursive": True,
            },
            {
                "layer": "base",
                "path": "b\N{REPLACEMENT CHARACTER}",
                "path_b64": "Yv8=",
                "kinds": ["rename"],
                "exists": True,
                "is_dir": True,
                "seq": 1,
                "from": "a",
                "inode": 12,
                "recursive": True,
            },
        ],
    }
    assert changes_to_json(collect(tmp_path, "beginning", dirs=True))["entries"] == [
        {"layer": "base", "path": "", "seq": 1},
        {"layer": "base", "path": "a", "seq": 1, "recursive": True},
        {"layer": "base", "path": "b\N{REPLACEMENT CHARACTER}", "path_b64": "Yv8=", "seq": 1, "recursive": True},
    ]
