"""The command line: `watchd VERB ...`, one module a verb.

Verbs are imported when they are used, so that none pays for the others. A verb is a click command that returns its exit
status (None is 0) and raises WatchdError for what went wrong. What becomes of errors is decided here and nowhere else: one
line on stderr and one of these exit statuses.

    0 yes, done    1 no, stale, problems found    2 wrong usage    3 timed out
    69 daemon not reachable    77 not permitted    78 bad configuration    130 interrupted
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
from typing import Any, NoReturn

import click

from watchd import __version__
from watchd.cli.render import printable
from watchd.errors import (
    ConfigError,
    DaemonUnreachableError,
    DeadlineError,
    NotPermittedError,
    UsageError,
    WatchdError,
)

VERBS = {
    "run": "The daemon, in the foreground.",
    "status": "Mounts, layers, journal, and what is pinned by whom.",
    "sync": "Wait until every change made so far is journalled and visible.",
    "check": "Audit whole mounts against their layers.",
    "invalidate": "Make mounts look at their layers again, now.",
    "log": "Journal records in order.",
    "changes": "What changed since a baseline.",
    "cursor": "Named positions in the journal.",
    "journal": "Check every record of the journal, or repair it.",
    "config": "Check the configuration, or show it with its origins.",
    "reload": "Make the daemon read its configuration again.",
}
"""Each is a command of that name in the module of that name. The help is here so that listing it imports nothing."""

FAILED, INTERRUPTED = 1, 130

EXIT_STATUSES: dict[type[BaseException], int] = {
    UsageError: 2,
    click.UsageError: 2,
    DeadlineError: 3,
    DaemonUnreachableError: 69,
    NotPermittedError: 77,
    PermissionError: 77,
    ConfigError: 78,
    click.Abort: INTERRUPTED,
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"watchd.cli.{cmd_name}")
        return next(one for one in vars(module).values() if isinstance(one, click.Command) and one.name == cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        status = super().invoke(ctx)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk or a closed pipe is noticed here, not by the interpreter on its way out
        return status

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """The entry point: runs a verb and exits with its status."""
        _accept_any_character()
        try:
            status = super().main(*args, **extra | {"standalone_mode": False, "prog_name": "watchd"})
        except Exception as error:
            status = _fail(error)
            _drop_unwritten()
        sys.exit(status if isinstance(status, int) else 0)


@click.group(cls=_Verbs, no_args_is_help=False)
@click.version_option(__version__, prog_name="watchd", message="%(prog)s %(version)s")
def main() -> None:
    """Keeps overlayfs mounts true while their lower layers change."""


def _fail(error: Exception) -> int:
    """Tells what went wrong in one line; gives the exit status."""
    if not isinstance(error, click.Abort):
        click.echo(f"watchd: {printable(_line(error))}", err=True)
    return next((status for kind, status in EXIT_STATUSES.items() if isinstance(error, kind)), FAILED)


def _drop_unwritten() -> None:
    """What cannot be written was told; the interpreter would try once more on its way out, and tell it in its own way."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _line(error: Exception) -> str:
    if isinstance(error, click.ClickException):
        message = " ".join(error.format_message().split()).rstrip(".")
        context = getattr(error, "ctx", None)
        return f"{message}; see `{context.command_path if context else 'watchd'} --help`"
    if isinstance(error, WatchdError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"internal error, please report it: {type(error).__name__}: {error}{where}"


def _accept_any_character() -> None:
    """A name that the terminal's character set lacks is shown with escapes; it is no error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
