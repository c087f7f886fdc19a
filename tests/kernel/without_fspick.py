"""Run a command as on a kernel before 5.2: `python without_fspick.py COMMAND...`. fspick(2) answers ENOSYS to it.

Facts (seccomp(2), linux/audit.h): a filter is a classic BPF program over struct seccomp_data, whose word 0 is the number of the
system call. PR_SET_SECCOMP (22) with SECCOMP_MODE_FILTER (2) takes a struct sock_fprog and is inherited through execve(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

FSPICK = 433
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2

_PROGRAM = b"".join(
    struct.pack("=HBBI", *instruction)
    for instruction in (
        (_LOAD_WORD, 0, 0, 0),
        (_JUMP_IF_EQUAL, 0, 1, FSPICK),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        (_RETURN, 0, 0, _ALLOW),
    )
)


class _Fprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Fprog(len(_PROGRAM) // 8, _PROGRAM)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program)) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
