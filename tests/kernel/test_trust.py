"""overlay.trust: whose word a path is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from watchd.overlay.trust import is_exposed


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    (home / "layer").mkdir(parents=True)
    home.chmod(0o755)
    return home


def exposed(path: Path) -> bool:
    return is_exposed(os.fsencode(path))


def test_what_only_root_can_change_is_trusted(home: Path) -> None:
    assert not exposed(home / "layer")
    os.chown(home / "layer", 1000, 1000)
    assert not exposed(home / "layer"), "its content is his, where the path leads is not"


@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_a_directory_that_others_write_to_is_not(home: Path, mode: int) -> None:
    home.chmod(mode)
    assert exposed(home / "layer")


def test_a_directory_of_somebody_else_is_not(home: Path) -> None:
    os.chown(home, 1000, 1000)
    assert exposed(home / "layer")


def test_in_a_sticky_directory_the_owner_of_the_entry_decides(home: Path) -> None:
    home.chmod(0o1777)
    assert not exposed(home / "layer")
    os.chown(home / "layer", 1000, 1000)
    assert exposed(home / "layer")


def test_a_link_is_as_good_as_where_it_leads(home: Path, tmp_path: Path) -> None:
    (tmp_path / "absolute").symlink_to(home / "layer")
    (tmp_path / "relative").symlink_to("home/../home/layer")
    assert not exposed(tmp_path / "absolute")
    assert not exposed(tmp_path / "relative")
    os.chown(home, 1000, 1000)
    assert exposed(tmp_path / "absolute")
    assert exposed(tmp_path / "relative")


def test_what_leads_nowhere_or_in_circles_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    assert exposed(tmp_path / "circle")
    assert exposed(tmp_path / "missing")
