"""The thread that keeps the index: it takes in what was committed, and reads the journal where that does not follow.

Commits are handed over in memory and folded at once; what comes of them is written about once a second, in one
transaction. Whatever does not follow directly on what is in the index is read from the journal instead: at the start,
when more came than may wait, and when the journal was opened again. So there is one rule for all of them: how far the
index has read is compared with where a commit begins.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from watchd.errors import JournalError
from watchd.journal.directories import Directories
from watchd.journal.disk import REAL, Disk
from watchd.journal.format import Checkpoint
from watchd.journal.index import IndexWriter, Mark, is_damage, is_valid, remove
from watchd.journal.reader import Follower, Position
from watchd.journal.segments import Segment
from watchd.journal.state import JournalState
from watchd.journal.writer import Commit
from watchd.records import Change

log = logging.getLogger(__name__)

INTERVAL_S: Final = 1.0
"""Between two transactions."""

WAITING_MAX: Final = 200_000
"""More entries than so many do not wait in memory; they are read from the journal."""

TAKE_IN: Final = 4096
"""So many entries are folded together: one line for each directory takes less memory than the entries do."""

DIRECTORIES_MAX: Final = 8192
"""With so many directories in memory a transaction comes sooner."""

STEP: Final = 200_000
"""So many records that are read from the journal make a transaction."""

STRIDE_BYTES: Final = 1 << 20
"""The index knows a place to begin reading at about every so many bytes of a segment."""

CLOSE_S: Final = 1.0
"""So long it goes on taking in what is left when it is told to end."""

RETRY_S: Final = 10.0
"""An index that could not be written is tried again after this."""


class Indexer(threading.Thread):
    """Keeps the index of a state directory. Everything may be called in any thread."""

    def __init__(self, state_directory: Path, journal: Path, *, disk: Disk = REAL) -> None:
        super().__init__(name="the index", daemon=True)
        self._state_directory, self._journal, self._disk = state_directory, journal, disk
        self._commits: deque[Commit] = deque()
        self._waiting = 0
        self._dropped = True
        """More may be in the journal than in `_commits`; so it is at the start."""
        self._prune_before = 0
        self._closing = 0.0
        """When `close` was called; CLOCK_MONOTONIC, seconds."""
        self._wake = threading.Condition()
        self.read_upto = 0
        """The last record that the index on disk has taken in: what is before is not needed for it any more."""

    def committed(self, commit: Commit) -> None:
        """Takes note of what became durable. Never blocks for long."""
        with self._wake:
            self._commits.append(commit)
            self._waiting += len(commit.entries)
            if self._waiting > WAITING_MAX:
                self._drop()
            self._wake.notify()

    async def read_on(self, upto: int) -> None:
        """Nothing to do: it is never far behind, unless it cannot be written."""

    def gone_before(self, first_seq: int) -> None:
        """Records before this one are not there any more: soon drops directories whose last change is older."""
        with self._wake:
            self._prune_before = first_seq
            self._wake.notify()

    def close(self) -> None:
        """Takes in what is left, if that does not take long, and ends the thread."""
        with self._wake:
            self._closing = time.monotonic()
            self._wake.notify()
        if self.is_alive():
            self.join()

    def is_late(self) -> bool:
        """Whether it should have ended by now; what was not taken in is when it starts again."""
        return bool(self._closing) and time.monotonic() - self._closing > CLOSE_S

    def run(self) -> None:
        """The thread. What goes wrong with the index is told, and tried again; readers do without it meanwhile."""
        told = ""
        while (problem := self._try()) and not (problem == told and self._rest()):
            if problem != told:
                log.warning("%s; `watchd changes` reads the journal meanwhile", problem)
            with self._wake:
                self._drop()
            told = problem

    def _try(self) -> str:
        """Keeps the index until it is time to end, or until something goes wrong; returns what."""
        try:
            with closing(IndexWriter(self._state_directory)) as index:
                self._keep(index)
        except sqlite3.Error as error:
            if is_damage(error):
                with suppress(OSError):  # then it is tried again, and told once
                    remove(self._state_directory)
            return f"cannot keep the index of the journal: {error}"
        except (JournalError, OSError) as error:
            return f"cannot read the journal for its index: {error}"
        return ""

    def _rest(self) -> bool:
        """Waits a while; whether it is time to end."""
        with self._wake:
            return self._wake.wait_for(self._is_closing, RETRY_S)

    def _drop(self) -> None:
        """Leaves what waits to be read from the journal."""
        self._commits.clear()
        self._waiting, self._dropped = 0, True

    def _is_closing(self) -> bool:
        return bool(self._closing)

    def _keep(self, index: IndexWriter) -> None:
        fold, due = _Fold(index, self._journal, disk=self._disk, is_late=self.is_late), 0.0
        while True:
            commits, dropped, prune_before, closing = self._take(may_wait=fold.is_flushed)
            for commit in commits:
                fold.take_in(commit)
            if dropped:
                fold.read()
            if closing or dropped or prune_before or fold.is_full or time.monotonic() >= due:
                fold.flush()
                self.read_upto, due = fold.position.seq, time.monotonic() + INTERVAL_S
            if prune_before:
                index.prune(prune_before)
            if closing:
                return
            with self._wake:
                pause_s = max(due - time.monotonic(), 0.0)
                self._wake.wait_for(lambda: self._is_closing() or self._waiting >= TAKE_IN, pause_s)

    def _take(self, *, may_wait: bool) -> tuple[list[Commit], bool, int, bool]:
        """Waits for something to do, if it may, and what that is."""
        with self._wake:
            if may_wait:
                self._wake.wait_for(lambda: self._commits or self._dropped or self._prune_before or self._is_closing())
            taken = list(self._commits), self._dropped, self._prune_before, self._is_closing()
            self._commits.clear()
            self._waiting, self._dropped, self._prune_before = 0, False, 0
            return taken


class _Fold:
    """What was taken in since the last transaction."""

    def __init__(
        self, index: IndexWriter, journal: Path, *, disk: Disk = REAL, is_late: Callable[[], bool] = lambda: False
    ) -> None:
        self._index, self._journal, self._disk, self._is_late = index, journal, disk, is_late
        self._directories = Directories()
        mark = index.mark()
        if mark is not None and is_valid(mark, journal, disk=disk):
            self._begin(mark.epoch, mark.position, JournalState(mark.checkpoint))
        else:
            self._start_over()

    def _begin(self, epoch: str, position: Position, state: JournalState) -> None:
        self._epoch, self.position, self._state = epoch, position, state
        self._flushed = self._noted = position
        self._positions: list[Position] = []

    def _start_over(self) -> None:
        """From the oldest record that there is."""
        with Follower(self._journal, disk=self._disk) as follower:
            epoch, position = follower.epoch, follower.position
        self._directories = Directories()
        self._index.clear()
        self._begin(epoch, position, JournalState())

    @property
    def is_flushed(self) -> bool:
        """Whether all of it is in the index."""
        return self.position == self._flushed

    @property
    def is_full(self) -> bool:
        """Whether there is so much that it is time to `flush`."""
        return len(self._directories) > DIRECTORIES_MAX

    def take_in(self, commit: Commit) -> None:
        """A commit, from memory if it follows on what is known."""
        if commit.epoch != self._epoch:
            self._start_over()
        if (self.position.segment, self.position.offset) >= (commit.end.segment, commit.end.offset):
            return
        if self.position != commit.begin:
            self.read()
            return
        seq = commit.begin.seq
        for entry in commit.entries:
            if type(entry) is Checkpoint:
                continue
            seq += 1
            if type(entry) is Change:
                self._directories.apply(seq, entry)
        self._state.apply_all(commit.entries, commit.begin.seq)
        self._advance(commit.end)

    def _advance(self, position: Position) -> None:
        self.position = position
        noted = self._noted
        if position.segment != noted.segment or position.offset - noted.offset >= STRIDE_BYTES:
            self._positions.append(position)
            self._noted = position

    def read(self) -> None:
        """What the journal holds by now, unless that takes too long. Raises JournalError."""
        read = 0
        with Follower(self._journal, self.position, disk=self._disk) as follower:
            while not self._is_late() and (chunk := follower.poll_frames()).frames:
                for seq, entry in follower.decode(chunk, chunk.frames):
                    if isinstance(entry, Change):
                        self._directories.apply(seq, entry)
                    self._state.apply(entry, seq)
                self._advance(follower.position)
                read += len(chunk.frames)
                if read >= STEP:
                    read = 0
                    self.flush()

    def flush(self) -> None:
        """Puts it into the index."""
        if self.is_flushed:
            return
        with Segment(self._journal, self.position.segment, disk=self._disk) as segment:
            crc = segment.header.crc
        mark = Mark(self._epoch, self.position, crc, self._state.checkpoint())
        self._index.write(self._directories.layers(), mark, self._positions)
        self._directories, self._positions = Directories(), []
        self._flushed = self.position
