"""Fanotify groups that outlive the daemon, in the service manager's file descriptor store.

Facts (systemd 252)
* FDSTORE=1 with a descriptor has the manager keep a copy of it, up to FileDescriptorStoreMax=, and pass it to every later
  process of the unit. So a fanotify group lives on with its marks and its queue. The store is kept over `systemctl restart`
  and the manager's own restarts of the unit, also while the unit waits for one; with `systemctl stop`, a failure that is not
  mended by a restart and a reboot it is gone.
* The manager looks with epoll whether what it keeps has hung up, and each event of a fanotify group wakes it for that: 12 000
  times for 20 000 files. FDPOLL=0 has it not look.
* Nothing answers FDSTORE=1, and a message is lost if the manager's socket is full.

What this means for us: a new process goes on where the one before was, with what that one had read and not recorded, which
the ledger beside the group holds (`watchd.service.ledger`). If that is not all, or if anything else differs, its layers are
scanned as after any other restart.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from watchd.kernel.fanotify import FAN_MARK_FILESYSTEM, FAN_MARK_FLUSH, fanotify_mark
from watchd.service.ledger import GroupLedger, Purpose
from watchd.service.notify import notify
from watchd.sources.base import WatchedLayer

log = logging.getLogger(__name__)

_NAME = re.compile(r"watchd-(group|ledger)-([0-9]{1,9})")


@dataclass(eq=False)
class KeptGroup:
    """A group that is in the store, or will be when it has a layer."""

    number: int
    ledger: GroupLedger
    descriptor: int | None
    """Of the group, if it was inherited; belongs to the source that it is given to."""
    is_stored: bool
    is_resumed: bool = False
    """Since it was claimed and until it is read on."""
    unrecorded: Sequence[bytes] = ()
    """What was read from it before, and is to be decoded again."""


class FdStore:
    """The groups of this daemon that the manager keeps, or is going to. Lives in the event loop's thread."""

    def __init__(self, inherited: dict[str, list[int]], *, epoch: str, last_seq: int, is_there: bool) -> None:
        """Takes what is ours from the descriptors that were inherited. `epoch` and `last_seq`: of the journal as it was found.
        `is_there`: whether there is a manager to keep anything."""
        self._epoch, self._last_seq, self._is_there = epoch, last_seq, is_there
        numbers = {int(match[2]) for name in inherited if (match := _NAME.fullmatch(name))}
        self._unclaimed = [
            kept
            for number in sorted(numbers)
            if (kept := _take(number, inherited.pop(_group(number), []), inherited.pop(_ledger(number), [])))
        ]
        self._kept = list(self._unclaimed)
        self._numbers = itertools.count(max(numbers, default=0) + 1)

    def claim(self, purpose: Purpose) -> KeptGroup | None:
        """A group for this purpose that the process before this one has left, to be read on."""
        for kept in self._unclaimed:
            if kept.ledger.purpose == purpose:
                self._unclaimed.remove(kept)
                kept.is_resumed = True
                unrecorded = kept.ledger.go_on(self._epoch, self._last_seq)
                if unrecorded is None:
                    log.warning("the journal may lack what was read last before the restart")
                    kept.ledger.begin_anew(self._epoch)
                kept.unrecorded = unrecorded or ()
                return kept
        return None

    def create(self, purpose: Purpose) -> KeptGroup | None:
        """For a group that is new; None if nobody keeps anything."""
        if not self._is_there:
            return None
        try:
            ledger = GroupLedger.create(purpose, self._epoch)
        except OSError as error:  # out of descriptors, for instance
            log.warning("no group is kept over a restart: %s", error)
            return None
        kept = KeptGroup(next(self._numbers), ledger, None, is_stored=False)
        self._kept.append(kept)
        return kept

    def enter(self, kept: KeptGroup, group: int, layer: WatchedLayer) -> None:
        """The group marks this layer, and the journal tells whatever was missed of it before: keep that over a restart."""
        kept.ledger.enter(layer)
        if not kept.is_stored:
            kept.is_stored = True
            notify(FDSTORE=1, FDNAME=_group(kept.number), FDPOLL=0, descriptors=[group])
            notify(FDSTORE=1, FDNAME=_ledger(kept.number), FDPOLL=0, descriptors=[kept.ledger.descriptor])

    def discard(self, kept: KeptGroup, group: int) -> None:
        """Nobody is going to read this group any more. Without marks it hears nothing, should the manager not hear us."""
        self._kept.remove(kept)
        with contextlib.suppress(OSError):
            for scope in (0, FAN_MARK_FILESYSTEM):
                fanotify_mark(group, FAN_MARK_FLUSH | scope, 0)
        kept.ledger.close()
        if kept.is_stored:
            _remove(kept.number)

    def discard_unclaimed(self) -> None:
        """All layers that there are have found their group: nobody needs the others."""
        for kept in self._unclaimed:
            self.give_up(kept)
        self._unclaimed.clear()

    def give_up(self, kept: KeptGroup) -> None:
        """No source takes over this group, which was inherited."""
        assert kept.descriptor is not None
        self.discard(kept, kept.descriptor)
        os.close(kept.descriptor)

    def journal_lost(self) -> None:
        """What is read from now on goes nowhere, and no record says so yet."""
        for kept in self._kept:
            kept.ledger.keep(())

    def journal_back(self, epoch: str) -> None:
        """The journal, or another one, is written again, and the layers are entered when it says what is missing."""
        self._epoch = epoch
        for kept in self._kept:
            kept.ledger.set_epoch(epoch)

    def committed(self, durable_seq: int) -> None:
        """The journal holds all records up to this one."""
        for kept in self._kept:
            kept.ledger.committed(durable_seq)

    def close(self) -> None:
        """The end of this process; the manager keeps what it has."""
        for kept in self._kept:
            kept.ledger.close()
        for kept in self._unclaimed:
            assert kept.descriptor is not None
            os.close(kept.descriptor)


def _group(number: int) -> str:
    return f"watchd-group-{number}"


def _ledger(number: int) -> str:
    return f"watchd-ledger-{number}"


def _remove(number: int) -> None:
    for name in (_group(number), _ledger(number)):
        notify(FDSTOREREMOVE=1, FDNAME=name)


def _take(number: int, groups: list[int], ledgers: list[int]) -> KeptGroup | None:
    """A group with its ledger; None, and both are given up, if that is not what the descriptors are."""
    with contextlib.suppress(OSError, ValueError):
        [descriptor], [ledger] = groups, ledgers
        if os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:[fanotify]":
            opened = GroupLedger(ledger)
            if opened.purpose is not None:
                return KeptGroup(number, opened, descriptor, is_stored=True)
            opened.close()
            ledgers = []
    log.warning("the file descriptor store holds a group that cannot be read: it is given up")
    for descriptor in (*groups, *ledgers):
        os.close(descriptor)
    _remove(number)
    return None
