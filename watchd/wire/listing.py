"""What is in a directory, as bytes that can be compared in one go. Pure.

A listing is sorted by name. `names` are joined by NUL bytes, which no name contains; `states` are 44 bytes for each name: its
inode number (u64, little endian) and its status (`watchd.records.STATUS`); `children` is a number (u64, little endian) for each
name that is a directory, which stands for its own listing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from watchd.records import STATUS, Change, Status

STATE_BYTES = 8 + STATUS.size
CHILD_BYTES = 8

_INODE = struct.Struct("<Q")
_INODE_BYTES = 8
_TYPE_AT = 9
"""The second byte of the mode; its upper half is the type."""
_DIRECTORY = 0x4
_UNKNOWN = (0, 0, 0, 0, 0)


class Listing(NamedTuple):
    """A directory's names, with what they are."""

    names: bytes = b""
    states: bytes = b""
    children: bytes = b""

    def entries(self) -> dict[bytes, bytes]:
        """Name -> state."""
        states = self.states
        return {
            name: states[at : at + STATE_BYTES]
            for name, at in zip(
                self.names.split(b"\0") if self.names else (), range(0, len(states), STATE_BYTES), strict=True
            )
        }

    def directories(self) -> dict[bytes, int]:
        """Name of a directory -> the number of its listing."""
        if not self.children:
            return {}
        names = (name for name, state in self.entries().items() if is_directory(state))
        return dict(zip(names, self.child_numbers(), strict=True))

    def child_numbers(self) -> tuple[int, ...]:
        """In the order of names."""
        return struct.unpack(f"<{len(self.children) // CHILD_BYTES}Q", self.children)

    def __len__(self) -> int:
        return len(self.states) // STATE_BYTES


def listing_of(entries: Mapping[bytes, bytes], children: Mapping[bytes, int]) -> Listing:
    """The listing with these entries (name -> state); `children` gives the number of each that is a directory."""
    names = sorted(entries)
    states = [entries[name] for name in names]
    numbers = [children[name] for name, state in zip(names, states, strict=True) if state[_TYPE_AT] >> 4 == _DIRECTORY]
    return Listing(b"\0".join(names), b"".join(states), pack_numbers(numbers))


def pack_numbers(numbers: Iterable[int]) -> bytes:
    """As they stand in `Listing.children`."""
    numbers = list(numbers)
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def is_directory(state: bytes) -> bool:
    """Whether this is the state of a directory."""
    return state[_TYPE_AT] >> 4 == _DIRECTORY


def same_object(state: bytes, other: bytes) -> bool:
    """Whether both have the inode number and the type in common."""
    return state[:_INODE_BYTES] == other[:_INODE_BYTES] and state[_TYPE_AT] >> 4 == other[_TYPE_AT] >> 4


def state_of(change: Change) -> bytes:
    """The state that a change tells of; with a status of nothing but the type where it was not looked at."""
    status = change.status
    if status is None or len(status) != STATUS.size:
        status = STATUS.pack(0o040000 if change.is_dir else 0, *_UNKNOWN)
    return _INODE.pack(change.inode or 0) + status


def unpack_state(state: bytes) -> tuple[int, Status]:
    """Inode number and status."""
    return _INODE.unpack_from(state)[0], Status(*STATUS.unpack_from(state, _INODE_BYTES))


def states_in(states: bytes) -> Iterator[bytes]:
    """One after the other."""
    return (states[at : at + STATE_BYTES] for at in range(0, len(states), STATE_BYTES))
