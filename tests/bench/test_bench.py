"""The benchmarks run with tiny parameters, so that they cannot rot. No time is looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.bench.__main__ import BENCHMARKS
from tests.bench.daemon import tally
from tests.bench.loads import REPOSITORY
from tests.bench.measure import percentile
from tests.bench.report import Row, Target

WATCHD_INCLUDED = True
"""Whether the runs of this test measure watchd too, or its baselines alone."""


def run_bench(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the bench with all its temporary files in `directory`."""
    command = [sys.executable, "-m", "tests.bench", *arguments]
    environment = {**os.environ, "TMPDIR": str(directory)}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


def test_every_benchmark_runs_and_leaves_nothing_behind(tmp_path_factory: pytest.TempPathFactory) -> None:
    # Of a short name, because the control socket's path lies below it and may have 107 bytes (unix(7)).
    scratch, result = tmp_path_factory.mktemp("b"), tmp_path_factory.mktemp("result") / "bench.json"
    mounts = Path("/proc/self/mountinfo").read_text()
    options = [] if WATCHD_INCLUDED else ["--baselines-only"]

    done = run_bench(scratch, "--small", "--json", str(result), *options)

    assert done.returncode == 0, done.stdout + done.stderr
    rows = msgspec.json.decode(result.read_bytes())["rows"]
    assert {row["benchmark"] for row in rows} == set(BENCHMARKS)
    assert all("watchd" in row["values"] for row in rows) is WATCHD_INCLUDED
    lost = {row["name"]: row["values"].get("watchd", 0) for row in rows if row["name"].endswith("names lost")}
    assert lost == {"fanotify, names lost": 0, "inotify, names lost": 0}
    assert list(scratch.iterdir()) == []
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_bare_reader_loses_nothing_so_that_it_is_fit_to_be_the_reference(tmp_path: Path) -> None:
    result = tmp_path / "bench.json"
    done = run_bench(tmp_path, "drain", "--small", "--baselines-only", "--json", str(result))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row["values"] for row in msgspec.json.decode(result.read_bytes())["rows"]}
    assert rows["fanotify, names lost"] == {"bare reader": 0}


def test_a_misspelt_benchmark_is_named_in_the_error(tmp_path: Path) -> None:
    done = run_bench(tmp_path, "darin")
    assert done.returncode == 2
    assert "darin" in done.stderr


def test_a_name_missing_in_the_journal_counts_as_lost() -> None:
    journal = [
        b'{"seq":1,"type":"start","layer":""}',
        b'{"seq":2,"type":"change","layer":"l","path":"d0/d0/2","from":"d0/d0/0","kinds":["rename"]}',
        b'{"seq":3,"type":"desync","layer":"l","reason":"overflow"}',
        b'{"seq":4,"type":"change","layer":"l","path":"d0/d1","kinds":["attrib"]}',
        b'{"seq":5,"type":"change","layer":"l","path":"d0/d1/1","kinds":["create"]}',
    ]
    counted = tally(journal, files=2)
    assert (counted.lost, counted.overflows) == (1, 1)


@pytest.mark.parametrize(
    ("target", "verdict"),
    [
        (Target(3.0, is_ratio=True), "ok"),
        (Target(2.9, is_ratio=True), "over"),
        (Target(6.0), "ok"),
        (Target(5.9), "over"),
    ],
)
def test_a_target_is_judged_by_what_it_limits(target: Target, verdict: str) -> None:
    row = Row("drain", "CPU per event", "us", {"watchd": 6.0, "bare reader": 2.0}, "bare reader", target)
    assert row.ratio() == 3.0
    assert row.verdict() == verdict


@pytest.mark.parametrize(("limit", "verdict"), [(6.0, "ok"), (6.1, "under")])
def test_a_target_may_be_the_least(limit: float, verdict: str) -> None:
    row = Row("append", "batches", "records/s", {"watchd": 6.0}, None, Target(limit, is_least=True))
    assert row.verdict() == verdict


def test_a_value_that_is_missing_is_never_called_ok() -> None:
    assert Row("start", "fanotify", "s", {"watchd": None}, None, Target(0.5)).verdict() is None
    assert (
        Row("start", "fanotify", "s", {"bare reader": 0.02}, "bare reader", Target(2, is_ratio=True)).verdict() is None
    )


def test_percentile_is_a_value_that_occurred() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.0
    assert percentile(range(1, 1001), 99) == 990
    assert percentile([7.0], 99) == 7.0
