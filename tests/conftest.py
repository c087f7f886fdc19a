"""What all suites share: a marker for each directory, and requirements that are never silently missing where it counts.

A test that needs something of its host (root, a tool, a kernel feature) asks `require(condition, reason)`. On a host that
lacks it the test is skipped, unless the environment variable WATCHD_REQUIRE names its suite (`unit,system`, or `all`): then it
fails. `make test` installs everything and sets `all`, so there a skip cannot pass for a success.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

SUITES = frozenset({"unit", "kernel", "crash", "system", "fuzz", "bench"})
_HERE = Path(__file__).parent

Require = Callable[[object, str], None]


def suite_of(path: Path) -> str:
    """The suite of a test file: the name of its directory below `tests/`."""
    return path.relative_to(_HERE).parts[0]


def is_required(suite: str, setting: str) -> bool:
    """Whether a setting of WATCHD_REQUIRE names the suite."""
    return bool({suite, "all"} & set(setting.replace(",", " ").split()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        suite = suite_of(item.path)
        if suite not in SUITES:
            raise pytest.UsageError(f"{item.path}: tests belong into one of {', '.join(sorted(SUITES))}")
        item.add_marker(suite)


@pytest.fixture
def require(request: pytest.FixtureRequest) -> Require:
    """`require(condition, reason)`: skips the test without the condition, or fails it where WATCHD_REQUIRE says so."""
    suite = suite_of(request.path)

    def require(condition: object, reason: str) -> None:
        if condition:
            return
        if is_required(suite, os.environ.get("WATCHD_REQUIRE", "")):
            pytest.fail(f"required here: {reason}", pytrace=False)
        pytest.skip(reason)

    return require


@pytest.fixture(autouse=True)
def _no_configuration_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of whoever runs the tests is not part of them."""
    monkeypatch.delenv("WATCHD_CONFIG", raising=False)
