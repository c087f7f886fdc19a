"""`watchd check` finds by itself, without a daemon, what test_staleness shows to go stale, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.kernel.accidents import ACCIDENTS, Accident, populate, replace, write
from tests.kernel.compare import look, names_below, open_root, open_twin
from tests.kernel.running import REPOSITORY, Daemon
from tests.kernel.sandbox import Sandbox
from tests.kernel.test_pinned import held
from watchd import cli
from watchd.cli.render import DAMAGE_REMEDY
from watchd.kernel.files import CONFINED, RESOLVE_CACHED, try_openat2

VANISHING = {
    "unlink": b"d/file",
    "removed directory": b"d/dir/a",
    "moved out of the layer": b"d/dir/sub/leaf",
}
"""Accidents after which only names are stale that no layer has any more: no one can list the cache. And one such name."""

FOUND = {name: accident for name, accident in ACCIDENTS.items() if accident.makes_stale and name not in VANISHING}


class Checked:
    """An overlay of which everything is cached, and the verb."""

    def __init__(self, daemon: Daemon, merged: bytes, layers: Sequence[bytes]) -> None:
        self.daemon, self.merged, self.layers = daemon, merged, layers

    def remember(self, accident: Accident | None = None) -> set[bytes]:
        with open_root(self.merged) as root:
            names = names_below(root) | {b"d/" + name for name in (accident.missing if accident else ())}
            look(root, names)
        return names

    def verb(self, *words: str) -> Result:
        """In this process, which is quicker."""
        return CliRunner().invoke(cli.main, [*words, "--config", str(self.daemon.config), os.fsdecode(self.merged)])

    def check(self) -> tuple[int, dict[str, Any]]:
        done = self.verb("check", "--json")
        assert done.stderr == ""
        [mount] = json.loads(done.stdout)["mounts"]
        return done.exit_code, mount

    def stale(self) -> dict[str, str]:
        status, mount = self.check()
        found = {entry["path"]: entry["kind"] for entry in mount["stale"]}
        assert (status == 1) == bool(found) == (mount["state"] != "coherent")
        return found

    def untruths(self, names: set[bytes]) -> set[str]:
        at = self.merged + b".twin"
        os.makedirs(at, exist_ok=True)
        with open_root(self.merged) as root, open_twin(at, self.layers) as twin:
            asked = [*sorted(names), *sorted(names_below(twin) - names)]
            shown, true = look(root, asked), look(twin, asked)
        return {os.fsencode(os.fsdecode(path)).decode(errors="replace") for path in asked if shown[path] != true[path]}

    def invalidate(self) -> None:
        done = self.verb("invalidate")
        assert (done.exit_code, done.stderr) == (0, "")


@pytest.fixture(params=["lower only", "second of two, merged with the upper"])
def checked(request: pytest.FixtureRequest, sandbox: Sandbox, daemon: Daemon) -> Checked:
    """The first layer of a plain overlay, or the last one of a stack in which everything is merged."""
    low = sandbox.directory(b"low")
    populate(low)
    if request.param == "lower only":
        return Checked(daemon, sandbox.overlay(b"merged", b"low", upper=b"up"), [sandbox.path(b"up"), low])
    for layer in (b"above", b"up"):
        sandbox.directory(layer + b"/d/dir")
        write(sandbox.path(layer + b"/d/dir/of-" + layer), b"it stays")
    merged = sandbox.overlay(b"merged", b"above", b"low", upper=b"up")
    return Checked(daemon, merged, [sandbox.path(b"up"), sandbox.path(b"above"), low])


def test_what_is_cached_and_right_is_coherent(checked: Checked) -> None:
    names = checked.remember()
    with held(checked.merged + b"/d/dir/sub/leaf"):
        status, mount = checked.check()
    assert (status, mount["state"], mount["stale"]) == (0, "coherent", [])
    assert mount["names"] >= len(names)


def test_a_file_that_lost_its_content_is_no_stale_listing(sandbox: Sandbox, daemon: Daemon) -> None:
    low, other, up = sandbox.directory(b"low"), sandbox.directory(b"other"), sandbox.directory(b"up")
    for layer in (low, other):
        os.mkdir(layer + b"/d")
        write(layer + b"/d/" + os.path.basename(layer), b"content")
    layers = [(b"lowerdir+", low), (b"lowerdir+", other), (b"upperdir", up), (b"workdir", sandbox.directory(b"work"))]
    merged = sandbox.mount_overlay(b"merged", [(b"metacopy", b"on"), *layers])
    os.chmod(merged + b"/d/low", 0o600)
    os.unlink(low + b"/d/low")
    checked = Checked(daemon, merged, ())
    checked.invalidate()
    with open_root(merged + b"/d") as directory:
        assert os.listdir(directory) == ["other"], "the kernel does not list what it cannot open"
        assert checked.stale() == {"d/low": "damage"}
        write(other + b"/d/new", b"")
        assert checked.stale() == {"d": "listing", "d/low": "damage"}


@pytest.mark.parametrize("accident", FOUND.values(), ids=FOUND)
def test_what_an_accident_made_stale_is_named_until_it_is_invalidated(checked: Checked, accident: Accident) -> None:
    names = checked.remember(accident)
    accident.happen(checked.layers[-1] + b"/d")
    found = checked.stale()
    untrue = checked.untruths(names)
    assert bool(found) == bool(untrue)
    assert untrue or accident is ACCIDENTS["chmod 700 of a directory"], (
        "the upper's part of a directory has the attributes"
    )
    assert set(found) <= untrue, "it is as it should be"
    known = {path for path in untrue if os.path.lexists(checked.layers[-1] + b"/" + os.fsencode(path))}
    assert {path for path in known if not any(path == one or path.startswith(one + "/") for one in found)} == set()
    checked.invalidate()
    assert checked.stale() == {}


@pytest.mark.parametrize("accident", ["written in place", "a new name that nobody looked for"])
def test_what_makes_nothing_stale_is_not_told(checked: Checked, accident: str) -> None:
    checked.remember()
    ACCIDENTS[accident].happen(checked.layers[-1] + b"/d")
    assert checked.stale() == {}


@pytest.mark.parametrize("accident", VANISHING)
def test_a_name_that_no_layer_has_any_more_is_found_by_who_uses_it(checked: Checked, accident: str) -> None:
    checked.remember()
    path = VANISHING[accident]
    with held(checked.merged + b"/" + path) as holder:
        ACCIDENTS[accident].happen(checked.layers[-1] + b"/d")
        status, mount = checked.check()
        assert status == 1
        ghost = next(entry for entry in mount["stale"] if entry["path"] == path.decode())
        assert ghost["kind"] == "ghost"
        assert {"pid": holder, "command": "sh", "how": "open"} in ghost["pinned_by"]
        assert checked.verb("invalidate").exit_code in (0, 1)
        assert checked.stale()
    checked.invalidate()
    assert checked.stale() == {}


def test_a_replaced_file_in_use_is_named_with_its_holder(checked: Checked) -> None:
    with held(checked.merged + b"/d/file") as holder:
        replace(checked.layers[-1] + b"/d/file", b"new")
        assert checked.check()[1]["state"] == "pinned"
        done = checked.daemon.verb("check", checked.merged)
        assert done.returncode == 1
        assert done.stdout == f"{os.fsdecode(checked.merged)}/d/file: replaced, held by {holder} (sh, open)\n"
    checked.invalidate()
    assert checked.stale() == {}


def test_a_listing_in_use_is_named_with_its_holder(sandbox: Sandbox, daemon: Daemon) -> None:
    for layer in (b"low", b"other"):
        sandbox.directory(layer + b"/d")
    merged = sandbox.overlay(b"merged", b"low", b"other")
    checked = Checked(daemon, merged, [])
    reading = os.open(merged + b"/d", os.O_RDONLY)
    os.listdir(reading)
    write(sandbox.path(b"other/d/new"), b"new")
    assert checked.stale() == {"d": "listing"}
    done = checked.daemon.verb("check", "--json", merged)  # in a process of its own, which names this one
    [mount] = json.loads(done.stdout)["mounts"]
    assert {"pid": os.getpid(), "how": "open"}.items() <= mount["stale"][0]["pinned_by"][0].items()
    os.close(reading)
    assert checked.stale() == {}


def test_nothing_is_imported_from_the_working_directory(
    checked: Checked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a tenant's, and who looks for setuid programs is root."""
    home = tmp_path / "tenant"
    (home / "watchd").mkdir(parents=True)
    (home / "watchd/__init__.py").write_text("open('imported', 'w').close()")
    with held(checked.merged + b"/d/program"):
        os.chmod(checked.layers[-1] + b"/d/program", 0o755)
        with monkeypatch.context() as there:
            there.chdir(home)
            assert checked.stale() == {"d/program": "permission"}
    assert not (home / "imported").exists()


