"""`changes`: what changed since a baseline, asked of a long journal; beside it watchman's `since` over a tree in which as many
files changed.

A query is the function that the command calls, in a process that has asked before; the command is all of it, from exec to exit.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.arena import Arena
from tests.bench.loads import REPOSITORY
from tests.bench.measure import percentile
from tests.bench.report import WATCHD, Row, Target
from tests.bench.session import Session
from tests.bench.subjects import LOOK_AGAIN_S, Subject, SubjectError, require_inotify_watches, require_program
from watchd.journal.changes import JOURNAL, Question, stream
from watchd.journal.cursors import Cursor
from watchd.journal.format import Checkpoint, LayerMark, encode_frames, encode_header
from watchd.journal.indexer import Indexer
from watchd.journal.recovery import begin_segment
from watchd.journal.segments import segment_path
from watchd.records import Change, Kind, pack_status

WATCHMAN = "watchman"
QUERY_TARGET_MS = Target(50.0)
PEAK_TARGET_MIB = Target(4096.0)
QUERIES = 9
RECENT = 1000
"""The last record in so many is behind the recent baseline."""

SEGMENT_BYTES = 64 << 20
COMMIT_RECORDS = 1000
PACKAGES, DIRECTORIES, FILES = 200, 100, 50
"""The paths that change: so many directories in each package, so many files in each directory."""

PREFIX = b"usr/share/package-7"


def measure(session: Session) -> list[Row]:
    """All of it."""
    watchman = session.attempt("watchman's since", functools.partial(_watchman, session))
    ours: dict[str, float] = {}
    if session.with_watchd:
        with session.workspace.scratch() as state:
            ours = session.attempt("changes of a long journal", functools.partial(_watchd, session, state)) or {}
    name, recent = f"{session.scale.records:,} records", f"the last {session.scale.records // RECENT:,}"

    def row(what: str, unit: str, key: str, *, beside: bool = False, target: Target | None = None) -> Row:
        values = {WATCHD: ours.get(key)} if session.with_watchd else {}
        if beside:
            values[WATCHMAN] = watchman and watchman[key]
        return Row("changes", what, unit, values, WATCHMAN if beside else None, target)

    rows = [
        row(f"{name}, index made anew", "s", "index"),
        row(f"{name}, all paths, command", "s", "all"),
        row(f"{name}, all paths, peak RSS", "MiB", "peak", target=PEAK_TARGET_MIB),
        row("directories since the beginning, query", "ms", "all directories"),
        row(f"directories of {recent}, query", "ms", "directories", target=QUERY_TARGET_MS),
        row(f"directories of {recent}, command", "ms", "directories command"),
        row("directories of one prefix since the beginning, query", "ms", "prefix", target=QUERY_TARGET_MS),
        row("paths of an unchanged prefix, query", "ms", "unchanged", target=QUERY_TARGET_MS),
        row(f"paths of {recent}, query", "ms", "paths"),
        row(f"paths of {recent}, command", "ms", "paths command", beside=True),
        row(f"paths of {recent} below one prefix, command", "ms", "prefix command", beside=True),
    ]
    return [one for one in rows if one.values]


# ---- watchd ---------------------------------------------------------------------------------------------------------


def _watchd(session: Session, state: Path) -> dict[str, float]:
    epoch, last_seq = write_journal(state / JOURNAL, session.scale.records)
    config = state / "watchd.yaml"
    config.write_text(f"state_directory: {state}\n")
    recent = str(Cursor(epoch, last_seq - last_seq // RECENT))
    took = {"index": _build_index(state, last_seq)}
    took["all"], peak_kib = _command(config, "--since", "beginning")
    took["peak"] = peak_kib / 1024

    def query(since: str, question: Question) -> float:
        return percentile([_milliseconds(state, since, question) for _ in range(QUERIES)], 50)

    def command(*arguments: str) -> float:
        return 1000 * percentile([_command(config, *arguments)[0] for _ in range(QUERIES)], 50)

    took["all directories"] = query("beginning", Question(dirs=True))
    took["directories"] = query(recent, Question(dirs=True))
    took["prefix"] = query("beginning", Question(dirs=True, prefix=PREFIX))
    took["unchanged"] = query("beginning", Question(prefix=b"usr/share/no-such-package"))
    took["paths"] = query(recent, Question())
    took["directories command"] = command("--since", recent, "--dirs")
    took["paths command"] = command("--since", recent)
    took["prefix command"] = command("--since", recent, "--path", os.fsdecode(PREFIX))
    return took


def write_journal(journal: Path, records: int) -> tuple[str, int]:
    """A journal of so many changes, in the bytes that the writer would write; its epoch and last number."""
    journal.mkdir(mode=0o700)
    chance, epoch, seq = random.Random(1), os.urandom(8), 0
    paths = [
        b"usr/share/package-%d/directory-%d/file-%d" % (package, directory, file)
        for package in range(PACKAGES)
        for directory in range(DIRECTORIES)
        for file in range(FILES)
    ]
    status = pack_status(os.stat("/"))
    while seq < records:
        header = encode_header(epoch, seq + 1, time.time_ns())
        seed = int.from_bytes(header[-4:], "little")
        with segment_path(journal, seq + 1).open("wb") as file:
            file.write(begin_segment(header, seq, Checkpoint({"base": LayerMark(b"/srv/base", 1)})))
            while seq < records and file.tell() < SEGMENT_BYTES:
                changed = chance.choices(paths, k=min(COMMIT_RECORDS, records - seq))
                now_ns = time.time_ns()
                changes = [
                    Change(now_ns, "base", path, Kind.MODIFY, True, False, None, 123_456, 4242, b"dpkg", 0, status)
                    for path in changed
                ]
                file.write(encode_frames(changes, seq, seed=seed, synced=True))
                seq += len(changes)
    return epoch.hex(), seq


def _build_index(state: Path, last_seq: int) -> float:
    started = time.perf_counter()
    indexer = Indexer(state, state / JOURNAL)
    indexer.start()
    while indexer.read_upto < last_seq and indexer.is_alive():
        time.sleep(LOOK_AGAIN_S)
    indexer.close()
    return time.perf_counter() - started


def _milliseconds(state: Path, since: str, question: Question) -> float:
    started = time.perf_counter()
    for _ in stream(state, since, question).entries:
        pass
    return 1000 * (time.perf_counter() - started)


def _command(config: Path, *arguments: str) -> tuple[float, int]:
    """Seconds that `watchd changes` took, and its peak RSS in KiB."""
    command = [sys.executable, "-m", "watchd", "changes", "--json", "--config", str(config), *arguments]
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SubjectError(f"watchd changes ended with status {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss


# ---- watchman -------------------------------------------------------------------------------------------------------


class Watchman(Subject):
    """watchman from Debian, which keeps what it knows in memory."""

    def _spawn(self) -> subprocess.Popen[bytes]:
        require_inotify_watches(self.arena.directories)
        self._program = require_program("watchman")
        places = {name: self.scratch / name for name in ("sockname", "logfile", "pidfile", "statefile")}
        self._socket = f"--sockname={places['sockname']}"
        options = [f"--{name}={path}" for name, path in places.items()]
        self._environment = {**os.environ, "TMPDIR": str(self.scratch)}  # it leaves a directory there
        return self._popen([self._program, "--foreground", "--no-save-state", *options], env=self._environment)

    def _await_ready(self) -> None:
        for _ in self.checks(every_s=LOOK_AGAIN_S):
            if (self.scratch / "sockname").exists():
                break
        self.ask("watch", str(self.arena.lower))
        self.clock()

    def clock(self) -> str:
        """Its position, when it has seen all that happened before."""
        answer = json.loads(self.ask("clock", str(self.arena.lower), {"sync_timeout": 60_000}))
        if "clock" not in answer:
            raise self.failure(f"answered {answer}")
        return str(answer["clock"])

    def ask(self, *words: object) -> bytes:
        """The answer to a command. Raises SubjectError."""
        command = [self._program, "--no-spawn", self._socket, "-j"]
        done = subprocess.run(
            command, input=json.dumps(words).encode(), stdout=subprocess.PIPE, env=self._environment, check=False
        )
        if done.returncode:
            raise self.failure(f"refused {words[0]}")
        return done.stdout


def _watchman(session: Session) -> dict[str, float]:
    changed = session.scale.records // RECENT
    with _tree(session, changed) as arena, Watchman(session.workspace, arena) as watchman:
        since, root = watchman.clock(), str(arena.lower)
        directories = sorted(path for parent in arena.lower.iterdir() for path in parent.iterdir())
        for number in range(changed):
            (directories[number % len(directories)] / f"file-{number // len(directories)}").write_bytes(b"x")
        watchman.clock()
        prefix = str(directories[0].relative_to(arena.lower))
        fields = ["name", "exists", "ino", "type"]
        below = {"since": since, "expression": ["dirname", prefix], "fields": fields}
        return {
            "paths command": _median(lambda: watchman.ask("query", root, {"since": since, "fields": fields})),
            "prefix command": _median(lambda: watchman.ask("query", root, below)),
        }


def _median(ask: Callable[[], object]) -> float:
    """Milliseconds, from exec to exit."""

    def once() -> float:
        started = time.perf_counter()
        ask()
        return 1000 * (time.perf_counter() - started)

    return percentile([once() for _ in range(QUERIES)], 50)


@contextlib.contextmanager
def _tree(session: Session, changed: int) -> Iterator[Arena]:
    """A tree of ten times as many files as will change, ten in a directory."""
    base = session.workspace.base / "changes"  # other benchmarks have arenas of that size
    base.mkdir()
    arena = Arena(base, max(changed, 10))
    try:
        arena.build()
        for parent in arena.lower.iterdir():
            for directory in parent.iterdir():
                for number in range(10):
                    os.mknod(directory / f"file-{number}")
        yield arena
    finally:
        arena.dismantle()
        shutil.rmtree(base)
