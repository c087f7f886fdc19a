"""Processes that write records for ever, and tell what was acknowledged. They are there to be killed.

    python -m tests.crash.writing_process

For each line `DIRECTORY OPERATIONS SIZE_LIMIT` on stdin it forks a writer and tells what that says, and `ended` when it has.
OPERATIONS: it is killed at that file operation; -1: never. With a SIZE_LIMIT other than 0 files cannot grow beyond it, as on a
full disk: then the writer tells the error, how the journal bears it, and what becomes of it when there is room again.
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import threading
from pathlib import Path

from tests.crash.mortal import arm
from tests.unit.journal.support import changes
from watchd.errors import JournalError
from watchd.journal.format import LayerMark
from watchd.journal.writer import Journal, JournalSettings

SMALL = JournalSettings(max_delay_ns=0, segment_size_bytes=4096)
LARGE = JournalSettings(max_delay_ns=0)


def tell(*words: object) -> None:
    """At once, and whole whenever the process is killed."""
    os.write(1, " ".join(map(str, words)).encode() + b"\n")


async def write(directory: Path, limit: int) -> None:
    """Record n is a change with the time n."""
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    journal = await Journal.open(directory, LARGE if limit else SMALL)
    tell("acknowledged", journal.durable_seq)
    while not journal.failure:
        last = journal.append(changes(1 + journal.last_seq % 9, journal.last_seq + 1))
        if last % 4 == 0:
            journal.note({"base": LayerMark(b"/", last)})
        try:
            await journal.flush(last)
            tell("acknowledged", last)
        except JournalError as error:
            tell("failed", error)
    assert journal.append(changes(5)) == journal.durable_seq
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await journal.reopen()
    tell("acknowledged", journal.durable_seq)
    last = journal.append(changes(5, journal.last_seq + 1))
    await journal.close()
    tell("acknowledged", last)


def main() -> None:
    """Fork a writer for each line."""
    for line in sys.stdin:
        assert threading.active_count() == 1
        directory, operations, limit = line.split()
        child = os.fork()
        if not child:
            tell("process", os.getpid())
            if int(operations) >= 0:
                arm(int(operations))
            asyncio.run(write(Path(directory), int(limit)))
            os._exit(0)
        os.waitpid(child, 0)
        tell("ended")


if __name__ == "__main__":
    main()
