"""Mount namespaces: which one a process is in, and doing something inside another one.

Facts
* open_tree(OPEN_TREE_CLONE) of a path whose mount belongs to another mount namespace fails with EINVAL, also by way of
  /proc/<pid>/root: a clone is made by somebody who is in that namespace (check_mnt in fs/namespace.c).
* setns(CLONE_NEWNS) moves the calling thread only, and wants a thread that shares its root and working directory with no
  other: EINVAL before unshare(CLONE_FS). It sets both to the root of the namespace, which for a process after chroot(2) is
  not the root that its mountinfo is relative to; so the thread also takes that process's root.
* A namespace lives, and with it all of its mounts, for as long as a thread is in it or a descriptor is open on its ns file or
  on any /proc/<pid>/mountinfo that shows it. So nothing of the kind is held at rest.
* A descriptor on /proc/<pid>/root makes the mount under it busy: it is closed before the errand begins.
* The inode number of a namespace is used again soon after its end.
* A mount namespace is owned by the user namespace that it was made in (ioctl_ns(2)), and so are the superblocks mounted there.
  setns(CLONE_NEWUSER) is refused (EINVAL) to a process with several threads.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, wait
from typing import Any, TypeVar

from watchd.errors import DeadlineError, MountError
from watchd.kernel.libc import function

CLONE_FS = 0x200
CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000
_NS_GET_USERNS = 0xB701

IDLE_MAX = 4
"""So many threads wait for the next errand."""

T = TypeVar("T")

_unshare = function("unshare", ctypes.c_int)
_setns = function("setns", ctypes.c_int, ctypes.c_int)


def unshare(flags: int) -> None:
    """unshare(2), of the calling thread. Raises OSError."""
    _unshare(flags)


def setns(fd: int, nstype: int) -> None:
    """setns(2), of the calling thread. Raises OSError."""
    _setns(fd, nstype)


def mount_namespace(pid: int | str = "self") -> int:
    """The inode number of a process's mount namespace. Raises OSError (ENOENT, ESRCH: the process is gone)."""
    if pid == "self":
        return _own_namespace(os.getpid())
    return _namespace_of(pid)


@functools.lru_cache(maxsize=1)
def _own_namespace(pid: int) -> int:
    # Asked for at every clone, and the same for as long as we live: only single threads of ours ever leave it.
    return _namespace_of(pid)


def _namespace_of(pid: int | str) -> int:
    # The link's text is `mnt:[INODE]`; reading it costs half of a stat and opens nothing.
    return int(os.readlink(f"/proc/{pid}/ns/mnt")[5:-1])


def owning_user_namespace(pid: int) -> int:
    """The inode number of the user namespace that owns a process's mount namespace. Raises OSError (EPERM: above our own)."""
    with open(f"/proc/{pid}/ns/mnt", "rb", buffering=0) as namespace:
        owner = fcntl.ioctl(namespace, _NS_GET_USERNS)
    try:
        return os.fstat(owner).st_ino
    finally:
        os.close(owner)


def enter_for_good(pid: int, namespace: int) -> None:
    """Take this process, which must have one thread only, into the user and mount namespace of `pid`, as root of it.

    Raises MountError if the process is in another mount namespace than `namespace` or must not be followed.
    """
    try:
        user = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        mounts = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if os.fstat(mounts).st_ino != namespace:
            raise MountError(f"process {pid} is in another mount namespace now")
        setns(user, CLONE_NEWUSER)
        _enter(mounts, root)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    except OSError as error:
        raise MountError(f"cannot enter the user namespace of process {pid}: {error.strerror}") from error


class Courier:
    """Threads that run errands inside other mount namespaces and come home after each; for use from any thread.

    Errands run side by side. An errand makes system calls only: an import or a lazily opened file would come from the other
    namespace. One that overstays is given up with its thread, which stays in the other namespace until its call returns.
    """

    def __init__(self, *, timeout_s: float | None = 10.0) -> None:
        """None is for callers who know how to wait: a thread that is given up is lost for each try."""
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._idle: list[_Jobs] = []
        self._closed = False

    def run(
        self,
        pid: int,
        errand: Callable[[], T],
        *,
        namespace: int | None = None,
        discard: Callable[[T], object] | None = None,
    ) -> T:
        """What `errand` returns or raises, in the mount namespace of `pid` and with its root directory.

        With `namespace` the process must still be in that one. `discard` is given a result that comes too late. Raises
        MountError if the process or its namespace is gone or must not be entered, DeadlineError if the errand overstays.
        """
        answer: Future[T] = Future()

        def go(home: _Home) -> None:
            try:
                result = _visit(pid, namespace, errand, home)
            except BaseException as error:  # whatever it is, somebody waits for it
                _settle(answer.set_exception, error)
            else:
                if not _settle(answer.set_result, result) and discard is not None:
                    discard(result)

        jobs = self._take()
        jobs.put(go)
        wait([answer], self._timeout_s)
        if answer.cancel():  # it is not done
            jobs.put(None)
            raise DeadlineError(f"the mounts of process {pid} do not answer within {self._timeout_s:g} s")
        self._give_back(jobs)
        return answer.result()

    def close(self) -> None:
        """End the threads; those that are on an errand once it is done."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for jobs in idle:
            jobs.put(None)

    def _take(self) -> _Jobs:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return _start_thread()

    def _give_back(self, jobs: _Jobs) -> None:
        with self._lock:
            if len(self._idle) < IDLE_MAX and not self._closed:
                self._idle.append(jobs)
                return
        jobs.put(None)


class _Home:
    """Where the thread came from, and the way back."""

    def __init__(self) -> None:
        self._namespace = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        self._root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def enter(self) -> None:
        _enter(self._namespace, self._root)

    def close(self) -> None:
        os.close(self._root)
        os.close(self._namespace)


_Jobs = queue.SimpleQueue[Callable[[_Home], None] | None]


def _start_thread() -> _Jobs:
    jobs: _Jobs = queue.SimpleQueue()
    ready: Future[None] = Future()
    threading.Thread(target=_serve, args=(jobs, ready), name="courier", daemon=True).start()
    ready.result()
    return jobs


def _serve(jobs: _Jobs, ready: Future[None]) -> None:
    try:
        unshare(CLONE_FS)
        home = _Home()
    except OSError as error:
        ready.set_exception(error)
        return
    ready.set_result(None)
    try:
        while (job := jobs.get()) is not None:
            job(home)
            del job  # it holds the errand, and with it whatever the errand refers to
    finally:
        home.close()


def _visit(pid: int, namespace: int | None, errand: Callable[[], T], home: _Home) -> T:
    try:
        _enter_process(pid, namespace)
        return errand()
    finally:
        # Before the caller gets its answer, so that nothing of ours is left there when `run` returns.
        home.enter()


def _enter_process(pid: int, namespace: int | None) -> None:
    try:
        with open(f"/proc/{pid}/ns/mnt", "rb", buffering=0) as entrance:
            if namespace is not None and os.fstat(entrance.fileno()).st_ino != namespace:
                raise MountError(f"process {pid} is in another mount namespace now")
            root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                _enter(entrance.fileno(), root)
            finally:
                os.close(root)
    except OSError as error:
        raise MountError(f"cannot enter the mount namespace of process {pid}: {error.strerror}") from error


def _enter(namespace: int, root: int) -> None:
    setns(namespace, CLONE_NEWNS)
    os.fchdir(root)
    os.chroot(".")


def _settle(setter: Callable[[Any], None], value: Any) -> bool:
    try:
        setter(value)
    except InvalidStateError:  # given up
        return False
    return True
