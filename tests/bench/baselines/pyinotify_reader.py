"""pyinotify as its documentation uses it: a recursive watch and the Notifier's own loop."""

from __future__ import annotations

import sys
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # asyncore, which pyinotify imports
    import pyinotify

from tests.bench.baselines.protocol import END, Tally, report, say_ready

MASK = (
    pyinotify.IN_CREATE
    | pyinotify.IN_DELETE
    | pyinotify.IN_MOVED_FROM
    | pyinotify.IN_MOVED_TO
    | pyinotify.IN_MODIFY
    | pyinotify.IN_CLOSE_WRITE
    | pyinotify.IN_ATTRIB
)
END_NAME = END.decode()


class Handler(pyinotify.ProcessEvent):  # type: ignore[misc]  # pyinotify has no types
    """Counts events and ticks their names off."""

    def my_init(self, *, tally: Tally) -> None:
        self.tally = tally
        self.ended = False

    def process_IN_Q_OVERFLOW(self, _event: pyinotify.Event) -> None:
        self.tally.records += 1
        self.tally.overflows += 1

    def process_default(self, event: pyinotify.Event) -> None:
        self.tally.records += 1
        try:
            self.tally.seen[int(event.name)] = 1
        except ValueError:
            self.ended = self.ended or event.name.startswith(END_NAME)


def main() -> None:
    """Usage: pyinotify_reader LOWER FILES."""
    manager = pyinotify.WatchManager()
    tally = Tally(files=int(sys.argv[2]))
    handler = Handler(tally=tally)
    notifier = pyinotify.Notifier(manager, handler)
    manager.add_watch(sys.argv[1], MASK, rec=True, quiet=False)
    say_ready()
    notifier.loop(callback=lambda _notifier: handler.ended)
    report(tally)


if __name__ == "__main__":
    main()
