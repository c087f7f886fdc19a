"""What lies beside a fanotify group that outlives the daemon: what it is, and what was read from it and is not recorded yet.

Facts
* What is stored into a mapped memfd is there after SIGKILL, in the order in which it was stored, and so is what read(2) was
  putting there: a system call that does not wait goes on to its end. Keeping count of a reading takes 2 us.
* A memfd with F_SEAL_SHRINK cannot become shorter than its mapping, so nothing that others do to it raises SIGBUS.

What this means for us: every reading of the queue gets a number, and its bytes stay here until the journal has committed all
that came of them; what a dead process had read and not recorded is decoded again by the next one. If that is more than fits
it cannot be known, and the layers are scanned. A layer stands in the ledger only while the journal tells whatever was missed of
it before: by its mark, and by a desync that is open.

Layout, in native 64 bit integers: the words below, then the content in MessagePack; at SLOTS_AT a ring of SLOTS times number,
start, length and last record of a reading (0 if not all that comes of it was given to the journal); at DATA_AT a ring of bytes,
in which no reading is torn.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from watchd.kernel.files import FileHandle
from watchd.sources.base import Ledger, WatchedLayer
from watchd.wire.fanotify import length_of

FORMAT = 0x7761746368640001
"""`watchd` and a number, the ledger's first word. One with another is not taken over."""

SLOTS_AT = 1 << 20
"""Enough for 200 layers with the longest paths. With more none is remembered."""
SLOTS = 1024
DATA_AT = SLOTS_AT + (1 << 16)
DATA_BYTES = 4 << 20
LEDGER_BYTES = DATA_AT + DATA_BYTES
"""Takes memory only where it was written."""

_words = struct.Struct("=9Q")
_FORMAT, _LENGTH, _BUSY, _SIZE, _NUMBER, _READ, _DONE, _UPTO, _REPEATED = range(9)
"""Length of the content, 0 while it is written; while read(2) is being called where it puts what it reads (1: elsewhere), how
much that may be and which reading it is, else 0; numbers of the last reading, and of the last that the journal holds with all
before; the last record that came of that; the last reading that was decoded again."""
_slot = struct.Struct("=4Q")

Identity = tuple[bytes, FileHandle | None]
"""What makes a layer the same: its path, and the handle of its root directory."""


class Purpose(msgspec.Struct, frozen=True, array_like=True):
    """What a group was made for. One with another purpose is of no use."""

    device: int
    """st_dev of the layers."""
    flags: int
    """As given to fanotify_init(2)."""
    mask: int
    """The events that its filesystem mark asks for."""


class Content(msgspec.Struct, frozen=True, array_like=True):
    """What a ledger says beside the counts. Valid for one journal."""

    epoch: str
    purpose: Purpose
    layers: dict[str, Identity]


@dataclass(eq=False, slots=True)
class Receipt:
    """Readings that the journal does not hold yet."""

    first: int
    last: int
    upto: int
    """The last record that came of them so far."""
    scans: int
    """Directories that came into a layer with them and are still being scanned."""


