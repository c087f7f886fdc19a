"""What watchd does not do: flush for what nobody cached, flush all the time, or work because it worked."""

from __future__ import annotations

import itertools
import os
import time

from tests.kernel.accidents import write
from tests.kernel.running import Daemon, Json
from tests.kernel.sandbox import Sandbox

CREATED = 100_000
INVALIDATIONS_MAX = 5
CHURN_S = 2.0


def actions_of(daemon: Daemon) -> list[Json]:
    return [record for record in daemon.log() if record["type"] == "action"]


def look(merged: bytes, name: bytes) -> bool:
    """Have a name cached, whether it is there or not."""
    return os.path.lexists(merged + b"/" + name)


def test_creations_that_nobody_could_have_cached_flush_next_to_nothing(sandbox: Sandbox, daemon: Daemon) -> None:
    lower = sandbox.directory(b"lower")
    directories = [b"cached/%d" % number for number in range(50)] + [b"never-met/%d" % number for number in range(50)]
    for directory in directories:
        sandbox.directory(b"lower/" + directory)
    merged = sandbox.overlay(b"merged", b"lower", upper=b"upper")
    daemon.start()
    for directory in directories[:50]:
        assert look(merged, directory)
    before = daemon.actions(merged)
    for number in range(CREATED):
        os.mknod(b"%s/%s/%d" % (lower, directories[number % len(directories)], number))
    assert daemon.sync(merged) == []
    assert daemon.actions(merged) - before <= INVALIDATIONS_MAX
    assert look(merged, b"cached/0/0")
    assert look(merged, b"never-met/49/%d" % (CREATED - 1))


def test_under_a_churn_of_stale_names_invalidating_keeps_to_a_share_of_the_time(
    sandbox: Sandbox, daemon: Daemon
) -> None:
    lower = sandbox.directory(b"lower")
    merged = sandbox.overlay(b"merged", b"lower", upper=b"upper")
    daemon.start()
    assert daemon.sync(merged) == []
    known = len(actions_of(daemon))
    started = time.monotonic()
    for number in itertools.count():
        name = b"%d" % (number % 2000)
        look(merged, name)
        (os.unlink if os.path.lexists(lower + b"/" + name) else os.mknod)(lower + b"/" + name)
        if time.monotonic() - started > CHURN_S:
            break
    elapsed_ns = (time.monotonic() - started) * 1e9
    assert daemon.sync(merged) == []
    actions = actions_of(daemon)[known:]
    assert actions
    # The budget is a tenth, of processor time; a machine that is busy otherwise makes each of them take longer.
    assert sum(action["duration_ns"] for action in actions) < elapsed_ns / 2
    assert len(actions) < number / 10


def test_what_watchd_does_itself_gives_it_no_further_work(sandbox: Sandbox, daemon: Daemon) -> None:
    """Its journal, its barriers and the lower lie on one filesystem here, as on most hosts."""
    lower = sandbox.directory(b"lower")
    inner = sandbox.overlay(b"inner", b"lower", upper=b"upper")
    outer = sandbox.mount_overlay(
        b"outer",
        [
            (b"lowerdir+", inner),
            (b"upperdir", sandbox.directory(b"outer.upper")),
            (b"workdir", sandbox.directory(b"outer.work")),
        ],
    )
    daemon.start()
    for merged in (outer, inner):
        assert not look(merged, b"new")
    write(lower + b"/new", b"new")
    assert daemon.sync() == []
    assert look(outer, b"new")
    journal, counts = len(daemon.log()), [daemon.actions(merged) for merged in (inner, outer)]
    for _ in range(5):  # each is a barrier: whatever was set going by the one before is read and worked on
        assert daemon.sync() == []
    assert len(daemon.log()) == journal
    assert [daemon.actions(merged) for merged in (inner, outer)] == counts


def test_a_name_that_is_replaced_through_the_merged_mount_and_taken_out_of_the_upper_sets_nothing_going(
    sandbox: Sandbox, daemon: Daemon
) -> None:
    """That is how a pinned name is evicted; it must not look like work, in an upper that is a layer of another mount either."""
    lower = sandbox.directory(b"lower")
    write(lower + b"/name", b"lower")
    inner = sandbox.overlay(b"inner", b"lower", upper=b"upper")
    outer = sandbox.mount_overlay(
        b"outer",
        [
            (b"lowerdir+", inner),
            (b"upperdir", sandbox.directory(b"outer.upper")),
            (b"workdir", sandbox.directory(b"outer.work")),
        ],
    )
    plain = sandbox.overlay(b"plain", b"lower", upper=b"plain.upper")
    daemon.start()
    daemon.sync()
    before = daemon.actions(plain)
    for merged, upper in ((plain, b"plain.upper"), (inner, b"upper")):
        write(merged + b"/.temporary", b"lower")
        os.rename(merged + b"/.temporary", merged + b"/name")
        os.rename(sandbox.path(upper + b"/name"), sandbox.path(upper + b".work/aside"))
    assert daemon.sync(plain) == []
    assert daemon.actions(plain) == before
    assert daemon.changed() <= {"name", ".temporary"}
    daemon.sync()
    counts = [daemon.actions(merged) for merged in (plain, inner, outer)]
    for _ in range(3):
        daemon.sync()
    assert [daemon.actions(merged) for merged in (plain, inner, outer)] == counts


def test_a_busy_directory_beside_the_lower_does_not_hide_what_moves_from_it_into_the_lower(
    sandbox: Sandbox, daemon: Daemon
) -> None:
    lower, beside = sandbox.directory(b"lower"), sandbox.directory(b"beside/busy")
    merged = sandbox.overlay(b"merged", b"lower", upper=b"upper")
    daemon.start()
    for number in range(500):
        write(beside + b"/%d" % number, b"x")
    assert daemon.sync(merged) == []
    assert not look(merged, b"came")
    assert not look(merged, b"came/late")
    os.rename(beside, lower + b"/came")
    write(lower + b"/came/early", b"x")
    assert daemon.sync(merged) == []
    assert look(merged, b"came/499")
    assert look(merged, b"came/early")
    assert not look(merged, b"came/late")
    write(lower + b"/came/late", b"x")
    assert daemon.sync(merged) == []
    assert look(merged, b"came/late")
    assert {"came", "came/early", "came/late", "came/499"} <= daemon.changed()
