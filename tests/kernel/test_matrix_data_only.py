"""Content that lives in a data-only layer: files behind a metacopy that are replaced, removed, put back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from tests.kernel.accidents import replace, write
from tests.kernel.matrix import OBSERVED, Overlay, path_of, told_of, untruths
from tests.kernel.running import Daemon
from tests.kernel.sandbox import Sandbox

OPTIONS = ((b"metacopy", b"on"), (b"redirect_dir", b"on"))
BLOBS = (b"replaced", b"removed", b"returning", b"moved", b"kept", b"late")
"""What is to happen to each; a file of that name has its content in a blob of that name."""


@pytest.fixture
def overlays(sandbox: Sandbox) -> list[Overlay]:
    """One to be repaired and one to be observed, with names that lead into the data-only layer."""
    names, data = sandbox.directory(b"names"), sandbox.directory(b"data")
    os.mkdir(names + b"/d")
    os.mkdir(data + b"/blobs")
    for blob in BLOBS:
        if blob != b"late":
            write(data + b"/blobs/" + blob, b"old content")
        file = names + b"/d/" + blob
        write(file, b"")
        os.truncate(file, 11)
        os.setxattr(file, "trusted.overlay.metacopy", b"")
        os.setxattr(file, "trusted.overlay.redirect", b"/blobs/" + blob)
    layers = [(b"lowerdir+", names), (b"lowerdir+", sandbox.directory(b"other")), (b"datadir+", data)]
    found = []
    for name in (b"merged", OBSERVED):
        merged = sandbox.mount_overlay(name, [*OPTIONS, *layers])
        found.append(Overlay(merged, [names, sandbox.path(b"other")], OPTIONS, data_only=[data]))
    return found


def read_all(overlay: Overlay) -> None:
    """The kernel looks for content when a file is opened."""
    for blob in BLOBS:
        with contextlib.suppress(OSError), open(overlay.merged + b"/d/" + blob, "rb") as file:
            file.read()


def change_all(data: bytes) -> None:
    """As the names say."""
    replace(data + b"/blobs/replaced", b"new content")
    os.unlink(data + b"/blobs/removed")
    os.unlink(data + b"/blobs/returning")
    write(data + b"/blobs/returning", b"new content")
    os.rename(data + b"/blobs/moved", data + b"/elsewhere")
    write(data + b"/blobs/late", b"new content")


@contextlib.contextmanager
def held(overlay: Overlay) -> Iterator[None]:
    """All files are open."""
    with contextlib.ExitStack() as files:
        for blob in BLOBS:
            with contextlib.suppress(OSError):
                files.enter_context(open(overlay.merged + b"/d/" + blob, "rb"))
        yield


STALE = {b"d/replaced", b"d/removed", b"d/returning", b"d/moved"}


def test_content_that_changed_in_a_data_only_layer_is_shown(
    running: Daemon, sandbox: Sandbox, overlays: list[Overlay]
) -> None:
    repaired, observed = overlays
    running.sync(repaired.merged, observed.merged)
    for overlay in overlays:
        read_all(overlay)
    change_all(sandbox.path(b"data"))
    told = running.ask("sync", mounts=[os.fsdecode(overlay.merged) for overlay in overlays])["mounts"]
    assert told_of(told, repaired)["state"] == "coherent"
    assert untruths(repaired, set()) == {}
    assert untruths(observed, set()).keys() == STALE
    assert {path_of(entry) for entry in told_of(told, observed)["stale"]} == STALE
    assert "blobs/replaced" in running.changed()


def test_content_of_a_data_only_layer_that_somebody_has_open_is_told(
    running: Daemon, sandbox: Sandbox, overlays: list[Overlay]
) -> None:
    repaired = overlays[0]
    running.sync(repaired.merged)
    with held(repaired):
        change_all(sandbox.path(b"data"))
        [mount] = running.sync(repaired.merged)
        assert mount["state"] == "pinned"
        assert {path_of(entry) for entry in mount["stale"]} == STALE == untruths(repaired, set()).keys()
        assert all(holder["pid"] == os.getpid() for entry in mount["stale"] for holder in entry["pinned_by"])
    assert running.sync(repaired.merged) == []
    assert untruths(repaired, set()) == {}
