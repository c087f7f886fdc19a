from __future__ import annotations

import dataclasses

import pytest

from demo.cases import CASES
from demo.play import Outcome
from demo.show import main

UNPINNED = next(case for case in CASES if case.pin is None)
PINNED = next(case for case in CASES if case.pin is not None)


def outcome(**extra: object) -> Outcome:
    healed = Outcome(UNPINNED, UNPINNED.before, UNPINNED.after, 1.0)
    return dataclasses.replace(healed, **extra)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("result", "status", "words"),
    [
        (outcome(), 0, "Next:"),
        (outcome(healed=UNPINNED.before), 1, "STILL STALE"),
        (outcome(healed=UNPINNED.before, report="f: replaced"), 1, "did not go as promised"),
        (outcome(case=PINNED, healed=PINNED.before, report="f: replaced", climbed=PINNED.after), 0, "  f: replaced"),
        (outcome(case=PINNED, healed=PINNED.before, report="f: replaced", climbed=PINNED.before), 1, "STILL STALE"),
        (outcome(case=PINNED, healed=PINNED.before, climbed=PINNED.after), 1, "STILL STALE, not reported"),
    ],
)
def test_the_demo_succeeds_only_if_all_went_as_promised(
    result: Outcome, status: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("demo.show._play_all", lambda: iter([result]))
    assert main() == status
    assert words in capsys.readouterr().out
