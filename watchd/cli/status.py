"""`watchd status`: how things are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from watchd.cli.options import ask_daemon, config_option, json_option
from watchd.cli.render import echo_json, echo_table, path_of, printable, stale_lines


@click.command("status")
@json_option
@config_option
def status(as_json: bool, config_file: Path | None) -> None:
    """Mounts, layers, journal, and what is pinned by whom."""
    result = ask_daemon(config_file, "status")
    if as_json:
        echo_json(result)
    else:
        _echo_status(result)


def _echo_status(result: Mapping[str, Any]) -> None:
    journal = result["journal"]
    click.echo(f"watchd {result['version']}, pid {result['pid']}")
    _echo_section("Mounts", ["DEVICE", "STATE", "STALE", "MOUNT POINT", "SEEN BY"], _mount_rows(result["mounts"]))
    stale = list(stale_lines(result["mounts"]))
    if stale:
        click.echo("\nStale")
        for line in stale:
            click.echo(f"  {line}")
    _echo_section("Layers", ["NAME", "STATE", "BACKEND", "FSTYPE", "PATH", "REASON"], _layer_rows(result["layers"]))
    _echo_section(
        "Journal",
        ["EPOCH", "FIRST", "LAST", "BYTES", "PATH"],
        [[journal["epoch"], journal["first_seq"], journal["last_seq"], journal["bytes"], path_of(journal)]],
    )
    if journal.get("state") == "failed":
        click.echo(f"  failed: {printable(journal['reason'])}")
    if result["cursors"]:
        rows = [[cursor["name"], cursor["cursor"], cursor["lag"]] for cursor in result["cursors"]]
        _echo_section("Cursors", ["NAME", "CURSOR", "LAG"], rows)


def _echo_section(title: str, header: Sequence[str], rows: Sequence[Sequence[object]] | Iterator[list[object]]) -> None:
    click.echo()
    echo_table(title, header, rows)


def _mount_rows(mounts: Sequence[Mapping[str, Any]]) -> Iterator[list[object]]:
    """One row for each mount point; what belongs to the mount stands in its first row."""
    for mount in mounts:
        facts = [mount["device"], mount["state"], len(mount["stale"])]
        for point in mount["mount_points"] or [{"path": "-"}]:
            seen_by = f"pid {point['pid']}" if point.get("pid") else ""
            yield [*facts, path_of(point), seen_by]
            facts = ["", "", ""]


def _layer_rows(layers: Sequence[Mapping[str, Any]]) -> Iterator[list[object]]:
    for layer in layers:
        yield [
            layer["name"],
            layer["state"],
            layer["backend"] or "-",
            layer["fstype"] or "-",
            path_of(layer),
            layer["reason"] or "",
        ]
