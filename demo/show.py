"""The whole demo: plays every case without and with watchd, and tells what the merged view said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from demo.cases import CASES
from demo.daemon import LADDER, Daemon
from demo.play import Outcome, climb, play
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
CLIMBED_TITLE = f"What somebody holds on to, with `actions: [{', '.join(LADDER)}]`"
CLIMBED_HEADER = ("WHAT HAPPENS IN THE LOWER LAYER", "INVALIDATE ALONE", "ALL ACTIONS", "HEALED BY", "MS")
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
        bare, kept, ladders = (_stages(directory / name) for name in ("without", "with", "ladder"))
        with Daemon(directory / "watchd", mounts=directory / "with", ladders=directory / "ladder") as daemon:
            for case, without, with_watchd, ladder in zip(CASES, bare, kept, ladders, strict=True):
                outcome = play(case, without, with_watchd, daemon)
                yield climb(outcome, ladder, daemon) if case.pin else outcome


def _stages(directory: Path) -> list[Stage]:
    stages = []
    for number, case in enumerate(CASES, 1):
        stage = Stage(directory / str(number))
        stage.make_directories()
        case.arrange(stage)
        stage.mount()
        stages.append(stage)
    return stages


def _tell(outcomes: list[Outcome]) -> int:
    echo_table("What the merged view of an overlay says then", HEADER, map(_row, outcomes))
    click.echo(NOTES.rstrip())
    reports = [outcome.report for outcome in outcomes if outcome.report]
    if reports:
        click.echo(PINNED)
    for report in reports:
        click.echo(f"  {printable(report)}")
    climbed = [outcome for outcome in outcomes if outcome.climbed]
    if climbed:
        click.echo()
        echo_table(CLIMBED_TITLE, CLIMBED_HEADER, map(_climbed_row, climbed))
    for outcome in climbed:
        if outcome.climb_report:
            click.echo(f"  {printable(outcome.climb_report)}")
    broken = sum(not outcome.is_good for outcome in outcomes)
    if broken:
        click.echo(f"\n{broken} of {len(outcomes)} cases did not go as promised.")
        return FAILED
    click.echo(NEXT.rstrip())
    return 0


def _row(outcome: Outcome) -> tuple[str, str, str, str]:
    without = f"{outcome.without} (stale)" if outcome.was_stale else outcome.without
    return outcome.case.name, without, *_healing(outcome)


def _climbed_row(outcome: Outcome) -> tuple[str, str, str, str, str]:
    is_true = outcome.climbed == outcome.case.after
    said = outcome.climbed if is_true else f"{outcome.climbed} (STILL STALE)"
    took = f"{outcome.took_ms:.1f}" if is_true else "-"
    return outcome.case.name, outcome.healed, said, outcome.healed_by or "nothing", took


def _healing(outcome: Outcome) -> tuple[str, str]:
    """What watchd made of it, and after how many milliseconds."""
    if outcome.is_true and not outcome.case.pin:
        return outcome.healed, f"{outcome.took_ms:.1f}" if outcome.was_stale else "-"
    if outcome.report:
        return "pinned: reported by `watchd sync`", "-"
    return (
        f"{outcome.healed} (STILL STALE, not reported)" if outcome.case.pin else f"{outcome.healed} (STILL STALE)",
        "-",
    )
