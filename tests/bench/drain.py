"""`drain`: many files created, written, renamed and deleted in a large tree while somebody reads along.

The kernel merges records differently for different readers, so watchd's rate and its CPU are counted in the
bare reader's records: the same work on both sides of the ratio. The clocks stop when everything was read (for
watchd: when `watchd sync` returns); what was lost is counted afterwards.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import msgspec

from tests.bench.loads import Churn
from tests.bench.measure import Memory, cpu_ns, memory
from tests.bench.report import WATCHD, Row, Target
from tests.bench.session import BARE_READER, PYINOTIFY, SUBJECTS, Session
from tests.bench.subjects import Tally

REFERENCES = {"fanotify": BARE_READER, "inotify": PYINOTIFY}
CPU_TARGET = Target(3.0, is_ratio=True)
LOST_TARGET = Target(0)
"""All three for fanotify only: inotify's queue is bounded by a sysctl."""


class Observation(msgspec.Struct, frozen=True):
    """One subject through one load."""

    load_s: float
    total_s: float
    """From the start of the load until everything was read."""
    cpu_ns: int
    tally: Tally
    memory_before: Memory
    memory_after: Memory


Value = Callable[[str, Observation], float | None]
"""One cell of the table: by subject and what was observed of it."""


@functools.cache
def observe(session: Session, backend: str, subject: str) -> Observation | None:
    """Lead one subject through the load; once a run, because `memory` looks at the same. None if it failed."""
    return session.attempt(f"drain by {subject} ({backend})", lambda: _observe(session, backend, subject))


def _observe(session: Session, backend: str, name: str) -> Observation:
    arena, files = session.arena, session.scale.files
    with SUBJECTS[backend][name](session.workspace, arena, files=files) as subject, Churn(arena, files) as load:
        pid = subject.process.pid
        memory_before, cpu_before, started = memory(pid), cpu_ns(pid), time.perf_counter()
        load_s = load.run()
        count = subject.drained()
        total_s, cpu, memory_after = time.perf_counter() - started, cpu_ns(pid) - cpu_before, memory(pid)
        return Observation(load_s, total_s, cpu, count(), memory_before, memory_after)


def measure(session: Session) -> list[Row]:
    """The rows of both backends."""
    with Churn(session.arena, session.scale.files) as load:
        session.notes.append(f"the load of drain takes {load.run():.2f} s while nobody reads")
    bare = observe(session, "fanotify", BARE_READER)
    work = bare.tally.records if bare else None
    return [row for backend in SUBJECTS for row in _rows(session, backend, work)]


def _rows(session: Session, backend: str, work: int | None) -> list[Row]:
    subjects = session.selected(SUBJECTS[backend])
    seen = {subject: observe(session, backend, subject) for subject in subjects}

    def records(subject: str, observation: Observation) -> int | None:
        return work if subject == WATCHD else observation.tally.records

    def per_second(subject: str, observation: Observation) -> float | None:
        count = records(subject, observation)
        return count / observation.total_s if count else None

    def cpu_us(subject: str, observation: Observation) -> float | None:
        count = records(subject, observation)
        return observation.cpu_ns / 1000 / count if count else None

    def row(name: str, unit: str, value: Value, target: Target | None = None) -> Row:
        values = {subject: value(subject, one) if one else None for subject, one in seen.items()}
        reference = REFERENCES[backend] if unit else None  # no ratio of mere counts
        return Row("drain", f"{backend}, {name}", unit, values, reference, target if backend == "fanotify" else None)

    return [
        row("load beside it", "s", lambda _, one: one.load_s),
        row("all read", "s", lambda _, one: one.total_s),
        row("events read", "", lambda _, one: one.tally.records),
        row("events per second", "/s", per_second),
        row("CPU per event", "us", cpu_us, CPU_TARGET),
        row("names lost", "", lambda _, one: one.tally.lost, LOST_TARGET),
        row("overflows", "", lambda _, one: one.tally.overflows, LOST_TARGET),
    ]