def test_looking_caches_nothing(sandbox: Sandbox, daemon: Daemon) -> None:
    for number in range(50):
        sandbox.directory(b"low/d%d" % number)
        write(sandbox.path(b"low/d%d/file" % number), b"")
    sandbox.directory(b"other/d0")
    write(sandbox.path(b"other/d0/more"), b"")
    merged = sandbox.overlay(b"merged", b"low", b"other", upper=b"up")
    os.stat(merged + b"/d0")
    for _ in range(2):
        status, mount = Checked(daemon, merged, []).check()
        assert status == 0
        assert mount["names"] == 50 + 2, "the root's names, and those of the only directory that is cached"
    with open_root(merged) as root:
        for name in (b"d1", b"d0/file", b"d0/more"):
            assert try_openat2(root, name, resolve=CONFINED | RESOLVE_CACHED) == -errno.EAGAIN


def test_an_overlay_of_another_namespace_is_checked_too(sandbox: Sandbox, daemon: Daemon) -> None:
    low = sandbox.directory(b"low")
    populate(low)
    inmate = sandbox.inmate()
    for name in (b"m", b"up", b"work"):
        sandbox.directory(name)
    low_, up, work, m = (os.fsdecode(sandbox.path(name)) for name in (b"low", b"up", b"work", b"m"))
    inmate.run(f"mount -t overlay overlay -o lowerdir={low_},upperdir={up},workdir={work} {m}")
    inmate.run(f"cat {m}/d/file; test ! -e {m}/d/new; {m}/d/program -u")
    checked = Checked(daemon, sandbox.path(b"m"), [])
    assert checked.stale() == {}
    write(low + b"/d/new", b"new")
    replace(low + b"/d/file", b"new")
    os.chmod(low + b"/d/program", 0o755)
    assert checked.stale() == {"d/new": "missing", "d/file": "replaced", "d/program": "permission"}