class GroupLedger(Ledger):
    """The ledger of one group. `read`, `nothing` and `told` belong to the thread that reads the group, all else to the
    event loop."""

    def __init__(self, descriptor: int) -> None:
        """Takes over the descriptor of a memfd of LEDGER_BYTES. Raises ValueError, OSError for another one."""
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, LEDGER_BYTES)
        self._view = memoryview(self._map)
        self._words = self._view[: _words.size].cast("Q")
        self._receipts: deque[Receipt] = deque()
        self._noted: deque[tuple[int, int, int]] = deque()
        """Number, start and end of the readings whose bytes are kept."""
        self._told = self._recorded = self._words[_DONE]
        self._content = self._load()

    @classmethod
    def create(cls, purpose: Purpose, epoch: str) -> GroupLedger:
        """An empty one. Raises OSError."""
        descriptor = os.memfd_create("watchd-ledger", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.truncate(descriptor, LEDGER_BYTES)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        ledger = cls(descriptor)
        ledger._words[_FORMAT] = FORMAT
        ledger._write(Content(epoch, purpose, {}))
        return ledger

    def close(self) -> None:
        """Let go of it; whoever else has it keeps it. A reading that is under way may still be told."""
        os.close(self.descriptor)

    # ---- readings ---------------------------------------------------------------------------------------------------

    def read(self, descriptor: int, size: int) -> bytes:
        words, number = self._words, self._words[_READ] + 1
        # With more than SLOTS its slot is that of a reading that is needed still.
        start = self._room(size) if number - words[_DONE] <= SLOTS else None
        try:
            if start is None:
                words[_SIZE], words[_NUMBER], words[_BUSY] = 0, number, 1
                data = os.read(descriptor, size)
            else:
                data = self._read_at(DATA_AT + start, number, descriptor, size)
            if data:
                if start is not None:
                    self._noted.append((number, start, start + len(data)))
                    _slot.pack_into(self._map, _slot_at(number), number, start, len(data), 0)
                elif number - words[_DONE] <= SLOTS:
                    _slot.pack_into(self._map, _slot_at(number), 0, 0, 0, 0)
                words[_READ] = number
        finally:
            words[_BUSY] = 0
        return data

    def _read_at(self, at: int, number: int, descriptor: int, size: int) -> bytes:
        """The kernel puts the events where they are kept, so there is no moment in which they are nowhere. How many they are
        can be seen among zeros."""
        self._map[at : at + size] = bytes(size)
        self._words[_SIZE], self._words[_NUMBER], self._words[_BUSY] = size, number, at
        length = os.readv(descriptor, [self._view[at : at + size]])
        return self._map[at : at + length]

    def nothing(self) -> None:
        self._words[_READ] = self._told
        while self._noted and self._noted[-1][0] > self._told:
            self._noted.pop()

    def told(self) -> int:
        """All that was read is told now; the number of the last reading."""
        self._told = self._words[_READ]
        return self._told

    def recorded(self, last: int, *, upto: int, scans: int) -> Receipt:
        """What came of the readings up to this one was given to the journal, up to a record, but for so many scans."""
        receipt = Receipt(self._recorded + 1, last, upto, scans + 1)
        self._recorded = last
        self._receipts.append(receipt)
        self.scanned(receipt, upto)
        return receipt

    def scanned(self, receipt: Receipt, upto: int) -> None:
        """One more of the directories that came with a reading was looked through."""
        receipt.scans, receipt.upto = receipt.scans - 1, upto
        if not receipt.scans:
            for number in range(receipt.first, receipt.last + 1):
                self._recorded_upto(number, upto)

    def committed(self, durable: int) -> None:
        """The journal holds all records up to this one."""
        while self._receipts and not self._receipts[0].scans and self._receipts[0].upto <= durable:
            receipt = self._receipts.popleft()
            self._words[_UPTO], self._words[_DONE] = receipt.upto, receipt.last

    def _recorded_upto(self, number: int, upto: int) -> None:
        found, start, length, _ = _slot.unpack_from(self._map, _slot_at(number))
        if found == number:
            _slot.pack_into(self._map, _slot_at(number), number, start, length, upto)

    def _room(self, length: int) -> int | None:
        """Where so many bytes may be put, if anywhere. The oldest reading's first byte is never reached from below, so that a
        full ring does not look empty."""
        noted, done = self._noted, self._words[_DONE]
        while noted and noted[0][0] <= done:
            noted.popleft()
        if not noted:
            return 0 if length <= DATA_BYTES else None
        oldest, end = noted[0][1], noted[-1][2]
        if end > oldest:
            if end + length <= DATA_BYTES:
                return end
            return 0 if length < oldest else None
        return end if end + length < oldest else None

    # ---- what it is -------------------------------------------------------------------------------------------------

    @property
    def purpose(self) -> Purpose | None:
        """None if it cannot be read."""
        return None if self._content is None else self._content.purpose

    def go_on(self, epoch: str, last_seq: int) -> list[bytes] | None:
        """Go on with what another process has left: what it had read and a journal that ends with this record does not hold.
        None if that is not known. It is given once: if that process died of it, the next one need not."""
        words = self._words
        if self._content is None or self._content.epoch != epoch or words[_UPTO] > last_seq:
            return None
        if words[_BUSY] and not self._finish_reading():
            return None
        unrecorded = []
        for number in range(words[_DONE] + 1, words[_READ] + 1):
            found, start, length, upto = _slot.unpack_from(self._map, _slot_at(number))
            if found != number or start + length > DATA_BYTES:
                return None
            if not 0 < upto <= last_seq:
                self._recorded_upto(number, 0)  # the number may soon be that of another record
                unrecorded.append(self._map[DATA_AT + start : DATA_AT + start + length])
            self._noted.append((number, start, start + length))
        if unrecorded and words[_REPEATED] == words[_READ]:
            return None
        words[_REPEATED] = words[_READ]
        if not unrecorded:
            self._all_done()
        return unrecorded

    def _finish_reading(self) -> bool:
        """The process before was killed in read(2): count what it has read, if that is known."""
        words, at = self._words, self._words[_BUSY]
        if at < DATA_AT or at + words[_SIZE] > LEDGER_BYTES:
            return False
        number, length = words[_NUMBER], length_of(self._view[at : at + words[_SIZE]])
        if length and words[_READ] < number:
            _slot.pack_into(self._map, _slot_at(number), number, at - DATA_AT, length, 0)
            words[_READ] = number
        words[_BUSY] = 0
        return True

    def begin_anew(self, epoch: str) -> None:
        """Nothing of what was known holds any more."""
        assert self._content is not None
        self._write(Content(epoch, self._content.purpose, {}))
        self._words[_UPTO] = self._words[_BUSY] = 0
        self._all_done()

    def _all_done(self) -> None:
        self._told = self._recorded = self._words[_DONE] = self._words[_READ]
        self._noted.clear()

    def set_epoch(self, epoch: str) -> None:
        """What is read from now on is recorded in this journal."""
        assert self._content is not None
        self._write(msgspec.structs.replace(self._content, epoch=epoch))

    def remembers(self, layer: WatchedLayer) -> bool:
        """Whether all that happened to a layer is in the journal, or still in the group's queue if that has its mark still."""
        return self._content is not None and self._content.layers.get(layer.name) == (layer.path, layer.root)

    def enter(self, layer: WatchedLayer) -> None:
        """The group marks the layer, and the journal tells whatever was missed of it before."""
        if not self.remembers(layer):
            assert self._content is not None
            self._change_layers({**self._content.layers, layer.name: (layer.path, layer.root)})

    def leave(self, name: str) -> None:
        """What happens to this layer from now on is not heard."""
        if self._content is not None and name in self._content.layers:
            self.keep(self._content.layers.keys() - {name})

    def keep(self, names: Collection[str]) -> None:
        """Forget all layers but these."""
        assert self._content is not None
        layers = {name: identity for name, identity in self._content.layers.items() if name in names}
        if len(layers) < len(self._content.layers):
            self._change_layers(layers)

    def _change_layers(self, layers: dict[str, Identity]) -> None:
        assert self._content is not None
        self._write(msgspec.structs.replace(self._content, layers=layers))

    def _load(self) -> Content | None:
        start, length = _words.size, self._words[_LENGTH]
        if self._words[_FORMAT] != FORMAT or not length or length > SLOTS_AT - start:
            return None
        try:
            return msgspec.msgpack.decode(self._map[start : start + length], type=Content)
        except msgspec.DecodeError:
            return None

    def _write(self, content: Content) -> None:
        """Killed at any moment, it either says all of this or cannot be read."""
        self._content = content
        encoded = msgspec.msgpack.encode(content)
        self._words[_LENGTH] = 0
        if len(encoded) <= SLOTS_AT - _words.size:
            self._map[_words.size : _words.size + len(encoded)] = encoded
            self._words[_LENGTH] = len(encoded)


def _slot_at(number: int) -> int:
    return SLOTS_AT + number % SLOTS * _slot.size
