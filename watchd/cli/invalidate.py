"""`watchd invalidate`: act now, without the daemon."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from watchd.cli.options import config_option, json_option, mount_patterns, require_root
from watchd.cli.render import echo_json, printable, stale_line
from watchd.config.schema import LADDER


@click.command("invalidate")
@click.argument("mounts", metavar="MOUNT...", nargs=-1, required=True)
@click.option("--method", type=click.Choice(LADDER), default=LADDER[0], show_default=True, help="What to do.")
@json_option
@config_option
def invalidate(mounts: tuple[str, ...], method: str, as_json: bool, config_file: Path | None) -> int:
    """Make mounts look at their layers again, now.

    Prints for each mount what was done and whether it helped; exit status 1 if any is still stale. MOUNT is a mount point, a
    major:minor or a glob. The daemon is not needed.
    """
    require_root("acting on a mount needs to get hold of it and of its layers")
    # Imported here because the other verbs need nothing of it.
    from watchd.coherence.manual import invalidate as act

    outcomes = act(mount_patterns(mounts), method)
    if as_json:
        echo_json({"actions": outcomes})
    else:
        for outcome in outcomes:
            click.echo(_line(outcome))
            for entry in outcome.get("stale", ()):
                click.echo(f"  {stale_line('', entry)}")
    return 0 if all(outcome["result"] == "coherent" for outcome in outcomes) else 1


def _line(outcome: Mapping[str, Any]) -> str:
    milliseconds = outcome["duration_ns"] / 1e6
    return (
        f"{printable(outcome['mount_point'])} ({outcome['device']}): {outcome['method']}: {outcome['result']}"
        f" ({outcome['stale_before']} stale before, {outcome['stale_after']} after, {milliseconds:.2f} ms)"
        f"{': ' + printable(outcome['error']) if outcome.get('error') else ''}"
    )
