"""A daemon that gives one prepared answer to each connection and keeps what it was asked."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class FakeDaemon:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.requests: list[dict[str, Any]] = []
        self._answer: bytes | None = b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / "watchd.sock"))
        self._listener.listen()
        self._over = threading.Event()

    def answers(self, result: dict[str, Any]) -> None:
        self._answer = json.dumps({"ok": True, "result": result}).encode() + b"\n"

    def refuses(self, error: str, kind: str) -> None:
        self._answer = json.dumps({"ok": False, "error": error, "kind": kind}).encode() + b"\n"

    def sends(self, raw: bytes) -> None:
        self._answer = raw

    def stays_silent(self) -> None:
        """Takes the request and keeps the connection open until the test is over."""
        self._answer = None

    @contextlib.contextmanager
    def serving(self) -> Iterator[FakeDaemon]:
        thread = threading.Thread(target=self._serve)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            self._listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            self._listener.close()

    def _serve(self) -> None:
        while not self._over.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as stream:
                self.requests.append(json.loads(stream.readline()))
                self._respond(connection)

    def _respond(self, connection: socket.socket) -> None:
        if self._answer is None:
            self._over.wait()
            return
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(self._answer)
