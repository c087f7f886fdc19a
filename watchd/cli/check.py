"""`watchd check`: audit whole mounts, without the daemon."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from watchd.cli.options import config_option, json_option, mount_patterns, require_root
from watchd.cli.render import echo_json, is_sound, mount_point_of, printable, stale_lines
from watchd.config import load

if TYPE_CHECKING:
    from watchd.coherence.audit import Progress
    from watchd.coherence.target import Target

LINES_MAX = 100
"""So many stale entries of a mount are printed for people; --json gives more."""

Bar = Callable[[str], "Progress"]
"""Begins the progress of one mount."""


@click.command("check")
@click.argument("mounts", metavar="[MOUNT]...", nargs=-1)
@json_option
@config_option
def check(mounts: tuple[str, ...], as_json: bool, config_file: Path | None) -> int:
    """Audit whole mounts against their layers.

    Lists what is stale or damaged, with the processes that hold it; exit status 1 if there is anything. Nothing is changed. A
    name that no layer has any more is found only if a process uses it. MOUNT is a mount point, a major:minor or a glob;
    without any it is all that the configuration selects. The daemon is not needed.
    """
    require_root("auditing a mount needs to look into all of its layers")
    with _progress(wanted=sys.stderr is not None and sys.stderr.isatty()) as bar:
        reports = list(_reports(mount_patterns(mounts), config_file, bar))
    if as_json:
        echo_json({"mounts": reports})
    else:
        for line in (line for report in reports for line in report_lines(report)):
            click.echo(line)
    return 0 if is_sound(reports) else 1


def _reports(patterns: list[str], config_file: Path | None, bar: Bar) -> Iterator[dict[str, Any]]:
    # Imported here because the other verbs need nothing of it.
    from watchd.coherence.audit import audit
    from watchd.coherence.handles import Handles
    from watchd.coherence.report import mount_report
    from watchd.coherence.selection import targets
    from watchd.kernel.namespaces import Courier

    discovery = load(config_file).config.discovery
    courier, handles = Courier(), Handles()
    try:
        for target in targets(patterns, courier, discovery=discovery):
            assert target.overlay is not None
            found = audit(target, handles, progress=bar(_shown(target)))
            handles.expire()
            report = mount_report(target.overlay, state=found.state, reason=found.error, stale=found.stale)
            yield {**report, "stale_total": found.total, "names": found.names}
    finally:
        handles.expire()
        courier.close()


def _shown(target: Target) -> str:
    return printable(os.fsdecode(target.mount_point))


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    shown = {**report, "stale": report["stale"][:LINES_MAX]}
    if report["state"] == "failed" and report["stale"]:
        yield f"{mount_point_of(report)}: failed: {printable(report['reason'])}"
    yield from stale_lines([shown])
    if (more := report["stale_total"] - len(shown["stale"])) > 0:
        yield f"{mount_point_of(report)}: {more} more stale entries"
    if is_sound([report]):
        yield f"{mount_point_of(report)}: coherent, {report['names']} names looked at"


@contextlib.contextmanager
def _progress(*, wanted: bool) -> Iterator[Bar]:
    """A bar for each mount. How many names there will be is not known, so it counts."""
    if not wanted:
        yield lambda _: lambda _: None
        return
    # Imported here because it takes longer than all the rest, and only terminals need it.
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Display

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,.0f} names"),
        TimeElapsedColumn(),
    )
    with Display(*columns, console=Console(stderr=True), transient=True) as display:

        def begin(description: str) -> Progress:
            task = display.add_task(description, total=None)
            return lambda names: display.advance(task, names)

        yield begin
