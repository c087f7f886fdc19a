"""`watchd check` on the command line, without mounts."""

from __future__ import annotations

import os
from typing import Any

import pytest
from click.testing import CliRunner

from watchd import cli
from watchd.cli.check import LINES_MAX, report_lines
from watchd.cli.render import DAMAGE_REMEDY
from watchd.coherence.audit import Outcome
from watchd.coherence.pins import Holder
from watchd.coherence.view import Stale

HOLDER = Holder(7, "sh", "open")
DAMAGE = Stale(b"f", "damage", reason="it hides")


def report(**values: Any) -> dict[str, Any]:
    points = [{"path": "/m", "namespace": 1, "pid": 1}]
    coherent = {"device": "0:50", "mount_points": points, "state": "coherent", "reason": "", "stale": []}
    return {**coherent, "stale_total": len(values.get("stale", ())), "names": 3, **values}


def entry(path: str, kind: str = "replaced", reason: str = "") -> dict[str, Any]:
    return {"path": path, "kind": kind, "pinned_by": [], "reason": reason}


def test_a_coherent_mount_is_said_to_be() -> None:
    assert list(report_lines(report())) == ["/m: coherent, 3 names looked at"]


def test_a_damaged_name_has_a_line_with_what_happened_and_what_to_do() -> None:
    lines = list(report_lines(report(state="stale", stale=[entry("a\nb", "damage", "it hides\x1b")])))
    assert lines == [rf"/m/a\nb: damage: it hides\x1b; {DAMAGE_REMEDY}"]


def test_many_stale_names_are_counted_and_not_all_printed() -> None:
    stale = [entry(str(number)) for number in range(LINES_MAX + 5)]
    lines = list(report_lines(report(state="stale", stale=stale, stale_total=100_000)))
    assert len(lines) == LINES_MAX + 1
    assert lines[-1] == f"/m: {100_000 - LINES_MAX} more stale entries"


def test_a_mount_that_could_not_be_looked_at_is_not_called_coherent() -> None:
    assert list(report_lines(report(state="failed", reason="no\nmount"))) == [r"/m: failed: no\nmount"]
    lines = list(report_lines(report(state="failed", reason="half", stale=[entry("x")])))
    assert lines == ["/m: failed: half", "/m/x: replaced"]


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (Outcome(), "coherent"),
        (Outcome((Stale(b"f", "ghost"),), 1), "stale"),
        (Outcome((Stale(b"f", "ghost", (HOLDER,)),), 1), "pinned"),
        (Outcome((Stale(b"f", "ghost", (HOLDER,)),), 2), "stale"),
        (Outcome((Stale(b"f", "ghost", (HOLDER,)), DAMAGE), 2), "stale"),
        (Outcome(error="gone"), "failed"),
    ],
)
def test_a_mount_is_pinned_only_if_all_that_is_stale_is_held(outcome: Outcome, state: str) -> None:
    assert outcome.state == state


@pytest.mark.parametrize("verb", [("check",), ("invalidate", "/srv")])
def test_who_is_not_root_is_told_so(verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    done = CliRunner().invoke(cli.main, verb)
    assert done.exit_code == 77
    assert done.stderr.endswith("run it as root\n")


def test_a_mount_that_is_none_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    done = CliRunner().invoke(cli.main, ["check", "/no/such/mount"])
    assert done.exit_code == 2
    assert "no overlay mount matches" in done.stderr
