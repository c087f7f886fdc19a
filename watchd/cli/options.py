"""What several verbs share: options, arguments, and asking the daemon."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from watchd import client
from watchd.config import load
from watchd.errors import NotPermittedError

ANSWER_TIMEOUT_SECONDS = 30.0
"""How long the daemon may take to answer something that needs no waiting."""

config_option = click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(path_type=Path, readable=False),
    envvar="WATCHD_CONFIG",
    help="Configuration to use instead of /etc/watchd/watchd.yaml.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")

config_argument = click.argument(
    "file", metavar="[FILE]", required=False, type=click.Path(path_type=Path, readable=False)
)


def ask_daemon(
    config_file: Path | None,
    verb: str,
    *,
    timeout: float = ANSWER_TIMEOUT_SECONDS,
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The answer of the daemon that the configuration leads to. Raises what `load` and `client.request` raise."""
    directory = load(config_file).config.runtime_directory
    return client.request(directory, verb, timeout=timeout, arguments=arguments)


def require_root(why: str) -> None:
    """Raises NotPermittedError, with a sentence on what root is needed for, for whoever is not root."""
    if os.geteuid() != 0:
        raise NotPermittedError(why, remedy="run it as root")


def mount_patterns(arguments: Iterable[str]) -> list[str]:
    """MOUNT arguments as the daemon, which has another working directory, understands them.

    A path is made absolute and its links are followed, since mount points are known by their real paths. A `major:minor`
    and a glob stay as they are.
    """
    return [one if _is_pattern(one) else os.path.realpath(one) for one in arguments]


def _is_pattern(argument: str) -> bool:
    is_glob = any(character in argument for character in "*?[") and not os.path.lexists(argument)
    return is_glob or re.fullmatch(r"[0-9]+:[0-9]+", argument) is not None


def path_prefix(text: str) -> bytes:
    """A path from the command line as records hold it: bytes, relative, without a trailing slash."""
    normal = os.path.normpath(os.fsencode(text).strip(b"/") or b".")
    return b"" if normal == b"." else normal