def test_without_arguments_the_namespaces_of_the_configuration_are_checked(sandbox: Sandbox, daemon: Daemon) -> None:
    for name in (b"low", b"m", b"up", b"work"):
        sandbox.directory(name)
    low, up, work, m = (os.fsdecode(sandbox.path(name)) for name in (b"low", b"up", b"work", b"m"))
    inmate = sandbox.inmate()
    inmate.run(f"mount -t overlay overlay -o lowerdir={low},upperdir={up},workdir={work} {m}")
    for namespaces, is_checked in (("all", True), ("host", False)):
        daemon.configure(discovery={"namespaces": namespaces, "include": [m]})
        found = [
            mount["mount_points"][0]["path"] for mount in json.loads(daemon.verb("check", "--json").stdout)["mounts"]
        ]
        assert (m in found) is is_checked


def test_metacopies_of_what_was_replaced_are_damage_with_a_word_on_what_to_do(sandbox: Sandbox, daemon: Daemon) -> None:
    low = sandbox.directory(b"low")
    write(low + b"/file", b"old")
    layers = [(b"lowerdir+", low), (b"upperdir", sandbox.directory(b"up")), (b"workdir", sandbox.directory(b"work"))]
    options = [(b"redirect_dir", b"on"), (b"metacopy", b"on")]
    checked = Checked(daemon, sandbox.mount_overlay(b"merged", [*layers, *options]), [])
    os.chmod(checked.merged + b"/file", 0o600)
    assert checked.stale() == {}
    replace(low + b"/file", b"newer")
    checked.invalidate()
    assert checked.stale() == {"file": "damage"}
    done = daemon.verb("check", checked.merged)
    assert done.stdout.startswith(f"{os.fsdecode(checked.merged)}/file: damage: ")
    assert done.stdout.endswith(f"; {DAMAGE_REMEDY}\n")
    os.unlink(sandbox.path(b"up/file"))
    checked.invalidate()
    assert checked.stale() == {}


