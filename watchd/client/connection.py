"""Connecting to the control socket.

Facts about unix sockets that shape this module (unix(7)):

* A missing socket is ENOENT; one whose daemon died is ECONNREFUSED, since the name outlives the process.
* With a full backlog a blocking connect waits, as long as SO_SNDTIMEO allows, and then says EAGAIN; a non-blocking one, which
  is what a timeout makes of a Python socket and asyncio of every socket, says EAGAIN at once. So the connect is a blocking one.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path


def connect(path: Path, timeout: float) -> socket.socket:
    """A connected, blocking socket, the caller's. `timeout` is in seconds. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        timeval = struct.pack("@ll", int(timeout), int(timeout % 1 * 1e6) or 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection
