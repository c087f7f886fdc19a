"""Making an overlay inside a user namespace, by a child process.

Facts
* A superblock belongs to the user namespace of whoever makes it, and copies up with his credentials: an overlay of a rootless
  container made by root of the host would give its writers the host's rights in the upper directory.
* setns(CLONE_NEWUSER) wants a process with one thread, and a fork of one with several may use next to nothing; so this runs
  `python -m watchd.overlay.delegate`, which imports all it needs before it enters.
* Descriptors travel by SCM_RIGHTS; the detached mount lives on with the one that arrives.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec

import watchd
from watchd.errors import DeadlineError, MountError, RefusedError, WatchdError
from watchd.kernel.namespaces import enter_for_good
from watchd.overlay.build import Made, Recipe, make
from watchd.overlay.model import View

_TIMEOUT_S = 10.0
_ANSWER_BYTES = 65536


class _Order(msgspec.Struct):
    what: Recipe
    view: View


class _Answer(msgspec.Struct):
    aside: bytes = b""
    refused: str = ""


def make_in_user_namespace(what: Recipe, view: View) -> Made:
    """`make` in the view's user and mount namespace.

    Raises RefusedError, MountError if the namespaces cannot be entered, DeadlineError.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno())]
            environment = os.environ | {"PYTHONPATH": str(Path(watchd.__file__).parents[1])}
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()], env=environment, cwd="/"
            )
        try:
            child.communicate(msgspec.json.encode(_Order(what, view)), timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            raise DeadlineError(f"the layers in process {view.pid} do not answer within {_TIMEOUT_S:g} s") from None
        data, descriptors, _, _ = socket.recv_fds(ours, _ANSWER_BYTES, 1)
    if not data:
        raise MountError(f"the process that was to mount for process {view.pid} died ({child.returncode})")
    answer = msgspec.json.decode(data, type=_Answer)
    if answer.refused:
        raise RefusedError(answer.refused)
    os.set_inheritable(descriptors[0], False)
    return Made(descriptors[0], answer.aside)


def _main(answer_to: socket.socket) -> None:
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=_Order)
    try:
        enter_for_good(order.view.pid, order.view.namespace)
        made = make(order.what)
    except WatchdError as error:
        answer_to.send(msgspec.json.encode(_Answer(refused=str(error))))
        return
    socket.send_fds(answer_to, [msgspec.json.encode(_Answer(aside=made.aside))], [made.mount])


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])))
