"""A process that writes records for ever, and tells on stdout what was acknowledged. It is there to be killed.

    python -m tests.crash.writing_process DIRECTORY [FILE_SIZE_LIMIT]

With a limit, files cannot grow beyond it, as on a full disk: then it prints the error and how the journal bears it.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from pathlib import Path

from tests.unit.journal.support import changes
from watchd.errors import JournalError
from watchd.journal.writer import Journal, JournalSettings

SETTINGS = JournalSettings(max_delay_ns=0, segment_size_bytes=4096)


async def main(directory: Path, limit: int | None) -> None:
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    journal = await Journal.open(directory, SETTINGS if not limit else JournalSettings(max_delay_ns=0))
    print("acknowledged", journal.durable_seq, flush=True)
    while True:
        last = journal.append(changes(1 + journal.last_seq % 9))
        try:
            await journal.flush(last)
        except JournalError as error:
            print("failed", error, flush=True)
            break
        print("acknowledged", last, flush=True)
    assert journal.failed.done()
    assert journal.append(changes(5)) == last + 5
    try:
        await journal.close()
    except JournalError:
        print("closed", flush=True)


asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None))
