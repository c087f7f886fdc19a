from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Require, is_required, suite_of


@pytest.mark.parametrize(
    ("setting", "required"),
    [("", False), ("all", True), ("system", True), ("kernel,system", True), ("kernel system", True), ("kernel", False)],
)
def test_a_suite_is_required_when_it_or_all_is_named(setting: str, required: bool) -> None:
    assert is_required("system", setting) is required


def test_the_suite_is_the_directory() -> None:
    assert suite_of(Path(__file__)) == "unit"


def test_a_missing_requirement_is_a_failure_where_it_is_required(
    require: Require, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHD_REQUIRE", "unit")
    with pytest.raises(pytest.fail.Exception, match="required here: a tool"):
        require(None, "a tool")


def test_a_missing_requirement_is_a_skip_elsewhere(require: Require, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHD_REQUIRE", "system")
    with pytest.raises(pytest.skip.Exception, match="a tool"):
        require(None, "a tool")


def test_a_requirement_that_is_met_is_nothing(require: Require, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHD_REQUIRE", "all")
    require("/usr/bin/tool", "a tool")


def test_every_test_has_the_marker_of_its_directory(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("unit") is not None
