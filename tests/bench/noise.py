"""`noise`: traffic on the filesystem of the lowers, outside of all of them; single changes of a lower are timed meanwhile."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from tests.bench.background import Background, Done, creations, database
from tests.bench.daemon import WatchdFanotify, WatchdUnmuted
from tests.bench.latency import BARE_LOOP
from tests.bench.loads import Healed, light_load
from tests.bench.measure import cpu_ns
from tests.bench.report import WATCHD, Row, Target
from tests.bench.session import Session
from tests.bench.storm import INTERVAL_S, PATIENCE_S, milliseconds, unhealed
from tests.bench.subjects import BareLoop, Subject

UNMUTED = "watchd, unmuted"
SUBJECTS: dict[str, type[Subject]] = {WATCHD: WatchdFanotify, UNMUTED: WatchdUnmuted, BARE_LOOP: BareLoop}
CPU_TARGET = Target(0.6, is_ratio=True)
"""The changes of the lower, at 20 a second, are in it on both sides."""
SILENCE = "silence"

Noise = Callable[[Path, int], Background]


class Observation(msgspec.Struct, frozen=True):
    """One subject beside one noise."""

    rounds: list[Healed]
    load: Done
    cpu_ns: int


def measure(session: Session) -> list[Row]:
    """A part of the table for each kind of noise."""
    scale = session.scale
    return [
        *_rows(session, SILENCE, lambda path, _: creations(path, 1), 1),
        *_rows(session, "database", lambda path, rate: database(path / "file", rate), scale.write_rate),
        *_rows(session, "creations", creations, scale.create_rate),
    ]


def _rows(session: Session, noise: str, start: Noise, rate: int) -> list[Row]:
    seen = {
        name: session.attempt(f"{noise} with {name}", functools.partial(_observe, session, kind, start, rate))
        for name, kind in session.selected(SUBJECTS).items()
    }

    def row(name: str, unit: str, value: Callable[[Observation], float], target: Target | None = None) -> Row:
        values = {subject: value(one) if one else None for subject, one in seen.items()}
        return Row("noise", f"{noise}, {name}", unit, values, UNMUTED, target)

    return [
        row("made", "/s", lambda one: one.load.per_second),
        row("CPU", "%", lambda one: one.cpu_ns / 1e7 / one.load.seconds, None if noise == SILENCE else CPU_TARGET),
        row("p50 of a change", "ms", lambda one: milliseconds(one.rounds, 50)),
        row("p99 of a change", "ms", lambda one: milliseconds(one.rounds, 99)),
        row(f"not healed in {PATIENCE_S:g} s", "", lambda one: unhealed(one.rounds), Target(0)),
    ]


def _observe(session: Session, kind: type[Subject], start: Noise, rate: int) -> Observation:
    arena, scale = session.small_arena, session.scale
    place = arena.outside / "noise"
    place.mkdir()
    rounds = max(3, int(scale.noise_s / INTERVAL_S))
    probe = light_load(arena, rounds=rounds, interval_s=INTERVAL_S, patience_s=PATIENCE_S)
    try:
        with probe as prepared, kind(session.workspace, arena) as subject, start(place, rate) as load:
            before = cpu_ns(subject.process.pid)
            healed = prepared.run()
            used = cpu_ns(subject.process.pid) - before
        return Observation(healed, load.done, used)
    finally:
        shutil.rmtree(place)
