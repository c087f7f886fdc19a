"""`watchd reload`: the configuration anew."""

from __future__ import annotations

from pathlib import Path

import click

from watchd.cli.options import ask_daemon, config_option


@click.command("reload")
@config_option
def reload(config_file: Path | None) -> None:
    """Make the daemon read its configuration again, like SIGHUP.

    A configuration that is bad is reported and the old one kept. What takes effect only when the daemon starts again is named.
    """
    for key in ask_daemon(config_file, "reload")["after_restart"]:
        click.echo(f"watchd: {key} takes effect at the next start of the daemon", err=True)
