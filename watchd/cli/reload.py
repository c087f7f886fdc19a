"""`watchd reload`: the configuration anew."""

from __future__ import annotations

from pathlib import Path

import click

from watchd.cli.options import ask_daemon, config_option


@click.command("reload")
@config_option
def reload(config_file: Path | None) -> None:
    """Make the daemon read its configuration again, like SIGHUP.

    A configuration that is bad is reported and the old one kept.
    """
    ask_daemon(config_file, "reload")
