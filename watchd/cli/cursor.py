"""`watchd cursor`: named positions in the journal. Needs no daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from watchd.cli.options import config_option, json_option
from watchd.cli.render import echo_json, echo_table
from watchd.config import load
from watchd.errors import JournalError
from watchd.journal.changes import JOURNAL
from watchd.journal.cursors import DIRECTORY, NOW, Cursor, Cursors, lag, resolve
from watchd.journal.reader import Extent, extent


class _ListByDefault(click.Group):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_bare = not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names)
        return super().parse_args(ctx, ["list", *args] if is_bare else args)


@click.group("cursor", cls=_ListByDefault, no_args_is_help=False)
def cursor() -> None:
    """Named positions in the journal, accepted wherever CURSOR is. Without a command it lists them."""


@cursor.command("list")
@json_option
@config_option
def list_(as_json: bool, config_file: Path | None) -> None:
    """Print every cursor, and how many records lie behind it."""
    state_directory = load(config_file).config.state_directory
    there = _extent(state_directory / JOURNAL)
    found = [
        {"name": name, "cursor": str(one), "lag": there and lag(one, there.epoch, there.last_seq)}
        for name, one in Cursors(state_directory / DIRECTORY).all().items()
    ]
    if as_json:
        echo_json({"cursors": found})
    elif found:
        rows = [[one["name"], one["cursor"], "-" if one["lag"] is None else one["lag"]] for one in found]
        echo_table("Cursors", ["NAME", "CURSOR", "LAG"], rows)


@cursor.command("set")
@click.argument("name")
@click.argument("position", metavar="[CURSOR]", default=NOW)
@json_option
@config_option
def set_(name: str, position: str, as_json: bool, config_file: Path | None) -> None:
    """Put NAME where CURSOR stands, which is now if it is not given."""
    state_directory = load(config_file).config.state_directory
    cursors, there = Cursors(state_directory / DIRECTORY), extent(state_directory / JOURNAL)
    target = Cursor(there.epoch, resolve(position, there, cursors))
    cursors.set(name, target)
    _tell({"name": name, "cursor": str(target)}, as_json=as_json)


@cursor.command("delete")
@click.argument("name")
@json_option
@config_option
def delete(name: str, as_json: bool, config_file: Path | None) -> None:
    """Forget NAME."""
    Cursors(load(config_file).config.state_directory / DIRECTORY).delete(name)
    if as_json:
        echo_json({"name": name})


def _extent(journal: Path) -> Extent | None:
    """None where there is no good journal: the cursors are there all the same."""
    try:
        return extent(journal)
    except JournalError:
        return None


def _tell(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        echo_json(result)
    else:
        click.echo(f"{result['name']} {result['cursor']}")
