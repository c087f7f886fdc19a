"""coherence.damage, the judgement: what is certain, and what somebody may have done on purpose."""

from __future__ import annotations

from typing import Any

import pytest

from watchd.coherence.damage import (
    GONE,
    MOVED,
    REMOVED,
    REPLACED,
    RETURNED,
    TICK_NS,
    WRITTEN,
    Evidence,
    LowerObject,
    Window,
    judge,
)
from watchd.kernel.files import FileHandle

OLD, NEW = FileHandle(1, b"old"), FileHandle(1, b"new")
T = 1_000 * TICK_NS
WHILE_STALE = Window(T)
LOWER = LowerObject(NEW, True, 3, 7, T)


def evidence(**values: Any) -> Evidence:
    return Evidence(**{"is_whiteout": False, "size": 9, "mtime_ns": 5, "born_ns": T, **values})


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (evidence(lower=LOWER), WRITTEN),
        (evidence(lower=LOWER, has_origin=True, origin=OLD), WRITTEN),
        (evidence(lower=LOWER, has_origin=True, origin=NEW), ""),
        (evidence(lower=LOWER, is_whiteout=True), REMOVED),
        (evidence(is_whiteout=True), ""),
        (evidence(), RETURNED),
        (evidence(born_ns=T - 2 * TICK_NS, lower=LOWER), ""),
        (evidence(born_ns=None, lower=LOWER), WRITTEN),
    ],
)
def test_what_came_into_being_while_the_name_was_stale(found: Evidence, reason: str) -> None:
    assert judge(found, WHILE_STALE) == reason


@pytest.mark.parametrize("born_ns", [T + 5 * TICK_NS, None])
def test_what_may_have_come_into_being_after_it_was_healed_is_not_told(born_ns: int | None) -> None:
    assert judge(evidence(born_ns=born_ns, lower=LOWER), Window(T, T + 5 * TICK_NS)) == ""


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"content": LOWER, "has_origin": True, "origin": OLD}, REPLACED),
        ({"content": LOWER, "has_origin": True, "origin": NEW}, ""),
        ({"content": LOWER}, REPLACED),
        ({"content": LOWER, "size": 3, "mtime_ns": 7}, ""),
        ({"content": LOWER, "has_origin": True}, ""),
        ({"content": LowerObject(None, True, 3, 7), "has_origin": True, "origin": OLD}, ""),
        ({"has_origin": True, "origin": OLD}, GONE),
        ({"has_origin": True, "origin": OLD, "content_is_known": False}, ""),
        ({"content": LowerObject(NEW, False, 3, 7), "has_origin": True, "origin": OLD}, GONE),
    ],
)
def test_a_metacopy_is_judged_by_its_content(values: dict[str, Any], reason: str) -> None:
    assert judge(evidence(has_metacopy=True, **values)) == reason


@pytest.mark.parametrize(
    ("born_ns", "left_ns", "arrived_ns", "reason"),
    [
        (T, T - 2, T - 1, MOVED),
        (T, T, T - 1, ""),
        (T, T - 1, T, ""),
        (T, None, T - 1, ""),
        (T, T - 1, None, ""),
        (None, T - 2, T - 1, ""),
    ],
)
def test_a_copy_is_told_only_if_it_is_younger_than_all_that_happened_in_the_lower(
    born_ns: int | None, left_ns: int | None, arrived_ns: int | None, reason: str
) -> None:
    lower = LowerObject(NEW, True, 3, 7, arrived_ns)
    found = evidence(born_ns=born_ns, has_origin=True, origin=OLD, lower=lower, left_ns=left_ns)
    assert judge(found) == reason


def test_files_made_or_renamed_on_purpose_are_not_told() -> None:
    assert judge(evidence(lower=LOWER)) == ""
    assert judge(evidence(lower=LOWER, is_whiteout=True)) == ""
    assert judge(evidence(lower=LOWER, has_origin=True, origin=OLD)) == ""
