"""coherence.drop_caches: the rate, the count, and what is said where it must not be done."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from watchd.coherence.drop_caches import DropCaches
from watchd.errors import MountError, RefusedError


class Clock:
    now_ns = 5

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def knob(tmp_path: Path) -> Path:
    path = tmp_path / "drop_caches"
    path.touch()
    return path


def test_the_host_is_not_made_to_drop_its_caches_again_before_the_interval_is_over(knob: Path) -> None:
    clock = Clock()
    drops = DropCaches(60_000_000_000, path=str(knob), monotonic_ns=clock)
    drops.drop()
    assert knob.read_bytes() == b"2\n"
    clock.now_ns += 59_000_000_000
    with pytest.raises(RefusedError, match=r"allowed again in 1\.0 s"):
        drops.drop()
    clock.now_ns += 1_000_000_000
    drops.drop()
    assert (drops.count, drops.refused) == (2, 1)
    drops.interval_ns = 0  # as a reload of the configuration may say
    drops.drop()


def test_many_mounts_that_ask_at_once_get_one_drop(knob: Path) -> None:
    drops = DropCaches(60_000_000_000, path=str(knob), monotonic_ns=Clock())

    def ask(_: int) -> bool:
        try:
            drops.drop()
        except RefusedError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(50))) == 1
    assert (drops.count, drops.refused) == (1, 49)


def test_a_drop_that_failed_is_not_counted_and_not_waited_for(knob: Path) -> None:
    drops = DropCaches(60_000_000_000, path=str(knob), monotonic_ns=Clock())
    knob.unlink()
    with pytest.raises(MountError, match="No such file"):
        drops.drop()
    knob.touch()
    drops.drop()
    assert (drops.count, drops.refused) == (1, 0)
