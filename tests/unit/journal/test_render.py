"""Records as JSON and as text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.journal.support import records
from watchd.journal.render import printable, to_json, to_text
from watchd.records import STATUS, Action, Change, Damage, Desync, Kind, Record, Resync, Start, Stop, Via

T = 1_700_000_000_000_000_009
HEAD = {"seq": 4, "time": "2023-11-14T22:13:20.000000009Z"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            Change(T, "base", b"a/b", Kind.CREATE | Kind.RENAME | Kind.ATTRIB, True, False, b"c", 7, 8, b"mv",
                   status=STATUS.pack(0o100644, 3, 4, 5, T, T)),
            {"type": "change", "layer": "base", "path": "a/b", "kinds": ["create", "rename", "attrib"], "exists": True,
             "is_dir": False, "from": "c", "inode": 7, "mode": "100644", "uid": 3, "gid": 4, "size": 5,
             "mtime": HEAD["time"], "ctime": "2023-11-14T22:13:20.000000009Z", "pid": 8, "command": "mv", "via": "event"},
        ),
        (
            Change(T, "base", b"\xff", Kind.DELETE | Kind.MODIFY, False, True, via=Via.SCAN),
            {"type": "change", "layer": "base", "path": "\ufffd", "path_b64": "/w==", "kinds": ["delete", "modify"],
             "exists": False, "is_dir": True, "via": "scan"},
        ),
        (Desync(T, "base", "overflow"), {"type": "desync", "layer": "base", "reason": "overflow"}),
        (Resync(T, "base", 2, 0), {"type": "resync", "layer": "base", "closes": 2, "differences": 0}),
        (
            Action(T, "0:42", b"/m\xff", "invalidate", "coherent", 2, 0, 900, 3),
            {"type": "action", "layer": "", "mount": "0:42", "mount_point": "/m\ufffd", "mount_point_b64": "L23/",
             "method": "invalidate", "result": "coherent", "stale_before": 2, "stale_after": 0, "duration_ns": 900,
             "upto": 3},
        ),
        (
            Damage(T, "0:42", b"/m", b"\xff", "hides new"),
            {"type": "damage", "layer": "", "mount": "0:42", "mount_point": "/m", "path": "\ufffd", "path_b64": "/w==",
             "reason": "hides new"},
        ),
        (Start(T, "1.0", "b"), {"type": "start", "layer": "", "version": "1.0", "boot_id": "b"}),
        (Stop(T, "1.0", "b"), {"type": "stop", "layer": "", "version": "1.0", "boot_id": "b"}),
    ],
)  # fmt: skip
def test_json_has_the_keys_of_the_contract(record: Record, expected: dict[str, object]) -> None:
    assert to_json(4, record) == HEAD | expected


def test_the_layers_own_root_has_an_empty_path() -> None:
    assert to_json(1, Change(T, "base", b"", 16, True, True))["path"] == ""
    assert " attrib ./" in to_text(1, Change(T, "base", b"", 16, True, True))


@given(records, st.integers(1, 2**62))
def test_no_record_can_break_a_line_or_reach_the_terminal(record: Record, seq: int) -> None:
    record = _with_time(record)
    assert to_text(seq, record).isprintable()
    assert json.loads(json.dumps(to_json(seq, record)))["seq"] == seq


def _with_time(record: Record) -> Record:
    """Years that RFC 3339 can write."""
    return type(record)(record.time_ns % 10**20, *(getattr(record, name) for name in record.__struct_fields__[1:]))


def test_names_that_differ_look_different() -> None:
    names: list[bytes | str] = [
        "a\\nb",
        b"a\nb",
        "a\x1bb",
        b"a\xffb",
        "a\u202eb",
        "a\u00e9b",
        "a\\xffb",
        b"a\xed\xa0\x80b",
    ]
    shown = [printable(name) for name in names]
    assert len(set(shown)) == len(names)
    assert shown[:6] == ["a\\\\nb", "a\\nb", "a\\x1bb", "a\\xffb", "a\\u202eb", "a\u00e9b"]


def test_a_person_sees_what_was_damaged() -> None:
    text = to_text(4, Damage(T, "0:42", b"/m", b"a\nb", "it hides the lower's new file"))
    assert text.endswith(r"  -  damage of a\nb in /m (0:42): it hides the lower's new file")


def test_a_person_sees_what_happened() -> None:
    change = Change(T, "base", b"new", Kind.RENAME, False, False, b"old", 7, 8, b"mv", Via.POLL)
    assert to_text(4, change) == (
        "4  2023-11-14T22:13:20.000000009Z  base  rename new from old (gone) by mv[8] via poll"
    )
