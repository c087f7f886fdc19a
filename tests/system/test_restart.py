"""What a restart of the unit loses: nothing, and if it may have lost something it says so.

Held here of systemd: the store of file descriptors outlives `systemctl restart` and the manager's own restart after a crash,
and does not outlive `systemctl stop`.
"""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path

from tests.system.service import Json, Service, of_type, tree

RESTARTS = 5
KILLS = 5
MORE_THAN_A_QUEUE = 17_000
"""Of names, in a queue of 16 384 (fs.fanotify.max_queued_events)."""


class Writers:
    """Threads that create, replace and remove files as long as this is entered."""

    def __init__(self, root: Path, *, number: int = 2) -> None:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(root / f"writer-{n}",)) for n in range(number)]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _write(self, directory: Path) -> None:
        directory.mkdir()
        for number in itertools.count():
            if self._stop.is_set():
                return
            path = directory / str(number % 1000)
            if number >= 1000 and number % 3 == 0:
                path.unlink(missing_ok=True)
            else:
                temporary = directory / f".{number}"
                temporary.write_text(str(number))
                temporary.rename(path)


def untold(log: list[Json], root: Path) -> set[str]:
    """Where the journal is wrong about what is there: names that it thinks are there or gone."""
    there = {"", *tree(root)}
    told = {record["path"]: record["exists"] for record in of_type(log, "change")}
    told |= {record["from"]: False for record in of_type(log, "change") if "from" in record}
    return {"", *(path for path, exists in told.items() if exists)} ^ there


def begin(service: Service) -> None:
    """A daemon that looks after an overlay and has nothing to do."""
    service.mount()
    service.start()
    assert service.sync() == []


def test_what_happens_while_the_daemon_is_dead_is_told_without_a_scan(service: Service) -> None:
    low, merged = service.low, service.merged
    for name in ("replaced", "removed", "renamed", "directory/file"):
        (low / name).parent.mkdir(exist_ok=True)
        (low / name).write_text("old")
    begin(service)
    tree(merged)  # all of it is cached by the overlay now
    (merged / "new").exists()
    log_before = service.log()
    with service.dead():
        (low / "new").write_text("new")
        (low / "temporary").write_text("new")
        (low / "temporary").rename(low / "replaced")
        (low / "removed").unlink()
        (low / "renamed").rename(low / "renamed-to")
        (low / "directory").rename(low / "elsewhere")
        (low / "elsewhere/later").write_text("new")
        (low / "made").mkdir()
        (low / "made/deep").mkdir()
        (low / "made/deep/file").write_text("new")
        (service.outside / "tree").mkdir()
        (service.outside / "tree/from-outside").write_text("new")
        (service.outside / "tree").rename(low / "tree")
    assert service.sync() == []
    log = service.log()[len(log_before) :]
    assert of_type(log, "desync", "resync") == []
    told = {record["path"]: record for record in of_type(log, "change")}
    by_scan = {path for path, record in told.items() if record["via"] != "event"}
    assert by_scan == {"tree/from-outside"}, "no event tells of what is in a directory that comes from outside"
    assert {path for path, record in told.items() if not record["exists"]} >= {"removed", "renamed", "directory"}
    there = {path for path, record in told.items() if record["exists"]}
    assert there >= {"new", "replaced", "renamed-to", "elsewhere", "elsewhere/later", "made/deep/file", "tree"}
    assert tree(merged) == tree(low)


def test_a_restart_in_the_middle_of_everything_is_not_noticed(service: Service) -> None:
    begin(service)
    with Writers(service.low):
        for _ in range(RESTARTS):
            service.restart()
    assert service.sync() == []
    log = service.log()
    assert len(of_type(log, "start")) == RESTARTS + 1
    assert of_type(log, "desync") == []
    assert untold(log, service.low) == set()
    assert tree(service.merged) == tree(service.low)
    assert service.stored() == 2


def test_a_daemon_that_is_killed_under_load_knows_everything_or_says_that_it_does_not(service: Service) -> None:
    begin(service)
    with Writers(service.low):
        for _ in range(KILLS):
            with service.dead():
                pass
    assert service.sync() == []
    log = service.log()
    assert len(of_type(log, "start")) == KILLS + 1
    assert untold(log, service.low) == set()
    desyncs = [record["seq"] for record in of_type(log, "desync")]
    assert {record["closes"] for record in of_type(log, "resync")} >= set(desyncs[-1:])
    assert tree(service.merged) == tree(service.low)


def test_with_other_settings_nothing_is_taken_over(service: Service) -> None:
    begin(service)
    with service.dead():
        service.configure(content=False)
        (service.low / "new").write_text("new")
    assert service.sync() == []
    log = service.log()
    assert [record["reason"] for record in of_type(log, "desync")] == ["restart"]
    assert untold(log, service.low) == set()
    assert service.stored() == 2
    with service.dead():
        (service.low / "newer").write_text("new")
    assert service.sync() == []
    log = service.log()
    assert len(of_type(log, "desync")) == 1
    assert untold(log, service.low) == set()


def test_more_than_the_queue_holds_is_found_by_a_scan(service: Service) -> None:
    service.configure(queue="default")
    begin(service)
    with service.dead():
        for number in range(MORE_THAN_A_QUEUE):
            os.close(os.open(service.low / str(number), os.O_CREAT | os.O_WRONLY))
    assert service.sync() == []
    log = service.log()
    [desync], [resync] = of_type(log, "desync"), of_type(log, "resync")
    assert (desync["reason"], resync["closes"]) == ("overflow", desync["seq"])
    assert untold(log, service.low) == set()


def test_a_stop_and_a_start_are_told_as_a_gap(service: Service) -> None:
    begin(service)
    service.guest.systemctl("stop", "watchd")
    assert service.stored() == 0
    (service.low / "new").write_text("new")
    service.start()
    assert service.sync() == []
    log = service.log()
    assert [record["reason"] for record in of_type(log, "desync")] == ["restart"]
    assert untold(log, service.low) == set()


def test_the_manager_is_not_woken_by_events(service: Service) -> None:
    begin(service)
    assert service.stored() == 2
    before = _switches(service.guest.leader)
    for number in range(1000):
        (service.low / str(number)).write_text("new")
    assert _switches(service.guest.leader) - before < 100
    assert service.sync() == []


def _switches(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("voluntary_ctxt_switches")))
