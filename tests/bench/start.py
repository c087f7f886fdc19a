"""`start`: from exec until ready, by the number of directories in the lower."""

from __future__ import annotations

import functools
import statistics

from tests.bench.arena import Arena
from tests.bench.report import Row, Target
from tests.bench.session import BARE_READER, INOTIFYWAIT, SUBJECTS, Session
from tests.bench.subjects import Subject

REFERENCES = {"fanotify": BARE_READER, "inotify": INOTIFYWAIT}
TARGETS = {"fanotify": Target(0.5), "inotify": Target(2.0)}
"""In seconds, for the full tree."""


def measure(session: Session) -> list[Row]:
    """One row for each tree and backend, the median of a few starts."""
    return [_row(session, arena, backend) for arena in (session.small_arena, session.arena) for backend in SUBJECTS]


def _row(session: Session, arena: Arena, backend: str) -> Row:
    name = f"{backend}, {arena.directories:,} directories"

    def ready_s(kind: type[Subject]) -> float:
        return statistics.median(_start(session, arena, kind) for _ in range(session.scale.starts))

    return Row(
        benchmark="start",
        name=name,
        unit="s",
        values={
            subject: session.attempt(f"start of {subject} with {name}", functools.partial(ready_s, kind))
            for subject, kind in session.selected(SUBJECTS[backend]).items()
        },
        reference=REFERENCES[backend],
        target=TARGETS[backend] if arena is session.arena else None,
    )


def _start(session: Session, arena: Arena, kind: type[Subject]) -> float:
    with kind(session.workspace, arena) as subject:
        return subject.ready_s
