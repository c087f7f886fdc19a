"""`memory`: the resident set with the full tree, when ready and after the load of `drain`."""

from __future__ import annotations

from collections.abc import Callable

from tests.bench.drain import REFERENCES, Observation, observe
from tests.bench.report import Row, Target
from tests.bench.session import SUBJECTS, Session

TARGET = Target(64.0)
MIB = 1 << 20


def measure(session: Session) -> list[Row]:
    """Three rows for each backend."""
    return [row for backend in SUBJECTS for row in _rows(session, backend)]


def _rows(session: Session, backend: str) -> list[Row]:
    seen = {subject: observe(session, backend, subject) for subject in session.selected(SUBJECTS[backend])}

    def row(name: str, size: Callable[[Observation], int], target: Target | None) -> Row:
        values = {subject: size(one) / MIB if one else None for subject, one in seen.items()}
        return Row("memory", f"{backend}, {name}", "MiB", values, REFERENCES[backend], target)

    return [
        row("RSS after start", lambda one: one.memory_before.rss_bytes, TARGET),
        row("RSS after drain", lambda one: one.memory_after.rss_bytes, TARGET),
        row("peak", lambda one: one.memory_after.peak_bytes, None),
    ]
