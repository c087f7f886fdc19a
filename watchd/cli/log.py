"""`watchd log`: journal records in order. Reads the files; needs no daemon."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import click
import msgspec

from watchd.cli.options import config_option, json_option, path_prefix
from watchd.config import load
from watchd.journal.cursors import DIRECTORY, Cursors, resolve_kept
from watchd.journal.format import RECORD_TYPES
from watchd.journal.reader import Follower, NumberedRecord, extent
from watchd.journal.render import to_json, to_text
from watchd.records import Change, Record

POLL_SECONDS = 0.05

_to_line = msgspec.json.Encoder().encode


class Filters(msgspec.Struct, frozen=True):
    """Which records to show; an empty set or name lets everything pass."""

    layers: frozenset[str] = frozenset()
    path: bytes | None = None
    """Changes of this path, relative to its layer, and of everything below it."""
    types: frozenset[str] = frozenset()

    def match(self, record: Record) -> bool:
        """Whether `record` is to be shown."""
        if self.layers and record.layer not in self.layers:
            return False
        if self.types and type(record).__name__.lower() not in self.types:
            return False
        if self.path is None:
            return True
        return isinstance(record, Change) and (self._below(record.path) or self._below(record.from_path))

    def _below(self, path: bytes | None) -> bool:
        return path is not None and (not self.path or path == self.path or path.startswith(self.path + b"/"))


def run_log(
    directory: Path,
    out: BinaryIO,
    *,
    since: str = "beginning",
    filters: Filters | None = None,
    follow: bool = False,
    as_json: bool = False,
    encoding: str = "utf-8",
    wait: Callable[[], object] = lambda: time.sleep(POLL_SECONDS),
) -> None:
    """Writes the records behind the cursor `since` to `out`, a line each; text in `encoding`, JSON always in UTF-8.

    With `follow` it goes on for ever and calls `wait` whenever there is nothing new; an exception of `wait` ends it.
    Raises JournalError, RecordsGoneError in place of passing over records that were removed, and UsageError.
    """
    filters = filters or Filters()
    cursors = Cursors(directory.parent / DIRECTORY)
    with Follower(directory, resolve_kept(since, extent(directory), cursors)) as follower:
        while True:
            if records := follower.poll():
                _print(records, out, filters=filters, encoding=None if as_json else encoding)
            elif follow:
                wait()
            else:
                return


def _print(records: Iterable[NumberedRecord], out: BinaryIO, *, filters: Filters, encoding: str | None) -> None:
    for seq, record in records:
        if filters.match(record):
            text = to_text(seq, record).encode(encoding, "backslashreplace") if encoding else b""
            line = text or _to_line(to_json(seq, record))
            out.write(line + b"\n")
    out.flush()


@click.command("log")
@click.option("--since", default="beginning", metavar="CURSOR", help="EPOCH:SEQ, a name, now or beginning (default).")
@click.option("--layer", "layers", multiple=True, metavar="NAME", help="Only this layer; may be repeated.")
@click.option("--path", metavar="PREFIX", help="Only changes of this path of a layer and of what is below it.")
@click.option("--type", "types", multiple=True, type=click.Choice(list(RECORD_TYPES)), help="May be repeated.")
@click.option("--follow", is_flag=True, help="Go on as the journal grows.")
@json_option
@config_option
def log(
    *,
    since: str,
    layers: tuple[str, ...],
    path: str | None,
    types: tuple[str, ...],
    follow: bool,
    as_json: bool,
    config_file: Path | None,
) -> None:
    """Print journal records in order. The daemon is not needed."""
    prefix = None if path is None else path_prefix(path)
    run_log(
        load(config_file).config.state_directory / "journal",
        sys.stdout.buffer,
        since=since,
        filters=Filters(frozenset(layers), prefix, frozenset(types)),
        follow=follow,
        as_json=as_json,
        encoding=sys.stdout.encoding,
    )