NAMES = 100_000


def peak_bytes(checked: Checked) -> int:
    """The largest resident set of a check."""
    command = [sys.executable, "-m", "watchd", "check", "--config", checked.daemon.config, checked.merged]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert b": coherent" in process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss << 10


def test_a_directory_is_not_held_in_memory_however_many_names_it_has(sandbox: Sandbox, daemon: Daemon) -> None:
    low = sandbox.directory(b"low/many")
    checked = Checked(daemon, sandbox.overlay(b"merged", b"low", upper=b"up"), [])
    before = peak_bytes(checked)
    directory = os.open(low, os.O_RDONLY)
    for number in range(NAMES):
        os.mknod(b"a name like any other %d" % number, dir_fd=directory)
    os.close(directory)
    for number in range(0, NAMES, 10):
        os.stat(checked.merged + b"/many/a name like any other %d" % number)
    assert peak_bytes(checked) - before < NAMES * 60, "less than the names alone take"


def test_a_directory_that_is_larger_than_a_batch_is_checked_to_its_end(sandbox: Sandbox, daemon: Daemon) -> None:
    low = sandbox.directory(b"low/many")
    for number in range(5000):
        os.mknod(low + b"/%d" % number)
    merged = sandbox.overlay(b"merged", b"low", upper=b"up")
    checked = Checked(daemon, merged, [])
    for number in range(0, 5000, 100):
        os.stat(merged + b"/many/%d" % number)
    with held(merged + b"/many/0"), held(merged + b"/many/4900"):
        for number in (0, 1, 4900):
            replace(low + b"/%d" % number, b"new")
        assert checked.stale() == {"many/0": "replaced", "many/4900": "replaced"}


def test_an_overlay_in_an_overlay_is_checked_through_its_cache(sandbox: Sandbox, daemon: Daemon) -> None:
    low = sandbox.directory(b"low")
    populate(low)
    inner = Checked(daemon, sandbox.overlay(b"inner", b"low", upper=b"up"), [])
    outer = Checked(daemon, sandbox.overlay(b"outer", b"inner", upper=b"outer-up"), [])
    os.stat(outer.merged + b"/d/dir/a")
    assert inner.stale() == outer.stale() == {}
    assert outer.check()[1]["names"] < 13, "what is not cached is not looked up"
    with held(outer.merged + b"/d/dir/a"):
        replace(low + b"/d/dir/a", b"something new")
        assert inner.stale() == {"d/dir/a": "replaced"}, (
            "the outer one shows what its lower does, so it is the inner one's fault"
        )
    with held(outer.merged + b"/d/dir/b"):
        replace(inner.merged + b"/d/dir/b", b"something new")
        assert outer.stale() == {"d/dir/b": "replaced"}
