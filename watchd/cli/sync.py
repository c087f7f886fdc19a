"""`watchd sync`: the barrier."""

from __future__ import annotations

import math
from pathlib import Path

import click

from watchd.cli.options import ask_daemon, config_option, json_option, mount_patterns
from watchd.cli.render import echo_json, is_coherent, stale_lines
from watchd.errors import UsageError

ANSWER_MARGIN_SECONDS = 5.0
"""The daemon keeps the deadline; this much later it is the daemon that is late."""


@click.command("sync")
@click.argument("mounts", metavar="[MOUNT]...", nargs=-1)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0, max=86400),
    default=30.0,
    show_default=True,
    help="How long to wait.",
)
@json_option
@config_option
def sync(mounts: tuple[str, ...], timeout: float, as_json: bool, config_file: Path | None) -> int:
    """Wait until every change made so far is journalled and visible.

    Returns when every change made to the lower layers before the call is in the journal and the merged view of it was
    verified: with exit status 0 when it is coherent, 1 when something is still stale (it is printed with the processes that
    pin it), 3 when the time is over. MOUNT is a mount point, a major:minor or a glob; without any it is all of them.
    """
    if math.isnan(timeout):
        raise UsageError("--timeout is no number", remedy="give seconds, such as 30")
    result = ask_daemon(
        config_file,
        "sync",
        timeout=timeout + ANSWER_MARGIN_SECONDS,
        arguments={"mounts": mount_patterns(mounts), "timeout": timeout},
    )
    if as_json:
        echo_json(result)
    else:
        for line in stale_lines(result["mounts"]):
            click.echo(line)
    return 0 if is_coherent(result["mounts"]) else 1
