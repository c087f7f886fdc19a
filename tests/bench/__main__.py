"""`python -m tests.bench [NAMES…]`: run the benchmarks, print tables, write JSON. Needs root; times depend on
the machine.

The exit status says whether everything could be measured, never whether it was fast.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import msgspec

from tests.bench import append, audit, changes, drain, latency, memory, neighbour, noise, recover, scan, start, storm
from tests.bench.arena import workspace
from tests.bench.measure import machine
from tests.bench.report import Report
from tests.bench.session import SMALL, Scale, Session
from tests.bench.subjects import SubjectError

BENCHMARKS = {
    "start": start.measure,
    "drain": drain.measure,
    "latency": latency.measure,
    "storm": storm.measure,
    "noise": noise.measure,
    "neighbour": neighbour.measure,
    "memory": memory.measure,
    "audit": audit.measure,
    "changes": changes.measure,
    "append": append.measure,
    "recover": recover.measure,
    "scan": scan.measure,
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure watchd beside its baselines.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which benchmarks: {', '.join(BENCHMARKS)}")
    parser.add_argument("--small", action="store_true", help="with tiny parameters, to see that it runs")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--baselines-only", action="store_true", help="leave watchd itself out")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    return arguments


def main() -> int:
    """Run what was asked for. 0 if everything was measured, 1 if something failed."""
    arguments = parse_arguments()
    # A terminated run must leave nothing behind either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    scale = SMALL if arguments.small else Scale()
    try:
        with workspace() as space:
            session = Session(space, scale, with_watchd=not arguments.baselines_only)
            rows = [row for name in arguments.names or BENCHMARKS for row in BENCHMARKS[name](session)]
    except PermissionError as error:
        print(f"bench: {error.strerror}: {error.filename}; run it as root", file=sys.stderr)
        return 1
    except SubjectError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    report = Report(machine(), msgspec.to_builtins(scale), rows, session.notes)
    print(report.to_text())
    arguments.json.write_bytes(report.to_json())
    return int(session.failed)


if __name__ == "__main__":
    sys.exit(main())
