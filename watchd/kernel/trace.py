"""Executing a file by its descriptor, under a tracer.

Facts: execveat(2) with AT_EMPTY_PATH executes what an O_PATH descriptor is open on. It is older than the numbers that all
architectures share: 322 on x86_64, 281 in the generic table.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence

from watchd.kernel.libc import AT_EMPTY_PATH, function, system_call

_PTRACE_TRACEME = 0
_EXECVEAT = {"x86_64": 322}.get(platform.machine(), 281)

_ptrace = function("ptrace", ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p, restype=ctypes.c_long)
_execveat = system_call(
    _EXECVEAT, "execveat", ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int
)


def trace_me() -> None:
    """Be traced by the parent from now on (PTRACE_TRACEME). Raises OSError."""
    _ptrace(_PTRACE_TRACEME, 0, None, None)


def execute(descriptor: int, arguments: Sequence[bytes]) -> None:
    """execveat(2) of what the descriptor is open on, without an environment; returns only by raising OSError."""
    argv = (ctypes.c_char_p * (len(arguments) + 1))(*arguments, None)
    _execveat(descriptor, b"", argv, (ctypes.c_char_p * 1)(None), AT_EMPTY_PATH)
