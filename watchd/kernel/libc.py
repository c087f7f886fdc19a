"""The one way into libc: prototypes bound once, errors raised in one place.

Facts: `syscall(2)` numbers at or above 424 are the same on every architecture that uses the generic table, x86_64 and arm64
among them. `ctypes.CDLL(use_errno=True)` keeps errno per thread and releases the GIL for the length of the call, so a call
that hangs on somebody's filesystem stops only the thread that made it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable
from typing import Any

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_EACCESS = 0x200
AT_EMPTY_PATH = 0x1000

_libc = ctypes.CDLL(None, use_errno=True)
_NAMES_WITHOUT_KERNEL = (errno.ENOSYS,)


def _raise(name: str) -> None:
    number = ctypes.get_errno()
    reason = os.strerror(number)
    if number in _NAMES_WITHOUT_KERNEL:
        reason = f"{reason} (this kernel has no {name})"
    raise OSError(number, f"{name}: {reason}")


def function(name: str, *argtypes: Any, restype: Any = ctypes.c_int) -> Callable[..., int]:
    """Bind libc's wrapper `name`; the result raises OSError instead of returning a negative value."""
    entry = _libc[name]
    entry.argtypes = argtypes
    entry.restype = restype

    def call(*arguments: Any) -> int:
        result = entry(*arguments)
        if result < 0:
            _raise(name)
        return result  # type: ignore[no-any-return]

    return call


def use_one_malloc_arena() -> None:
    """Have all threads allocate from one arena (mallopt(3), glibc): each of their own would keep what it once used."""
    m_arena_max = -8
    with contextlib.suppress(AttributeError):  # another libc
        _libc.mallopt(m_arena_max, 1)


def quiet_system_call(number: int, *argtypes: Any) -> Callable[..., int]:
    """Like `system_call`, for where failure is an everyday answer: the result is -errno instead of an exception."""
    entry = ctypes.CDLL(None, use_errno=True)["syscall"]
    entry.argtypes = (ctypes.c_long, *argtypes)
    entry.restype = ctypes.c_long
    get_errno = ctypes.get_errno

    def call(*arguments: Any) -> int:
        result = entry(number, *arguments)
        return result if result >= 0 else -get_errno()

    return call


def system_call(number: int, name: str, *argtypes: Any) -> Callable[..., int]:
    """Bind a system call that libc has no wrapper for; otherwise like `function`."""
    # A fresh function object per call number: argtypes belong to the object, and sharing one would be a race of threads.
    entry = ctypes.CDLL(None, use_errno=True)["syscall"]
    entry.argtypes = (ctypes.c_long, *argtypes)
    entry.restype = ctypes.c_long

    def call(*arguments: Any) -> int:
        result = entry(number, *arguments)
        if result < 0:
            _raise(name)
        return result  # type: ignore[no-any-return]

    return call
