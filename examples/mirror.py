"""Mirrors a lower layer to another directory, and from then on only what changed in it.

A named cursor stands behind everything that is in TARGET. Without it, and when watchd says that something may have been missed
(`fresh`), everything is copied. It is set when the copy is on disk: a mirror that is interrupted does work twice, and leaves
none out. An entry says where to look, never what is there. A file with several names becomes several files.
For layers in which nobody puts a link in the way of root.
"""

import argparse
import os
import shutil
import stat
import sys
from contextlib import suppress

from watchd.client import Client
from watchd.errors import WatchdError

GONE = (FileNotFoundError, NotADirectoryError)


class Mirror:
    def __init__(self, client: Client, cursor: str, source: str, target: str) -> None:
        self.client, self.cursor = client, cursor
        self.source, self.target = os.fsencode(os.path.realpath(source)), os.fsencode(target)
        self.layers = [layer.name for layer in client.status().layers if layer.path == self.source]
        if not self.layers:
            raise WatchdError(f"{source} is no layer that watchd watches", remedy="see `watchd status`")

    def update(self) -> int:
        """Bring TARGET up to date; returns the number of the last record that is in it."""
        is_known = self.cursor in {cursor.name for cursor in self.client.cursors()}
        changes = self.client.changes(self.cursor if is_known else "now", layers=self.layers)
        work = {entry.path: entry.recursive for entry in changes.entries}
        if changes.fresh or not is_known:
            work = {b"": True}
        for path, deep in work.items():
            # What is not a directory on both sides comes anew, with all that is in it.
            lost = [above for above in way_to(path)[:-1] if not all(map(is_directory, self.places(above)))]
            self.copy(lost[0] if lost else path, deep or bool(lost))
        for above in {above for path in work for above in way_to(path)}:
            with suppress(*GONE):
                stamp(*self.places(above))  # what was done in it changed its times
        os.sync()
        self.client.set_cursor(self.cursor, changes.cursor)
        return int(changes.cursor.rpartition(":")[2])

    def places(self, path: bytes) -> tuple[bytes, bytes]:
        return os.path.join(self.source, path), os.path.join(self.target, path)

    def copy(self, path: bytes, deep: bool) -> None:
        """Have at `path` what the source has there, `deep` with everything below it."""
        old, new = self.places(path)
        try:
            mode = os.lstat(old).st_mode
            if not stat.S_ISDIR(mode) or not is_directory(new):
                remove(new)
            if stat.S_ISDIR(mode):
                os.makedirs(new, exist_ok=True)
                there, here = set(os.listdir(old)), set(os.listdir(new))
                for name in here - there:
                    remove(os.path.join(new, name))
                for name in there if deep else there - here:
                    self.copy(os.path.join(path, name), deep=True)
            elif stat.S_ISLNK(mode) or stat.S_ISREG(mode):
                shutil.copyfile(old, new, follow_symlinks=False)
            else:
                os.mknod(new, mode, os.lstat(old).st_rdev)
            stamp(old, new)
        except GONE:  # perhaps just now
            remove(new)


def stamp(old: bytes, new: bytes) -> None:
    status = os.lstat(old)
    os.chown(new, status.st_uid, status.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(new, stat.S_IMODE(status.st_mode))
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def remove(path: bytes) -> None:
    with suppress(*GONE):
        shutil.rmtree(path) if is_directory(path) else os.unlink(path)


def is_directory(path: bytes) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def way_to(path: bytes) -> list[bytes]:
    """The layer's root, the directories on the way, and the path itself."""
    return [b"", *(path[:end] for end in range(len(path)) if path[end : end + 1] == b"/"), path]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--follow", action="store_true", help="go on as the layer changes")
    parser.add_argument("--cursor", default="mirror", help="its name")
    parser.add_argument("--runtime-directory", default="/run/watchd", help="of the daemon")
    parser.add_argument("source")
    parser.add_argument("target")
    options = parser.parse_args()
    try:
        mirror = Mirror(Client(options.runtime_directory), options.cursor, options.source, options.target)
        done = mirror.update()
        for one in mirror.client.follow(options.cursor, layers=mirror.layers) if options.follow else ():
            done = mirror.update() if one.seq > done else done
    except WatchdError as error:
        sys.exit(f"mirror: {error}")


main()
