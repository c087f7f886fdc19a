"""sd_notify(3) and sd_listen_fds(3): tell the service manager how we are, take what it passes. Without NOTIFY_SOCKET nothing is
sent, without LISTEN_FDS nothing taken.

Fact: socket.send_fds of Python 3.11 forgets the address.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence

log = logging.getLogger(__name__)

_FIRST_DESCRIPTOR = 3
"""SD_LISTEN_FDS_START"""


def has_manager() -> bool:
    """Whether anybody is told."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def notify(*, descriptors: Sequence[int] = (), **fields: str | int) -> None:
    """Send the fields, for instance `notify(READY=1, STATUS="watching 3 mounts")`, and copies of these descriptors. A manager
    that is gone is no error."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    message = "\n".join(f"{key}={value}" for key, value in fields.items()).encode()
    path = b"\0" + address[1:].encode() if address.startswith("@") else address.encode()
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)  # a manager that does not read must not stop us
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        sock.sendmsg([message], [rights] if descriptors else [], 0, path)


def close_unused(descriptors: Mapping[str, Sequence[int]]) -> None:
    """Give up what was inherited and nobody has taken."""
    for name, group in descriptors.items():
        log.warning("the service manager has passed %d descriptors named %r, which are not known", len(group), name)
        for descriptor in group:
            os.close(descriptor)


def inherited() -> dict[str, list[int]]:
    """The descriptors that the manager has passed to this process, by name, from now on the caller's and not passed on.

    To be called once, before anything runs that might inherit them."""
    pid, count, names = (os.environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    given = names.split(":")
    found: dict[str, list[int]] = {}
    for number in range(int(count)):
        descriptor = _FIRST_DESCRIPTOR + number
        os.set_inheritable(descriptor, False)
        found.setdefault(given[number] if number < len(given) else "", []).append(descriptor)
    return found


def reloading() -> None:
    """Say that a reload begins; READY=1 ends it."""
    notify(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)


def watchdog_interval_s() -> float | None:
    """How often WATCHDOG=1 has to be sent; None if the manager wants none."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        limit_us = int(os.environ["WATCHDOG_USEC"])
    except (KeyError, ValueError):
        return None
    return limit_us / 2_000_000 if limit_us > 0 else None
