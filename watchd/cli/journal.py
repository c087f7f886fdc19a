"""`watchd journal`: is every record readable, and what to do if not. Needs no daemon."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from watchd.cli.options import config_option, json_option
from watchd.cli.progress import byte_bar
from watchd.cli.render import echo_json, printable
from watchd.config import load

if TYPE_CHECKING:
    from watchd.journal.repair import Repaired
    from watchd.journal.verify import Fault, Report, SegmentReport


@click.group("journal")
def journal() -> None:
    """Check the journal, and repair it."""


@journal.command("verify")
@json_option
@config_option
def verify(as_json: bool, config_file: Path | None) -> int:
    """Read every record and say what is damaged.

    Changes nothing; the daemon may run meanwhile. Exit status 1 if anything is damaged. What a crash left at the very end is
    no damage: the next start of the daemon cuts it off.
    """
    from watchd.journal.verify import size_of
    from watchd.journal.verify import verify as verify_journal

    directory = _directory(config_file)
    with byte_bar("verify", size_of(directory)) as progress:
        report = verify_journal(directory, progress=progress)
    if as_json:
        echo_json(_report_to_json(report))
    else:
        _echo(_report_lines(report))
    return 0 if report.is_sound else 1


@journal.command("repair")
@json_option
@config_option
def repair(as_json: bool, config_file: Path | None) -> None:
    """Make a damaged journal whole again; the daemon must not run.

    No good record is dropped and none gets another number. What is broken is kept in .damaged files beside the journal, and
    desync records stand for what was lost, so that the next start looks at every layer and readers know.
    """
    from watchd.journal.repair import repair as repair_journal
    from watchd.journal.verify import size_of

    directory = _directory(config_file)
    with byte_bar("verify", size_of(directory)) as progress:
        done = repair_journal(directory, progress=progress)
    if as_json:
        echo_json({"segments": [_repaired_to_json(one) for one in done]})
    else:
        _echo(_repaired_lines(done))


def _directory(config_file: Path | None) -> Path:
    return load(config_file).config.state_directory / "journal"


def _echo(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(printable(line))


def _report_to_json(report: Report) -> dict[str, Any]:
    return {
        "path": str(report.directory),
        "sound": report.is_sound,
        "records": sum(one.records for one in report.segments),
        "bytes": sum(one.bytes for one in report.segments),
        "segments": [_segment_to_json(one) for one in report.segments],
    }


def _segment_to_json(segment: SegmentReport) -> dict[str, Any]:
    return {
        "path": str(segment.path),
        "first_seq": segment.first_seq,
        "last_seq": segment.last_seq,
        "records": segment.records,
        "bytes": segment.bytes,
        "faults": [_fault_to_json(fault) for fault in segment.faults],
    }


def _fault_to_json(fault: Fault) -> dict[str, Any]:
    return {"offset": fault.offset, "behind_seq": fault.record, "reason": fault.reason, "torn": fault.torn}


def _report_lines(report: Report) -> Iterator[str]:
    for segment in report.segments:
        numbers = f"records {segment.first_seq} to {segment.last_seq}" if segment.records else "no record"
        state = "good" if segment.is_sound else "DAMAGED"
        yield f"{segment.path}: {state}, {numbers}, {segment.records} of them, {segment.bytes} bytes"
        for fault in segment.faults:
            what = "unfinished" if fault.torn else "damaged"
            yield f"{fault.path}: {what} at byte {fault.offset}, behind record {fault.record}: {fault.reason}"
    if not report.is_sound:
        yield "stop the daemon and run `watchd journal repair`: it keeps every good record"
    elif report.faults:
        yield "nothing is damaged: what is unfinished was promised to nobody, the next start of the daemon cuts it off"


def _repaired_to_json(one: Repaired) -> dict[str, Any]:
    return {
        "path": str(one.path),
        "records": one.records,
        "lost": [list(numbers) for numbers in one.lost],
        "aside": [str(path) for path in one.aside],
    }


def _repaired_lines(done: list[Repaired]) -> Iterator[str]:
    if not done:
        yield "nothing is damaged, nothing was changed"
    for one in done:
        lost = ", ".join(f"{first} to {last}" if last > first else str(first) for first, last in one.lost)
        yield f"{one.path}: {one.records} good records kept, " + (f"lost: {lost}" if lost else "none lost")
        for path in one.aside:
            yield f"{path}: what was broken"
    if any(one.lost for one in done):
        yield "the next start of the daemon looks at every layer for what was lost"
