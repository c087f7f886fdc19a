"""What happened in directories that were not where they should be, and the barriers that wait for it.

Facts
* A name is looked at later than its event was read. If a directory above it is renamed in between, nothing is found under the
  old path, or a namesake is; the rename tells of that directory only, not of the names in it. So these are held until the
  rename was read and followed.
* A rename can be seen a moment before its event is queued, and it may be followed by the next one. So a directory may have to
  be looked for more than once.
"""

from __future__ import annotations

from collections.abc import Mapping

from watchd.wire.inotify import IN_MOVED_TO, Events, Key

TRIES_MAX = 16
HELD_MAX = 20_000
"""A directory that was looked for so often in vain, or more names than that, count as lost."""


class Held:
    """Names and arrivals by the watch descriptor of their directory."""

    __slots__ = ("_arrivals", "_barriers", "_before", "_names", "_renames", "_tries")

    def __init__(self) -> None:
        self._tries: dict[int, int] = {}
        self._before: dict[int, int] = {}
        self._names: dict[int, dict[bytes, int]] = {}
        self._renames: dict[Key, Key] = {}
        self._arrivals: dict[Key, int] = {}
        self._barriers: list[tuple[tuple[bytes, ...], set[int]]] = []

    def __bool__(self) -> bool:
        return bool(self._tries)

    def __contains__(self, wd: int) -> bool:
        return wd in self._tries

    @property
    def is_in_vain(self) -> bool:
        """Whether there is no hope to look at all of it."""
        return max(self._tries.values(), default=0) >= TRIES_MAX or sum(map(len, self._names.values())) > HELD_MAX

    def take(self, events: Events) -> dict[Key, int]:
        """Hand out all that is held: names among these events, arrivals as the result."""
        for wd, names in self._names.items():
            touched = events.names.setdefault(wd, {})
            for name, mask in names.items():
                old = self._renames.get((wd, name))
                if old is not None and not touched.get(name, 0) & IN_MOVED_TO:
                    events.renames[wd, name] = old
                touched[name] = touched.get(name, 0) | mask
        arrivals = self._arrivals
        self._before, self._tries = self._tries, {}
        self._names, self._renames, self._arrivals = {}, {}, {}
        return arrivals

    def hold_arrival(self, key: Key, arrival: int) -> None:
        """A directory that appeared is to be settled later."""
        self._hold(key[0])
        self._arrivals[key] = arrival

    def hold_names(self, wd: int, names: dict[bytes, int], renames: Mapping[Key, Key]) -> None:
        """These names in a directory are to be looked at later."""
        self._hold(wd)
        self._names[wd] = names
        self._renames.update({key: renames[key] for name in names if (key := (wd, name)) in renames})

    def release(self, barriers: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Those of these and of earlier barriers before which nothing is held any more."""
        self._barriers.append((barriers, set(self._tries)))
        released: tuple[bytes, ...] = ()
        for tokens, waits_for in self._barriers:
            waits_for.intersection_update(self._tries)
            if not waits_for:
                released += tokens
        self._barriers = [(tokens, waits_for) for tokens, waits_for in self._barriers if tokens and waits_for]
        return released

    def expect_nothing(self) -> None:
        """No event is queued that could help: the next try is the last."""
        self._tries = dict.fromkeys(self._tries, TRIES_MAX)

    def clear(self) -> None:
        """All of it counts as lost."""
        self._tries.clear()
        self._names.clear()
        self._renames.clear()
        self._arrivals.clear()

    def _hold(self, wd: int) -> None:
        self._tries[wd] = self._before.get(wd, 0) + 1
