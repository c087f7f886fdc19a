"""sd_notify(3): tell the service manager how we are. Without NOTIFY_SOCKET nothing is sent."""

from __future__ import annotations

import contextlib
import os
import socket
import time


def notify(**fields: str | int) -> None:
    """Send the fields, for instance `notify(READY=1, STATUS="watching 3 mounts")`. A manager that is gone is no error."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    message = "\n".join(f"{key}={value}" for key, value in fields.items()).encode()
    path = b"\0" + address[1:].encode() if address.startswith("@") else address.encode()
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)  # a manager that does not read must not stop us
        sock.sendto(message, path)


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
