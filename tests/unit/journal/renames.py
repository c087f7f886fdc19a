"""A tree in memory that is changed at random, and what a source would tell of it: written without a line of the folding."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from watchd.records import STATUS, Change, Kind

FILE, DIRECTORY = 0o100644, 0o040755
NAMES = (b"a", b"b", b"c", b"d", b"e")

Tree = dict[bytes, tuple[int, int, int]]
"""Path -> inode, mode and size."""


@dataclass(eq=False)
class Thing:
    """A file or a directory, for as long as it exists and beyond."""

    inode: int
    mode: int
    parent: Thing | None = None
    name: bytes = b""
    size: int = 0
    is_there: bool = True
    children: dict[bytes, Thing] = field(default_factory=dict)

    @property
    def is_dir(self) -> bool:
        return self.mode == DIRECTORY

    @property
    def path(self) -> bytes:
        """Where it is, or was last, as things are named now."""
        above = self.parent.path if self.parent is not None else b""
        return above + b"/" + self.name if above else self.name

    def is_in(self, directory: Thing) -> bool:
        return self is directory or (self.parent is not None and self.parent.is_in(directory))


Name = tuple[Thing, bytes]
"""A name in a directory, wherever that is."""


class Renames:
    """The tree, and what happened to its names since somebody asked."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._root = Thing(1, DIRECTORY)
        self._inodes = 1
        self._touched: dict[Name, tuple[int, bool]] = {}
        self._origins: dict[Name, Name] = {}
        self._time = 0

    def things(self) -> list[Thing]:
        """All but the root, directories before what is in them."""
        found = [self._root]
        for thing in found:
            found += thing.children.values()
        return found[1:]

    def tree(self) -> Tree:
        """What is where."""
        return {thing.path: (thing.inode, thing.mode, thing.size) for thing in self.things()}

    def churn(self, steps: int) -> None:
        """Do so many things; most of them move directories about."""
        for _ in range(steps):
            action = self._random.choice([self._make, self._make, self._make, self._write, self._remove])
            self._random.choice([action, self._rename, self._exchange])()

    def tell(self) -> list[Change]:
        """What a source makes of it: every name looked at once, in any order, each by where its directory is now."""
        self._time += 1
        names = list(self._touched.items())
        if self._random.random() < 0.5:
            self._random.shuffle(names)
        changes = [self._look(*name, kinds, was_dir=was_dir) for name, (kinds, was_dir) in names]
        self._touched.clear()
        self._origins.clear()
        return changes

    def _look(self, directory: Thing, name: bytes, kinds: int, *, was_dir: bool) -> Change:
        here = _in_place_of(directory)
        found = here.children.get(name) if here is not None else None
        path = Thing(0, 0, directory, name).path
        origin = self._origins.get((directory, name))
        from_path = Thing(0, 0, *origin).path if origin is not None else None
        if found is None:
            return Change(self._time, "base", path, kinds, False, was_dir, from_path)
        status = STATUS.pack(found.mode, 0, 0, found.size, 1, 1)
        return Change(self._time, "base", path, kinds, True, found.is_dir, from_path, found.inode, status=status)

    def _touch(self, name: Name, kind: Kind, thing: Thing) -> None:
        kinds, was_dir = self._touched.get(name, (0, False))
        self._touched[name] = kinds | int(kind), was_dir or thing.is_dir

    def _new(self) -> Name:
        return self._random.choice(
            [self._root, *(thing for thing in self.things() if thing.is_dir)]
        ), self._random.choice(NAMES)

    def _make(self) -> None:
        parent, name = self._new()
        if name not in parent.children:
            self._inodes += 1
            mode = self._random.choice([FILE, DIRECTORY, DIRECTORY])
            thing = parent.children[name] = Thing(self._inodes, mode, parent, name)
            self._touch((parent, name), Kind.CREATE, thing)

    def _write(self) -> None:
        for thing in self._some(1):
            thing.size += 1
            assert thing.parent is not None
            self._touch((thing.parent, thing.name), Kind.ATTRIB if thing.is_dir else Kind.MODIFY, thing)

    def _remove(self) -> None:
        for top in self._some(1):
            for thing in reversed([thing for thing in self.things() if thing.is_in(top)]):
                self._take(thing, Kind.DELETE)
                thing.is_there = False

    def _rename(self) -> None:
        for thing in self._some(1):
            parent, name = self._new()
            there = parent.children.get(name)
            is_in_the_way = there is not None and (there.is_dir != thing.is_dir or bool(there.children))
            if there is thing or is_in_the_way or parent.is_in(thing):
                continue
            if there is not None:
                there.is_there = False
            self._put(thing, (parent, name), self._take(thing, Kind.RENAME))

    def _exchange(self) -> None:
        for one, other in zip(*[iter(self._some(2))] * 2, strict=False):
            if not one.is_in(other) and not other.is_in(one):
                here, there = self._take(one, Kind.RENAME), self._take(other, Kind.RENAME)
                self._put(one, there, here)
                self._put(other, here, there)

    def _take(self, thing: Thing, kind: Kind) -> Name:
        assert thing.parent is not None
        name = thing.parent, thing.name
        del thing.parent.children[thing.name]
        self._touch(name, kind, thing)
        return name

    def _put(self, thing: Thing, name: Name, origin: Name) -> None:
        thing.parent, thing.name = name
        thing.parent.children[thing.name] = thing
        self._touch(name, Kind.RENAME, thing)
        self._origins[name] = origin

    def _some(self, count: int) -> list[Thing]:
        things = self.things()
        return self._random.sample(things, count) if len(things) >= count else []


def _in_place_of(directory: Thing) -> Thing | None:
    """The directory; the one that is where it was if it is gone."""
    if directory.is_there or directory.parent is None:
        return directory
    parent = _in_place_of(directory.parent)
    there = parent.children.get(directory.name) if parent is not None else None
    return there if there is not None and there.is_dir else None
