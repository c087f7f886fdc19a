"""`after` hooks: when they run and what they are told. The commands are real, what the engine tells is not."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from watchd.coherence.round import Round
from watchd.coherence.target import Target
from watchd.config.schema import Config, MountRule
from watchd.config.units import Duration
from watchd.metrics import Metrics
from watchd.service import hooks as module
from watchd.service.hooks import LINES_MAX, LINES_PER_S, Allowance, HookBook, as_lines

PATIENCE_S = 30.0
DEVICE = "0:45"


def target(device: str = DEVICE, *, mount_point: bytes = b"/srv/app", observe: bool = False) -> Target:
    def never() -> int:
        raise AssertionError("hooks open nothing")

    return Target(device, mount_point, (mount_point,), (), never, observe=observe)


MOUNT = target()


class Stage:
    """A book of hooks whose commands write what they are told to a file each, and wait for leave where they are to."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.resting = True
        self.metrics = Metrics()
        self.config = Config(mounts=(self.rule(),))
        self.book = HookBook(
            lambda points: self.config.rule_for(points), at_rest=lambda _: self.resting, metrics=self.metrics
        )

    def rule(self, script: str = "", *, match: str = "/srv/*", timeout: str = "1d") -> MountRule:
        """Every run appends what it is told to `told`, then does `script`."""
        home = shlex.quote(str(self.home))
        script = (
            f'paths=$(tr "\\n" " "); echo "$WATCHD_MOUNT $WATCHD_DEVICE $WATCHD_SEQ: $paths" >>{home}/told; {script}'
        )
        return MountRule(match=match, after=("sh", "-c", script), after_timeout=Duration.parse(timeout))

    def gated(self, name: str) -> str:
        """A script that says that it began and waits until it is let go."""
        for end in ("begun", "leave"):
            os.mkfifo(self.home / f"{name}.{end}")
        return f"echo >{self.home}/{name}.begun; read line <{self.home}/{name}.leave"

    async def begun(self, name: str) -> None:
        await asyncio.to_thread((self.home / f"{name}.begun").read_text)

    async def let_go(self, name: str) -> None:
        await asyncio.to_thread((self.home / f"{name}.leave").write_text, "\n")

    def healed(self, *paths: bytes, target: Target = MOUNT, sequence: int = 7, **more: Any) -> None:
        """A round on the mount, as the engine tells of it."""
        round = Round(target, (), "coherent", len(paths), 0, 0, None, healed=paths)
        self.book.round(replace(round, **more), sequence=sequence)

    async def at_rest(self) -> list[str]:
        """What all runs were told, once nothing runs and nothing is to come."""
        async with asyncio.timeout(PATIENCE_S):
            while not self.book.idle:
                await asyncio.sleep(0)
        told = self.home / "told"
        return [line.rstrip() for line in told.read_text().splitlines()] if told.exists() else []

    def results(self) -> dict[str, float]:
        return {labels[1]: child._value.get() for labels, child in self.metrics._hooks._metrics.items()}


def play(home: Path, story: Callable[[Stage], Awaitable[None]]) -> None:
    async def tell() -> None:
        stage = Stage(home)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await story(stage)
        finally:
            await stage.book.close()

    asyncio.run(tell())


