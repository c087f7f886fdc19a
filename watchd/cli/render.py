"""Values for people: names made harmless, tables, stale entries. And JSON for scripts."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import click

INCOHERENT_STATES = frozenset({"stale", "pinned", "failed"})

DAMAGE_REMEDY = (
    "nothing repairs this by itself: save what is worth keeping, remove the entry from the upper directory, then run "
    "`watchd invalidate`"
)


def echo_json(value: Any) -> None:
    """Prints one value as one line of JSON."""
    click.echo(json.dumps(value))


def printable(text: str) -> str:
    """The text with everything escaped that could move the cursor, break the line or hide: `\\n`, `\\x1b`, `\\u202e`.

    A byte that was not UTF-8 (a surrogate, as os.fsdecode leaves it) is shown as that byte: `\\xff`.
    """
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ascii(character)[1:-1]


def path_of(entry: Mapping[str, Any]) -> str:
    """The printable path of a JSON object, exact where `path_b64` stands beside a lossy `path`."""
    if "path_b64" in entry:
        return printable(base64.b64decode(entry["path_b64"]).decode("utf-8", "surrogateescape"))
    return printable(entry["path"])


def echo_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table under a heading: fitted to a terminal, or in plain aligned columns that no terminal's width changes."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    if sys.stdout is not None and sys.stdout.isatty():
        _echo_rich_table(title, header, cells)
        return
    click.echo(title)
    widths = [max(len(row[column]) for row in [header, *cells]) for column in range(len(header))]
    for row in [header, *cells]:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(f"  {line.rstrip()}")


def _echo_rich_table(title: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    # Imported here because it takes longer than all the rest, and only terminals need it.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for row in cells:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))  # Text: names hold no markup
    Console().print(table)


def is_coherent(mounts: Iterable[Mapping[str, Any]]) -> bool:
    """Whether no mount of a `mounts` list has anything stale. Damage is not: a freshly made mount would show it too."""
    return not any(
        mount["state"] in INCOHERENT_STATES or any(entry["kind"] != "damage" for entry in mount["stale"])
        for mount in mounts
    )


def is_sound(mounts: Iterable[Mapping[str, Any]]) -> bool:
    """Whether no mount of a `mounts` list has anything stale or damaged."""
    return not any(mount["state"] in INCOHERENT_STATES or mount["stale"] for mount in mounts)


def stale_lines(mounts: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """One line for each stale entry of a `mounts` list, or for the mount where no entry is known."""
    for mount in mounts:
        point = mount_point_of(mount)
        for entry in mount["stale"]:
            yield stale_line(f"{point.rstrip('/')}/", entry)
        if not mount["stale"] and mount["state"] in INCOHERENT_STATES:
            reason = f": {printable(mount['reason'])}" if mount.get("reason") else ""
            yield f"{point}: {mount['state']}{reason}"


def stale_line(prefix: str, entry: Mapping[str, Any]) -> str:
    """One entry of a `stale` list: its path below the prefix, what is wrong, who holds it and why it stays."""
    path = f"{prefix}{path_of(entry).lstrip('/')}".rstrip("/") or "/"
    return f"{path}: {entry['kind']}{_held_by(entry)}{_why(entry)}"


def mount_point_of(mount: Mapping[str, Any]) -> str:
    """The printable mount point to name a mount by, or its device when it is mounted nowhere any more."""
    return path_of(mount["mount_points"][0]) if mount["mount_points"] else str(mount["device"])


def _held_by(entry: Mapping[str, Any]) -> str:
    holders = [f"{one['pid']} ({printable(one['command'])}, {one['how']})" for one in entry.get("pinned_by") or ()]
    return f", held by {', '.join(holders)}" if holders else ""


def _why(entry: Mapping[str, Any]) -> str:
    if entry["kind"] == "damage":
        return f": {printable(entry['reason'])}; {DAMAGE_REMEDY}"
    return f" ({printable(entry['reason'])})" if entry.get("reason") else ""
