"""`watchd changes` and `watchd cursor` over journals made for the purpose."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from click.testing import CliRunner, Result

from tests.conftest import Require
from tests.unit.journal.support import SMALL_SEGMENTS, change, changes, only_segment, write
from watchd import cli
from watchd.journal.changes import collect
from watchd.journal.format import LayerMark
from watchd.journal.reader import extent
from watchd.journal.render import changes_to_json
from watchd.journal.segments import list_segments, segment_path
from watchd.records import Change, Desync, Record

RECORDS: list[Record] = [
    Change(2, "base", b"etc/x", 1, True, False),
    Change(4, "other", b"new", 4, True, True, b"old"),
    Change(6, "base", "ü\udcff\n".encode("utf-8", "surrogateescape"), 2, False, False),
]
NOBODY = 65534


@pytest.fixture
def state(tmp_path: Path) -> Path:
    state = tmp_path / "state"
    write(state / "journal", [RECORDS])
    return state


def run(state: Path, *arguments: str) -> Result:
    file = state.parent / "watchd.yaml"
    file.write_text(f"state_directory: {state}\n")
    return CliRunner().invoke(cli.main, [*arguments, "--config", str(file)])


def cursor_of(state: Path, seq: int) -> str:
    return f"{extent(state / 'journal').epoch}:{seq}"


def test_people_are_shown_a_line_an_entry_and_where_to_go_on(state: Path) -> None:
    result = run(state, "changes", "--since", "beginning")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "1  base  create etc/x",
        "3  base  delete \N{LATIN SMALL LETTER U WITH DIAERESIS}\\xff\\n (gone)",
        "2  other  rename new/ from old (with everything below)",
        "2  other  rename old/ (gone) (with everything below)",
        f"cursor {cursor_of(state, 3)}",
    ]
    result = run(state, "changes", "--since", "beginning", "--dirs", "--ancestors", "--layer", "base")
    assert result.stdout.splitlines() == ["3  base  ./", "1  base  etc/", f"cursor {cursor_of(state, 3)}"]


@pytest.mark.parametrize(
    "options", [[], ["--dirs"], ["--paths", "--path", "/etc/"], ["--layer", "other"], ["--path", "no"]]
)
def test_scripts_are_given_one_object(state: Path, options: list[str]) -> None:
    result = run(state, "changes", "--since", "beginning", "--json", *options)
    asked = {"dirs": "--dirs" in options}
    if "--path" in options:
        asked["prefix"] = os.fsencode(options[-1]).strip(b"/")
    if "--layer" in options:
        asked["layers"] = frozenset({"other"})
    assert result.exit_code == 0
    assert json.loads(result.stdout) == changes_to_json(collect(state, "beginning", **asked))
    assert result.stdout.count("\n") == 1


def test_an_answer_of_many_pieces_is_whole(state: Path) -> None:
    write(state / "journal", [[change(number, b"%d" % number) for number in range(2500)]])
    result = run(state, "changes", "--since", "now", "--json")
    assert json.loads(result.stdout)["entries"] == []
    result = run(state, "changes", "--since", cursor_of(state, 3), "--json")
    assert {entry["path"] for entry in json.loads(result.stdout)["entries"]} == {str(number) for number in range(2500)}


def test_a_consumer_that_has_to_look_at_everything_is_told_and_still_gets_what_is_known(state: Path) -> None:
    marks = {"base": LayerMark(b"/b"), "other": LayerMark(b"/o")}
    write(state / "journal", [[marks, Desync(1, "base", "overflow")]])
    result = run(state, "changes", "--since", "beginning", "--layer", "base")
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 3)
    assert "look at everything" in result.stderr
    assert json.loads(run(state, "changes", "--since", "beginning", "--json").stdout)["fresh"] is True
    assert run(state, "changes", "--since", "beginning", "--layer", "other").stderr == ""


def test_a_cursor_is_set_listed_used_and_deleted(state: Path) -> None:
    assert run(state, "cursor").stdout == ""
    assert run(state, "cursor", "set", "mirror", cursor_of(state, 2)).stdout == f"mirror {cursor_of(state, 2)}\n"
    assert json.loads(run(state, "cursor", "set", "backup", "--json").stdout) == {
        "name": "backup",
        "cursor": cursor_of(state, 3),
    }
    listed = {
        "cursors": [
            {"name": "backup", "cursor": cursor_of(state, 3), "lag": 0},
            {"name": "mirror", "cursor": cursor_of(state, 2), "lag": 1},
        ]
    }
    assert json.loads(run(state, "cursor", "--json").stdout) == listed
    assert json.loads(run(state, "cursor", "list", "--json").stdout) == listed
    assert "  mirror  " in run(state, "cursor").stdout
    assert len(run(state, "log", "--since", "mirror").stdout.splitlines()) == 1
    assert len(json.loads(run(state, "changes", "--since", "mirror", "--json").stdout)["entries"]) == 1
    assert run(state, "cursor", "set", "copy", "mirror").exit_code == 0
    assert run(state, "cursor", "delete", "mirror").exit_code == 0
    assert json.loads(run(state, "cursor", "--json").stdout)["cursors"][1]["name"] == "copy"


def snapshot(directory: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["changes", "--since", "0123456789abcdef:1"], 2, "belongs to another journal.*start over from beginning"),
        (["changes", "--since", "{epoch}:4"], 2, "lies beyond the journal's end at 3; give now"),
        (["changes", "--since", "nobody"], 2, "there is no cursor 'nobody'; see `watchd cursor list`"),
        (["changes", "--since", "no body"], 2, "'no body' is no cursor; give EPOCH:SEQ, a name, now or beginning"),
        (["changes"], 2, "Missing option '--since'; see `watchd changes --help`"),
        (["changes", "--since", "now", "--ancestors"], 2, "--ancestors goes with --dirs only; add --dirs"),
        (["log", "--since", "0123456789abcdef:1"], 2, "belongs to another journal"),
        (["log", "--since", "{epoch}:4"], 2, "lies beyond the journal's end"),
        (["log", "--since", "nobody"], 2, "there is no cursor 'nobody'"),
        (["cursor", "set", "a/b"], 2, "'a/b' cannot be the name of a cursor; take a letter"),
        (["cursor", "set", "now"], 2, "'now' cannot be the name of a cursor"),
        (["cursor", "set", "mine", "{epoch}:4"], 2, "lies beyond the journal's end"),
        (["cursor", "set", "mine", "nobody"], 2, "there is no cursor 'nobody'"),
        (["cursor", "delete", "nobody"], 2, "there is no cursor 'nobody'"),
        (["cursor", "bogus"], 2, "No such command 'bogus'"),
    ],
)
def test_a_bad_request_is_one_clear_line_and_changes_nothing(
    state: Path, arguments: list[str], status: int, message: str
) -> None:
    epoch = extent(state / "journal").epoch
    before = snapshot(state)
    result = run(state, *(argument.format(epoch=epoch) for argument in arguments))
    expect_one_line(result, status, message)
    assert snapshot(state) == before


def expect_one_line(result: Result, status: int, message: str) -> None:
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (status, "", 1), result.stderr
    assert message.split(".*")[0] in result.stderr
    assert message.split(".*")[-1] in result.stderr


VERBS = [["changes", "--since", "beginning"], ["changes", "--since", "now", "--dirs"], ["log"], ["cursor", "set", "a"]]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_what_is_no_good_journal_is_one_clear_line_and_stays_as_it_is(tmp_path: Path, verb: list[str]) -> None:
    state = tmp_path / "state"

    def expect(message: str) -> None:
        before = snapshot(tmp_path / "state")
        expect_one_line(run(state, *verb), 1, message)
        assert snapshot(tmp_path / "state") == before

    expect("No such file or directory; start `watchd run` once, or correct state_directory")
    (state / "journal").mkdir(parents=True)
    (state / "journal" / "README").write_text("what this is")
    expect("there is no journal in")
    segment_path(state / "journal", 1).write_bytes(b"not a segment at all, but long enough to hold a header")
    expect("it is no journal segment")
    segment_path(state / "journal", 1).write_bytes(b"WATCHDJ\n")
    expect("its header is cut short; run `watchd journal verify`")
    segment_path(state / "journal", 1).unlink()
    (state / "journal" / "README").unlink()
    write(state / "journal", [changes(3)])
    header = bytearray(only_segment(state / "journal").read_bytes())
    header[8] = 2
    header[36:40] = zlib.crc32(header[:36]).to_bytes(4, "little")
    only_segment(state / "journal").write_bytes(header)
    expect("it has format 2, flags 0x0; this watchd reads format 1 only")


def test_a_segment_that_was_cut_in_the_middle_of_the_journal_is_one_clear_line(tmp_path: Path) -> None:
    write(tmp_path / "journal", [changes(5, start) for start in range(1, 41, 5)], SMALL_SEGMENTS)
    first = segment_path(tmp_path / "journal", 1)
    first.write_bytes(first.read_bytes()[:-1])
    before = snapshot(tmp_path / "journal")
    expect_one_line(run(tmp_path, "changes", "--since", "beginning"), 1, "the segment ends in the middle of a record")
    assert snapshot(tmp_path / "journal") == before


def test_a_log_whose_beginning_was_removed_is_not_passed_over(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    write(journal, [changes(5, start) for start in range(1, 41, 5)], SMALL_SEGMENTS)
    second = list_segments(journal)[1]
    run(tmp_path, "cursor", "set", "slow", cursor_of(tmp_path, 2))
    run(tmp_path, "cursor", "set", "first", cursor_of(tmp_path, 0))
    segment_path(journal, 1).unlink()
    expect_one_line(run(tmp_path, "log", "--since", "slow"), 1, f"records 3 to {second - 1} are gone")
    expect_one_line(run(tmp_path, "log", "--since", "first"), 1, f"records 1 to {second - 1} are gone")
    assert len(run(tmp_path, "log").stdout.splitlines()) == 41 - second
    answer = json.loads(run(tmp_path, "changes", "--since", "slow", "--json").stdout)
    assert (answer["fresh"], len(answer["entries"])) == (True, 1)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_who_may_not_read_the_journal_is_told_so(verb: list[str], require: Require) -> None:
    require(os.geteuid() == 0, "root, to become somebody else")
    with TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        state = Path(name) / "state"
        write(state / "journal", [RECORDS])
        run(state, "cursor")
        os.seteuid(NOBODY)
        try:
            result = CliRunner().invoke(cli.main, [*verb, "--config", f"{name}/watchd.yaml"])
        finally:
            os.seteuid(0)
    expect_one_line(result, 77, "Permission denied; run as root, or set state_directory")
