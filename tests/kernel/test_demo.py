from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from demo.cases import CASES

REPOSITORY = Path(__file__).parents[2]
HEALED_BY = {
    "replaced while it is open": "evict",
    "made anew while somebody is in it": "replace",
    "a library is replaced while it is mapped": "evict",
    "a file appears in a listing held open": "evict",
}
DEMO = (sys.executable, "-m", "demo")


def test_the_demo_heals_every_case_and_leaves_nothing_behind() -> None:
    assert {case.name for case in CASES if case.pin} == {*HEALED_BY}
    before = set(Path("/tmp").glob("watchd-demo-*"))
    done = subprocess.run(DEMO, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    for case in CASES:
        row = next(line for line in done.stdout.splitlines() if line.strip().startswith(case.name))
        assert ("pinned: reported by `watchd sync`" if case.pin else case.after) in row
    assert done.stdout.count(", held by ") == sum(case.pin is not None for case in CASES)

    told = done.stdout.partition("actions: [invalidate, evict, replace]")[2].splitlines()
    for name, healed_by in HEALED_BY.items():
        row = next(line for line in told if line.strip().startswith(name))
        assert f"  {healed_by}  " in row
        assert "STILL STALE" not in row
    assert set(Path("/tmp").glob("watchd-demo-*")) <= before


def test_who_may_not_mount_is_told_so_in_one_line() -> None:
    command = ("setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", *DEMO)
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("demo: root may not mount here")
    assert done.stderr.count("\n") == 1
