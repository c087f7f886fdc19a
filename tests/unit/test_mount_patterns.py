"""overlay.discovery: which overlays a MOUNT pattern means."""

from __future__ import annotations

import pytest

from watchd.overlay.discovery import is_selected, matches
from watchd.overlay.model import MountPoint, Overlay


def overlay(*paths: bytes) -> Overlay:
    points = tuple(MountPoint(path, 100 + number, 1 + number) for number, path in enumerate(paths))
    return Overlay("0:40", points, (b"/l",), (), None, None, {}, read_only=True)


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        (b"/srv/app", "/srv/app"),
        (b"/srv/app", "/srv/app/"),
        (b"/", "/"),
        (b"/srv/app", "0:40"),
        (b"/srv/app/merged", "/srv/*"),
        (b"/srv/[x]", "/srv/[x]"),
        (b"/srv/\xff", "/srv/\udcff"),
    ],
)
def test_a_mount_is_found_by_what_a_person_would_type(path: bytes, pattern: str) -> None:
    assert matches(overlay(path), pattern)


@pytest.mark.parametrize("pattern", ["/srv/app", "0:4", "0:401", "", "/SRV/*"])
def test_another_mount_is_not_meant(pattern: str) -> None:
    assert not matches(overlay(b"/srv/apple"), pattern)


def test_any_of_its_mount_points_will_do() -> None:
    assert matches(overlay(b"/", b"/var/lib/docker/overlay2/1/merged"), "/var/lib/docker/overlay2/*")


def test_exclude_beats_include() -> None:
    both = overlay(b"/srv/a", b"/var/b")
    assert is_selected(both, include=("*",), exclude=("/opt/*",))
    assert not is_selected(both, include=("*",), exclude=("/var/*",))
    assert not is_selected(both, include=("/opt/*",), exclude=())
