"""`watchd log` over journals made for the purpose."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.unit.journal.support import change, write
from watchd.cli.log import Filters, log, path_prefix, run_log
from watchd.errors import JournalError, UsageError
from watchd.journal.reader import extent
from watchd.records import Change, Desync, Record, Start

RECORDS: list[Record] = [
    Start(1, "v", "b"),
    Change(2, "base", b"etc/x", 1, True, False),
    Change(3, "base", b"etcetera", 4, True, False, b"etc/y"),
    Change(4, "other", b"etc", 16, True, True),
    Desync(5, "base", "overflow"),
    Change(6, "base", "ü\udcff\n".encode("utf-8", "surrogateescape"), 8, True, False),
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write(tmp_path / "journal", [RECORDS])
    return tmp_path / "journal"


def configuration(directory: Path) -> list[str]:
    file = directory.parent / "watchd.yaml"
    file.write_text(f"state_directory: {directory.parent}\n")
    return ["--config", str(file)]


def shown(directory: Path, *, since: str = "beginning", filters: Filters | None = None) -> list[int]:
    out = io.BytesIO()
    run_log(directory, out, since=since, filters=filters, as_json=True)
    return [json.loads(line)["seq"] for line in out.getvalue().splitlines()]


def test_filters_let_through_what_was_asked_for(directory: Path) -> None:
    assert shown(directory) == [1, 2, 3, 4, 5, 6]
    assert shown(directory, filters=Filters(layers=frozenset({"base"}))) == [2, 3, 5, 6]
    assert shown(directory, filters=Filters(types=frozenset({"desync", "start"}))) == [1, 5]
    assert shown(directory, filters=Filters(path=b"etc")) == [2, 3, 4]
    assert shown(directory, filters=Filters(path=b"")) == [2, 3, 4, 6]
    assert shown(directory, filters=Filters(frozenset({"other"}), b"etc", frozenset({"change"}))) == [4]


@pytest.mark.parametrize(("text", "prefix"), [("/etc/", b"etc"), (".", b""), ("/", b""), ("a//./b", b"a/b")])
def test_a_path_is_understood_however_it_is_written(text: str, prefix: bytes) -> None:
    assert path_prefix(text) == prefix


def test_a_cursor_stands_behind_its_record(directory: Path) -> None:
    epoch = extent(directory).epoch
    assert shown(directory, since=f"{epoch}:4") == [5, 6]
    assert shown(directory, since="beginning") == [1, 2, 3, 4, 5, 6]
    assert shown(directory, since="now") == []


@pytest.mark.parametrize(
    ("cursor", "message"),
    [("yesterday", "no cursor"), ("0" * 16 + ":3", "another journal"), ("{epoch}:7", "beyond the journal's end at 6")],
)
def test_a_bad_cursor_is_refused(directory: Path, cursor: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        shown(directory, since=cursor.format(epoch=extent(directory).epoch))


def test_follow_goes_on_where_the_journal_does(directory: Path) -> None:
    out = io.BytesIO()
    waits = 0

    def wait() -> None:
        nonlocal waits
        waits += 1
        if waits > 3:
            raise KeyboardInterrupt
        write(directory, [[change(waits)]])

    with pytest.raises(KeyboardInterrupt):
        run_log(directory, out, since="now", follow=True, as_json=True, wait=wait)
    assert [json.loads(line)["seq"] for line in out.getvalue().splitlines()] == [7, 8, 9]


def test_the_verb_prints_a_line_a_record(directory: Path) -> None:
    config = configuration(directory)
    text = CliRunner().invoke(log, [*config, "--path", "/etc", "--layer", "base", "--type", "change"])
    assert (text.exit_code, len(text.output.splitlines())) == (0, 2)
    assert "base  create etc/x" in text.output
    as_json = CliRunner().invoke(log, [*config, "--json"])
    assert json.loads(as_json.output.splitlines()[-1])["path_b64"] == "w7z/Cg=="
    assert CliRunner().invoke(log, [*config, "--type", "nonsense"]).exit_code == 2


def test_a_terminal_that_cannot_show_a_name_gets_it_escaped(directory: Path) -> None:
    out = io.BytesIO()
    run_log(directory, out, encoding="ascii")
    assert rb"modify \xfc\xff\n" in out.getvalue()


def test_no_journal_is_an_error_for_people(tmp_path: Path) -> None:
    result = CliRunner().invoke(log, configuration(tmp_path / "journal"))
    assert isinstance(result.exception, JournalError)
