"""`watchd changes`: the set of what changed since a baseline. Reads the files; needs no daemon."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Final

import click
import msgspec

from watchd.cli.options import config_option, json_option, path_prefix
from watchd.config import load
from watchd.errors import UsageError
from watchd.journal.changes import Changes, Question, Stream, stream
from watchd.journal.render import changes_to_json, entry_to_json, entry_to_text

PIECE: Final = 1000
"""So many entries are written at once: an answer may have millions."""

FRESH: Final = "changes may be missing, before the first entry or between them: look at everything once"

_to_json = msgspec.json.Encoder().encode


@click.command("changes")
@click.option("--since", required=True, metavar="CURSOR", help="EPOCH:SEQ, a name, now or beginning.")
@click.option("--layer", "layers", multiple=True, metavar="NAME", help="Only this layer; may be repeated.")
@click.option("--paths/--dirs", "paths", default=True, help="The paths (default), or the directories that hold them.")
@click.option("--ancestors", is_flag=True, help="With --dirs: all directories above them too.")
@click.option("--path", metavar="PREFIX", help="Only this path of a layer and what is below it.")
@json_option
@config_option
def changes(
    *,
    since: str,
    layers: tuple[str, ...],
    paths: bool,
    ancestors: bool,
    path: str | None,
    as_json: bool,
    config_file: Path | None,
) -> None:
    """Print what changed since a baseline, each path once. The daemon is not needed."""
    if ancestors and paths:
        raise UsageError("--ancestors goes with --dirs only", remedy="add --dirs")
    prefix = None if path is None else path_prefix(path)
    question = Question(frozenset(layers), prefix, not paths, ancestors)
    answer = stream(load(config_file).config.state_directory, since, question)
    if as_json:
        write_json(answer, sys.stdout.buffer)
    else:
        write_text(answer, sys.stdout.buffer, encoding=sys.stdout.encoding)
        if answer.fresh:
            click.echo(f"watchd: {FRESH}", err=True)


def write_json(answer: Stream, out: BinaryIO) -> None:
    """The answer as one line, which is never in memory as a whole."""
    head = _to_json(changes_to_json(Changes(answer.cursor, answer.fresh, ())))
    assert head.endswith(b"]}")
    out.write(head[:-2])
    is_first = True
    for piece in _pieces(_to_json(entry_to_json(entry)) for entry in answer.entries):
        out.write((b"" if is_first else b",") + b",".join(piece))
        is_first = False
    out.write(b"]}\n")
    out.flush()


def write_text(answer: Stream, out: BinaryIO, *, encoding: str) -> None:
    """The answer for people, a line an entry, and the cursor to go on from."""
    for piece in _pieces(entry_to_text(entry).encode(encoding, "backslashreplace") for entry in answer.entries):
        out.write(b"\n".join(piece) + b"\n")
    out.write(f"cursor {answer.cursor}\n".encode())
    out.flush()


def _pieces(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    while piece := list(islice(lines, PIECE)):
        yield piece
