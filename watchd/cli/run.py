"""`watchd run`: the daemon."""

from __future__ import annotations

from pathlib import Path

import click

from watchd.cli.options import config_option


@click.command("run")
@config_option
def run(config_file: Path | None) -> None:
    """The daemon, in the foreground.

    It needs no configuration: it finds every overlay mount of the host and of its containers, watches their lower layers,
    journals what changes and repairs what went stale.
    """
    # Imported here because the other verbs need nothing of the daemon.
    from watchd.service import run as serve

    serve(config_file)
