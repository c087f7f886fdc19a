"""kernel.namespaces: errands in other mount namespaces."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kernel.sandbox import Inmate, Sandbox
from watchd.errors import DeadlineError, MountError
from watchd.kernel.libc import AT_FDCWD
from watchd.kernel.mounts import open_tree_clone
from watchd.kernel.namespaces import Courier, mount_namespace


def courier_namespaces() -> set[str]:
    """The mount namespaces that our threads are in."""
    return {os.readlink(task / "ns/mnt") for task in Path("/proc/self/task").iterdir()}


def thread_namespace() -> str:
    return os.readlink("/proc/thread-self/ns/mnt")


@pytest.fixture
def inmate(sandbox: Sandbox) -> Inmate:
    """Has a tmpfs with a file at `there` of the sandbox, which we do not see."""
    inmate = sandbox.inmate()
    there = os.fsdecode(sandbox.directory(b"there"))
    inmate.run(f"mount -t tmpfs none {there} && touch {there}/file")
    return inmate


def test_an_errand_sees_the_mounts_of_the_other_namespace(sandbox: Sandbox, courier: Courier, inmate: Inmate) -> None:
    there = sandbox.path(b"there")
    assert courier.run(inmate.pid, lambda: os.listdir(there), namespace=inmate.view.namespace) == [b"file"]
    assert os.listdir(there) == []


def test_a_clone_can_only_be_made_by_one_who_is_there(sandbox: Sandbox, courier: Courier, inmate: Inmate) -> None:
    there = sandbox.path(b"there")
    with pytest.raises(OSError, match="Invalid argument") as refused:
        open_tree_clone(AT_FDCWD, b"/proc/%d/root%s" % (inmate.pid, there))
    assert refused.value.errno == errno.EINVAL
    fd = courier.run(inmate.pid, lambda: open_tree_clone(AT_FDCWD, there))
    try:
        inmate.run(f"umount {os.fsdecode(there)}")
        assert os.stat("file", dir_fd=fd).st_size == 0
    finally:
        os.close(fd)


def test_nothing_of_ours_is_left_in_the_namespace_when_the_errand_is_done(
    sandbox: Sandbox, courier: Courier, inmate: Inmate
) -> None:
    foreign = f"mnt:[{inmate.view.namespace}]"
    assert courier.run(inmate.pid, thread_namespace) == foreign
    assert courier_namespaces() == {f"mnt:[{mount_namespace()}]"}
    with pytest.raises(ZeroDivisionError):
        courier.run(inmate.pid, lambda: 1 // 0)
    assert courier_namespaces() == {f"mnt:[{mount_namespace()}]"}
    inmate.run(f"umount {os.fsdecode(sandbox.path(b'there'))}")


def test_a_dead_process_is_a_mount_error_and_the_courier_goes_on(courier: Courier, inmate: Inmate) -> None:
    inmate.end()
    with pytest.raises(MountError, match="cannot enter the mount namespace"):
        courier.run(inmate.pid, thread_namespace)
    assert courier.run(os.getpid(), thread_namespace) == f"mnt:[{mount_namespace()}]"


def test_a_process_id_that_was_given_to_another_is_not_followed(courier: Courier, inmate: Inmate) -> None:
    with pytest.raises(MountError, match="another mount namespace"):
        courier.run(inmate.pid, thread_namespace, namespace=mount_namespace())


def test_the_root_of_a_chrooted_process_is_the_root_of_the_errand(sandbox: Sandbox, courier: Courier) -> None:
    jail = os.fsdecode(sandbox.directory(b"jail"))
    sandbox.directory(b"jail/inside")
    program = f"import os, sys; os.chroot({jail!r}); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as confined:
        assert confined.stdout is not None
        confined.stdout.readline()
        assert courier.run(confined.pid, lambda: os.listdir("/")) == ["inside"]
        assert "inside" not in courier.run(os.getpid(), lambda: os.listdir("/"))


def test_threads_take_turns(courier: Courier, sandbox: Sandbox) -> None:
    inmates = [sandbox.inmate() for _ in range(3)]

    def visit(number: int) -> bool:
        inmate = inmates[number % 3]
        return courier.run(inmate.pid, thread_namespace) == f"mnt:[{inmate.view.namespace}]"

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(visit, range(200)))


def test_an_errand_that_hangs_holds_up_no_other(inmate: Inmate) -> None:
    courier, hang, late = Courier(timeout_s=0.5), threading.Event(), threading.Event()
    discarded: list[str] = []

    def discard(result: str) -> None:
        discarded.append(result)
        late.set()

    def errand() -> str:
        hang.wait()
        return "too late"

    with pytest.raises(DeadlineError, match="do not answer"):
        courier.run(inmate.pid, errand, discard=discard)
    assert courier.run(inmate.pid, thread_namespace) == f"mnt:[{inmate.view.namespace}]"
    hang.set()
    assert late.wait(10)
    assert discarded == ["too late"]
    courier.close()