def test_a_burst_is_one_run_with_each_path_once(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        for number in range(1000):
            stage.healed(b"b%d" % (number % 3), b"a", sequence=number)
        assert await stage.at_rest() == ["/srv/app 0:45 999: a b0 b1 b2"]
        assert stage.results() == {"ok": 1}

    play(tmp_path, story)


def test_what_is_healed_while_the_command_runs_is_one_more_run(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        stage.config = Config(mounts=(stage.rule(stage.gated("run")),))
        stage.healed(b"first")
        await stage.begun("run")
        stage.healed(b"second")
        stage.healed(b"third")
        assert not stage.book.idle
        await stage.let_go("run")
        await stage.begun("run")
        await stage.let_go("run")
        assert await stage.at_rest() == ["/srv/app 0:45 7: first", "/srv/app 0:45 7: second third"]

    play(tmp_path, story)


def test_a_command_that_hangs_keeps_no_other_mount_waiting(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        stage.config = Config(mounts=(stage.rule(stage.gated("run"), match="/hangs"), stage.rule()))
        stage.healed(b"x", target=target("0:46", mount_point=b"/hangs"))
        await stage.begun("run")
        stage.config = Config(mounts=(stage.rule(stage.gated("other")),))
        stage.healed(b"y")
        await stage.begun("other")
        await stage.let_go("other")
        await stage.let_go("run")
        assert await stage.at_rest() == ["/hangs 0:46 7: x", "/srv/app 0:45 7: y"]

    play(tmp_path, story)


def test_no_run_while_something_is_stale_but_all_of_it_is_told_afterwards(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        stage.healed(b"a", result="coherent")
        stage.healed(b"b", result="stale")
        assert await stage.at_rest() == []
        stage.healed(result="coherent")
        assert await stage.at_rest() == ["/srv/app 0:45 7: a b"]

    play(tmp_path, story)


def test_a_burst_is_not_over_while_rounds_are_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUIET_S", 0.001)
    asked = 0

    async def story(stage: Stage) -> None:
        def at_rest(device: str) -> bool:
            nonlocal asked
            asked += 1
            if asked == 5:
                stage.healed(b"late")
            return asked > 10

        stage.book._at_rest = at_rest
        stage.healed(b"early")
        assert await stage.at_rest() == ["/srv/app 0:45 7: early late"]

    play(tmp_path, story)
    assert asked == 11


def test_changes_that_never_cease_do_not_put_the_command_off_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LATEST_S", 0.2)

    async def story(stage: Stage) -> None:
        stage.resting = False
        while not (tmp_path / "told").exists():
            stage.healed(b"a")
            await asyncio.sleep(0)

    play(tmp_path, story)


def test_a_round_that_healed_nothing_runs_nothing(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        stage.healed()
        stage.healed(b"a", target=target(mount_point=b"/elsewhere"))
        stage.healed(b"a", target=target(observe=True))
        assert await stage.at_rest() == []

    play(tmp_path, story)


def test_a_rule_that_is_taken_back_meanwhile_runs_nothing(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        stage.healed(b"a")
        stage.config = Config()
        assert await stage.at_rest() == []
        stage.config = Config(mounts=(stage.rule("exit 4"),))
        stage.healed(b"b")
        assert await stage.at_rest() == ["/srv/app 0:45 7: b"]
        assert stage.results() == {"failed": 1}

    play(tmp_path, story)


def test_at_the_deadline_it_is_ended_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story(stage: Stage) -> None:
        stage.config = Config(mounts=(stage.rule("exec sleep 1000", timeout="100ms"),))
        stage.healed(b"a")
        await stage.at_rest()
        assert stage.results() == {"timeout": 1}

    play(tmp_path, story)
    assert "0:45: `after` sh for 1 path was ended at its deadline of 100ms" in caplog.text


def test_a_stop_ends_what_runs_and_begins_nothing(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        stage.config = Config(mounts=(stage.rule(stage.gated("run")),))
        stage.healed(b"a")
        await stage.begun("run")
        stage.healed(b"b")
        stage.healed(b"c", target=target("0:46", mount_point=b"/srv/other"))
        await stage.book.close()
        stage.book._stop = os.eventfd(0)  # it is closed once more at the end of the play
        assert stage.results() == {"stopped": 1}
        assert await stage.at_rest() == ["/srv/app 0:45 7: a"]
        stage.healed(b"d")
        assert stage.book.idle

    play(tmp_path, story)


def test_mounts_that_went_are_not_remembered(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        stage.healed(b"a", result="stale")
        stage.healed(b"b", target=target("0:46"))
        stage.book.keep({"0:47"})
        assert await stage.at_rest() == ["/srv/app 0:46 7: b"]
        assert stage.book._hooks == {}

    play(tmp_path, story)


def test_a_doubt_is_told_as_the_whole_mount_but_not_when_the_mount_is_new(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        stage.healed(doubted=True)
        assert await stage.at_rest() == []
        stage.healed(doubted=True)
        assert await stage.at_rest() == ["/srv/app 0:45 7: ."]

    play(tmp_path, story)


def test_a_mount_that_was_replaced_runs_once_for_what_was_stale_before(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        stage.healed(b"early", result="stale")
        new = target("0:99")
        stage.healed(b"pinned", replaced_by=new)
        stage.healed(target=new, doubted=True)
        stage.book.keep({new.device})
        assert await stage.at_rest() == ["/srv/app 0:99 7: early pinned"]
        assert stage.book._hooks == {}

    play(tmp_path, story)


def test_a_successor_that_was_heard_of_before_gets_what_is_to_be_told(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        new = target("0:99")
        stage.healed(b"early", result="stale")
        stage.healed(target=new, doubted=True)
        stage.healed(b"of the new one", target=new)
        stage.healed(b"pinned", replaced_by=new)
        assert await stage.at_rest() == ["/srv/app 0:99 7: early of the new one pinned"]
        assert stage.book._hooks == {}

    play(tmp_path, story)


def test_more_paths_than_can_be_kept_are_told_as_the_whole_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATHS_MAX", 2)

    async def story(stage: Stage) -> None:
        stage.healed(b"a", b"b")
        stage.healed(b"c")
        stage.healed(b"d")
        assert await stage.at_rest() == ["/srv/app 0:45 7: ."]

    play(tmp_path, story)


def test_no_name_can_forge_a_line() -> None:
    assert as_lines([b"d/e/x\n/etc/passwd", b"d/e/f"]) == b"d/e\nd/e/f\n"
    assert as_lines([b"a\nb", b"f"]) == b".\n"
    assert as_lines([b"a", b""]) == b".\n"
    assert as_lines([b"caf\xe9", b"a"]) == b"a\ncaf\xe9\n"


def test_a_command_that_talks_on_and_on_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "watchd")
    now = 0.0
    allowance = Allowance(clock=lambda: now)
    for number in range(LINES_MAX + 50):
        allowance.tell(DEVICE, b"%d \x1b[2J" % number)
    assert len(caplog.messages) == LINES_MAX
    assert caplog.messages[-1] == rf"0:45: `after` says: {LINES_MAX - 1} \x1b[2J"
    now = 1.0
    for _ in range(50):
        allowance.tell(DEVICE, b"again")
    assert caplog.messages[LINES_MAX] == "50 lines that `after` commands said are left out"
    assert len(caplog.messages) == LINES_MAX + 1 + LINES_PER_S
