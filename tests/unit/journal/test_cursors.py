"""Named cursors are kept whole or not at all, and what is no cursor is said to be none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from watchd.errors import UsageError
from watchd.journal.cursors import Cursor, Cursors, resolve
from watchd.journal.reader import Extent

EPOCH = "0123456789abcdef"
HERE = Extent(EPOCH, 5, 40)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cursors"


def test_a_cursor_is_there_until_it_is_deleted(directory: Path) -> None:
    cursors = Cursors(directory)
    assert cursors.all() == {}
    cursors.set("mirror", Cursor(EPOCH, 7))
    cursors.set("backup.daily", Cursor(EPOCH, 3))
    cursors.set("mirror", Cursor(EPOCH, 9))
    assert list(Cursors(directory).all().items()) == [("backup.daily", Cursor(EPOCH, 3)), ("mirror", Cursor(EPOCH, 9))]
    assert cursors.get("mirror") == Cursor(EPOCH, 9)
    cursors.delete("mirror")
    assert list(cursors.all()) == ["backup.daily"]
    assert sorted(os.listdir(directory)) == ["backup.daily"]


@pytest.mark.parametrize("name", ["", "now", "beginning", "1st", "../x", "a/b", "a:1", "-a", "a" * 65, "ä", "a\n"])
def test_a_name_that_would_lead_elsewhere_or_mean_something_else_is_refused(directory: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a cursor; take a letter"):
        Cursors(directory).set(name, Cursor(EPOCH, 1))
    assert not directory.exists()
    for call in (Cursors(directory).get, Cursors(directory).delete):
        with pytest.raises(UsageError, match=r"there is no cursor .*watchd cursor list"):
            call(name)


def test_files_that_watchd_did_not_make_are_neither_cursors_nor_an_error(directory: Path) -> None:
    directory.mkdir()
    (directory / "README").write_text("what this is")
    (directory / ".mirror.17.tmp").write_text(f"{EPOCH}:1\n")
    (directory / "empty").touch()
    (directory / "binary").write_bytes(b"\xff" * 200)
    (directory / "directory").mkdir()
    (directory / "elsewhere").symlink_to("good")
    os.mkfifo(directory / "fifo")
    (directory / "now").write_text(f"{EPOCH}:1\n")
    (directory / "good").write_text(f"{EPOCH}:1\n")
    cursors = Cursors(directory)
    assert cursors.all() == {"good": Cursor(EPOCH, 1)}
    for name in ("README", "directory", "elsewhere", "fifo", "now"):
        with pytest.raises(UsageError, match="there is no cursor"):
            cursors.get(name)
    cursors.set("elsewhere", Cursor(EPOCH, 2))
    assert cursors.get("good") == Cursor(EPOCH, 1), "written through a link"


def test_every_way_to_write_a_cursor_is_understood(directory: Path) -> None:
    cursors = Cursors(directory)
    cursors.set("mirror", Cursor(EPOCH, 9))
    for text, seq in ((f"{EPOCH}:17", 17), ("mirror", 9), ("now", 40), ("beginning", 0)):
        assert resolve(text, HERE, cursors) == seq


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yes terday", "'yes terday' is no cursor; give EPOCH:SEQ, a name, now or beginning"),
        ("yesterday", "there is no cursor 'yesterday'; see `watchd cursor list`"),
        (f"{'0' * 16}:3", f"cursor {'0' * 16}:3 belongs to another journal, this one is {EPOCH}; start over"),
        (f"{EPOCH}:41", f"cursor {EPOCH}:41 lies beyond the journal's end at 40; give now"),
        ("foreign", f"cursor foreign .{'0' * 16}:3. belongs to another journal"),
        ("future", f"cursor future .{EPOCH}:41. lies beyond the journal's end at 40"),
    ],
)
def test_a_cursor_that_means_nothing_here_is_one_clear_error(directory: Path, text: str, message: str) -> None:
    cursors = Cursors(directory)
    cursors.set("foreign", Cursor("0" * 16, 3))
    cursors.set("future", Cursor(EPOCH, 41))
    with pytest.raises(UsageError, match=message):
        resolve(text, HERE, cursors)
