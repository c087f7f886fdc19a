"""overlay.mountwatch: with and without fanotify's mount events."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.sandbox import Sandbox
from watchd.kernel.namespaces import mount_namespace
from watchd.overlay.discovery import find_namespaces
from watchd.overlay.mountwatch import MountWatch


def is_readable(watch: MountWatch) -> bool:
    return bool(select.select([watch], [], [], 0)[0])


def marks(watch: MountWatch) -> list[str]:
    """The namespaces that the kernel holds marks on."""
    return [
        line.split()[1]
        for line in Path(f"/proc/self/fdinfo/{watch.fileno()}").read_text().splitlines()
        if "mnt_ns" in line
    ]


@pytest.fixture(params=["best", "poll"])
def watch(request: pytest.FixtureRequest, sandbox: Sandbox) -> Iterator[MountWatch]:
    """The watch that this kernel permits, and the one that every kernel permits."""
    watch = MountWatch.open() if request.param == "best" else MountWatch(None)
    yield watch
    watch.close()


@pytest.fixture
def wide_watch(sandbox: Sandbox) -> Iterator[MountWatch]:
    """A watch that hears of other namespaces."""
    watch = MountWatch.open()
    yield watch
    watch.close()


def test_no_mount_and_no_umount_goes_unheard(sandbox: Sandbox, watch: MountWatch) -> None:
    assert not is_readable(watch)
    for _ in range(3):
        sandbox.mount_tmpfs(b"t")
        assert is_readable(watch)
        watch.drain()
        assert not is_readable(watch)
        sandbox.umount(b"t")
        assert is_readable(watch)
        watch.drain()
        assert not is_readable(watch)


def test_an_event_loop_that_nests_the_watch_hears_every_change(sandbox: Sandbox, watch: MountWatch) -> None:
    with select.epoll() as loop:
        loop.register(watch, select.EPOLLIN)
        for _ in range(3):
            sandbox.mount_tmpfs(b"t")
            assert loop.poll(5) == [(watch.fileno(), select.EPOLLIN)]
            watch.drain()
            sandbox.umount(b"t")
            assert loop.poll(5) == [(watch.fileno(), select.EPOLLIN)]
            watch.drain()
            assert loop.poll(0) == []


def test_a_watch_makes_no_mount_busy(sandbox: Sandbox, watch: MountWatch) -> None:
    sandbox.mount_tmpfs(b"t")
    watch.watch(find_namespaces("all").pids)
    sandbox.umount(b"t")


def test_what_is_not_watched_is_told(sandbox: Sandbox) -> None:
    inmate = sandbox.inmate()
    watch = MountWatch(None)
    try:
        assert watch.watch({mount_namespace(): os.getpid(), inmate.view.namespace: inmate.pid}) == {
            inmate.view.namespace
        }
    finally:
        watch.close()


def test_a_mount_in_a_container_is_heard(sandbox: Sandbox, wide_watch: MountWatch) -> None:
    for inmate in (sandbox.inmate(), sandbox.inmate("--user", "--map-root-user")):
        assert wide_watch.watch({inmate.view.namespace: inmate.pid}) == frozenset()
        assert not is_readable(wide_watch)
        inmate.run("mount -t tmpfs none /mnt")
        assert is_readable(wide_watch)
        wide_watch.drain()
        inmate.run("umount /mnt")
        assert is_readable(wide_watch)
        wide_watch.drain()


def test_a_watched_container_can_end(sandbox: Sandbox, wide_watch: MountWatch) -> None:
    inmate = sandbox.inmate()
    lower = sandbox.mount_tmpfs(b"kept")
    inmate.run(f"mount --bind {os.fsdecode(lower)} /mnt")
    wide_watch.watch({inmate.view.namespace: inmate.pid})
    assert f"mnt_ns:{inmate.view.namespace}" in marks(wide_watch)
    inmate.end()
    assert select.select([wide_watch], [], [], 10)[0], "the umounts of the namespace's end are told"
    while f"mnt_ns:{inmate.view.namespace}" in marks(wide_watch):
        os.sched_yield()  # the kernel frees a namespace a moment after its end


def test_a_process_that_is_gone_is_passed_over(sandbox: Sandbox, wide_watch: MountWatch) -> None:
    inmate = sandbox.inmate()
    inmate.end()
    assert wide_watch.watch({inmate.view.namespace: inmate.pid}) == frozenset()
