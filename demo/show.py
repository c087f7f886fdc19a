"""The whole demo: plays every case without and with watchd, and tells what the merged view said."""

from __future__ import annotations

from collections.abc import Iterator

import click

from demo.cases import CASES
from demo.daemon import Daemon
from demo.play import Outcome, play
from demo.stage import Stage, theatre
from watchd.cli.render import echo_table, printable
from watchd.errors import WatchdError

HEADER = ("WHAT HAPPENS IN THE LOWER LAYER", "WITHOUT WATCHD", "WITH WATCHD", "MS")
FAILED, INTERRUPTED = 1, 130

NOTES = """
MS: from the change to the first look that showed the truth; a look every 0.5 ms, at the program every 50 ms.
"""
PINNED = """
Pinned: what a process holds on to cannot be dropped from the cache. `watchd sync` says so, with exit status 1:"""
NEXT = """
Next: `make run` keeps the overlays of this host true, `.venv/bin/watchd status` in another terminal shows them;
      `make install` makes watchd a service, `make test` runs the tests.
"""


def main() -> int:
    """Exit status 0 if every case went as promised, pinned ones being promised a report."""
    try:
        return _tell(list(_play_all()))
    except (WatchdError, OSError) as error:
        click.echo(f"demo: {printable(str(error))}", err=True)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _play_all() -> Iterator[Outcome]:
    with theatre() as directory:
        bare = [Stage(directory / "without" / str(number)) for number, _ in enumerate(CASES, 1)]
        kept = [Stage(directory / "with" / str(number)) for number, _ in enumerate(CASES, 1)]
        for case, stage in zip(CASES * 2, bare + kept, strict=True):
            stage.make_directories()
            case.arrange(stage)
            stage.mount()
        with Daemon(directory / "watchd", mounts=directory / "with") as daemon:
            for case, without, with_watchd in zip(CASES, bare, kept, strict=True):
                yield play(case, without, with_watchd, daemon)


def _tell(outcomes: list[Outcome]) -> int:
    echo_table("What the merged view of an overlay says then", HEADER, map(_row, outcomes))
    click.echo(NOTES.rstrip())
    reports = [outcome.report for outcome in outcomes if outcome.report]
    if reports:
        click.echo(PINNED)
    for report in reports:
        click.echo(f"  {printable(report)}")
    broken = sum(not outcome.is_good for outcome in outcomes)
    if broken:
        click.echo(f"\n{broken} of {len(outcomes)} cases did not go as promised.")
        return FAILED
    click.echo(NEXT.rstrip())
    return 0


def _row(outcome: Outcome) -> tuple[str, str, str, str]:
    without = f"{outcome.without} (stale)" if outcome.was_stale else outcome.without
    return outcome.case.name, without, *_healing(outcome)


def _healing(outcome: Outcome) -> tuple[str, str]:
    """What watchd made of it, and after how many milliseconds."""
    if outcome.is_true:
        return outcome.healed, f"{outcome.took_ms:.1f}" if outcome.was_stale else "-"
    if outcome.report:
        return "pinned: reported by `watchd sync`", "-"
    return (
        f"{outcome.healed} (STILL STALE, not reported)" if outcome.case.pin else f"{outcome.healed} (STILL STALE)",
        "-",
    )
