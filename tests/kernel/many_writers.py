"""A writer: random operations in its own directory of each layer, each noted when it is done. Run as a program.

    python -I -S many_writers.py SEED OPERATIONS NOTES COUNTER HOME…

A note is a line `HOME KIND PATH`, HOME the number of the directory, KIND the word of the contract, PATH in hex below HOME. No
name is used twice, so what is told of a path can only be of what was done to it once. COUNTER holds the number of operations
that are done.
"""

import os
import random
import sys

FILES_MAX, DIRECTORIES_MAX = 1000, 200
"""A small filesystem has room for so many."""


class Writer:
    def __init__(self, seed: int, notes: int, homes: list[bytes]) -> None:
        self.random = random.Random(seed)
        self.notes, self.homes = notes, homes
        self.files: list[tuple[int, bytes]] = []
        self.directories: list[tuple[int, bytes]] = [(number, b"") for number in range(len(homes))]
        self.count = 0

    def note(self, number: int, kind: str, *paths: bytes) -> None:
        os.write(self.notes, b"".join(b"%d %s %s\n" % (number, kind.encode(), path.hex().encode()) for path in paths))

    def at(self, number: int, path: bytes) -> bytes:
        return os.path.join(self.homes[number], path)

    def new(self, number: int | None = None) -> tuple[int, bytes]:
        self.count += 1
        choices = [one for one in self.directories if number in (None, one[0])]
        home, directory = self.random.choice(choices)
        return home, os.path.join(directory, b"%x\xff" % self.count)

    def take(self, things: list[tuple[int, bytes]]) -> tuple[int, bytes]:
        return things.pop(self.random.randrange(len(things)))

    def create(self) -> None:
        number, path = self.new()
        os.close(os.open(self.at(number, path), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        self.note(number, "create", path)
        self.files.append((number, path))

    def write(self) -> None:
        number, path = self.random.choice(self.files)
        descriptor = os.open(self.at(number, path), os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, b"x")
        os.close(descriptor)
        self.note(number, "modify", path)

    def chmod(self) -> None:
        number, path = self.random.choice(self.files)
        os.chmod(self.at(number, path), self.random.choice([0o600, 0o644, 0o755]))
        self.note(number, "attrib", path)

    def rename(self) -> None:
        number, old = self.take(self.files)
        _, new = self.new(number)
        os.rename(self.at(number, old), self.at(number, new))
        self.note(number, "rename", old, new)
        self.files.append((number, new))

    def unlink(self) -> None:
        number, path = self.take(self.files)
        os.unlink(self.at(number, path))
        self.note(number, "delete", path)

    def mkdir(self) -> None:
        number, path = self.new()
        os.mkdir(self.at(number, path))
        self.note(number, "create", path)
        self.directories.append((number, path))

    def rename_directory(self) -> None:
        directories = [one for one in self.directories if one[1]]
        if not directories:
            return
        number, old = self.random.choice(directories)
        _, new = self.new(number)
        if new.startswith(old + b"/"):
            return
        os.rename(self.at(number, old), self.at(number, new))
        self.note(number, "rename", old, new)

        def moved(one: tuple[int, bytes]) -> tuple[int, bytes]:
            is_in = one[0] == number and (one[1] == old or one[1].startswith(old + b"/"))
            return (number, new + one[1][len(old) :]) if is_in else one

        self.files = [*map(moved, self.files)]
        self.directories = [*map(moved, self.directories)]

    def run(self, operations: int, counter: int) -> None:
        deeds = [self.create] * 6 + [self.write] * 4 + [self.chmod] * 3 + [self.rename] * 3 + [self.unlink] * 4
        deeds += [self.mkdir] * 2 + [self.rename_directory]
        for done in range(1, operations + 1):
            deed = self.random.choice(deeds)
            if len(self.files) > FILES_MAX:
                deed = self.unlink
            elif not self.files or (deed == self.mkdir and len(self.directories) > DIRECTORIES_MAX):
                deed = self.create
            deed()
            os.pwrite(counter, b"%12d" % done, 0)


def main() -> None:
    seed, operations, notes, counter, *homes = sys.argv[1:]
    writer = Writer(int(seed), os.open(notes, os.O_WRONLY | os.O_APPEND), [os.fsencode(home) for home in homes])
    print(flush=True)
    sys.stdin.readline()
    writer.run(int(operations), os.open(counter, os.O_WRONLY))


if __name__ == "__main__":
    main()
