"""Every accident under every option of an overlay that makes a difference to what is shown."""

from __future__ import annotations

import os

import pytest

from tests.kernel.accidents import ACCIDENTS
from tests.kernel.matrix import Scene, Shape, play, set_scene
from tests.kernel.running import Daemon
from tests.kernel.sandbox import Options, Sandbox

OPTIONS: dict[str, Options] = {
    "userxattr": ((b"userxattr", None),),
    "redirect_dir": ((b"redirect_dir", b"on"),),
    "metacopy": ((b"metacopy", b"on"), (b"redirect_dir", b"on")),
    "xino": ((b"xino", b"on"),),
}
TWO = Shape(2, 1, has_upper=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_accident_with(running: Daemon, sandbox: Sandbox, options: Options) -> None:
    play(set_scene(sandbox, TWO, sandbox.path(b"low"), options=options), running)


def rename_all(scene: Scene) -> None:
    """What happens in a lower directory concerns another name of the merged mount."""
    for overlay in (*scene.repaired, *scene.observed):
        for case in scene.cases:
            os.rename(overlay.merged + b"/" + case.directory, overlay.merged + b"/renamed " + case.directory)


def copy_attributes_up(scene: Scene) -> None:
    """Files of the upper whose content is the lower's."""
    for overlay in (*scene.repaired, *scene.observed):
        for case in scene.cases:
            os.chmod(overlay.merged + b"/" + case.directory + b"/second", 0o640)


def test_every_accident_in_directories_that_were_renamed_through_the_mount(running: Daemon, sandbox: Sandbox) -> None:
    scene = set_scene(sandbox, TWO, sandbox.path(b"low"), options=OPTIONS["redirect_dir"])
    rename_all(scene)
    play(scene, running)


def test_every_accident_to_files_whose_attributes_were_copied_up(running: Daemon, sandbox: Sandbox) -> None:
    kept = [
        name for name in ACCIDENTS if name != "rename of the directory above"
    ]  # which takes their content away for good
    scene = set_scene(sandbox, TWO, sandbox.path(b"low"), options=OPTIONS["metacopy"], accidents=kept)
    copy_attributes_up(scene)
    play(scene, running)
