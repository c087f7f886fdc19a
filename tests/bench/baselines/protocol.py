"""How a baseline and the bench talk: one word when it watches, one JSON object when it has read everything.

The load calls file i `str(i)` and renames it to `str(files + i)`, so a reader can tick off a name by using it
as an index, which costs it about 0.1 us. The end of the load is a file whose name starts with `END`; the bench
makes such files until the reader answers, because a queue that overflowed loses the first of them.
"""

from __future__ import annotations

import json
import os
import sys

END = b"end-"
READY = "ready"


class Tally:
    """What a reader saw of the load."""

    def __init__(self, *, files: int) -> None:
        self.seen = bytearray(2 * files)
        self.records = 0
        self.overflows = 0


def _say(line: str) -> None:
    """Write a line in one piece even where Python's output is unbuffered: the bench must never read half of one."""
    os.write(sys.stdout.fileno(), line.encode() + b"\n")


def say_ready() -> None:
    """Tell the bench that every change from now on is watched."""
    _say(READY)


def report(tally: Tally) -> None:
    """Answer with the totals, and stay alive until stdin closes, so that the memory can be measured."""
    answer = {"records": tally.records, "overflows": tally.overflows, "lost": tally.seen.count(0)}
    _say(json.dumps(answer))
    sys.stdin.read()
