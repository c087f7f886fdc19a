"""Every accident at once, each in a directory of its own, to overlays over one layer.

One overlay is repaired, and has to be true after `sync`. Another one over the same lowers is observed only, so that no accident
is healed by what was done about its neighbours: whatever is wrong there has to have been reported, and whatever was reported
has to be wrong.
"""

from __future__ import annotations

import os
import random
from base64 import b64decode
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.kernel.accidents import ACCIDENTS, Accident, populate, write
from tests.kernel.compare import look, names_below, open_root, open_twin
from tests.kernel.running import Daemon, Json
from tests.kernel.sandbox import Options, Sandbox
from watchd.coherence.invalidate import invalidate
from watchd.kernel.libc import AT_FDCWD
from watchd.kernel.mounts import open_tree_clone

OBSERVED = b"observed"
"""A mount point of this name is verified by the `running` daemon, and left as it is."""

LASTING = frozenset({"damage", "shadowed"})

NEEDS_PROGRAM = frozenset({"chmod u-s"})

Wrong = dict[bytes, tuple[object, object]]
"""Path -> what is shown, and what should be."""


@dataclass(frozen=True)
class Overlay:
    """A merged mount and its layers, upper first, with the options that a twin needs as well."""

    merged: bytes
    layers: Sequence[bytes]
    options: Options = ()
    data_only: Sequence[bytes] = ()
    seen_as: bytes = field(default=b"", kw_only=True)
    """Another path to it, for a mount of another namespace."""

    @property
    def root(self) -> bytes:
        """Where it is to be looked at."""
        return self.seen_as or self.merged


@dataclass(frozen=True)
class Case:
    """An accident and the directory that it happens in."""

    accident: Accident
    directory: bytes


@dataclass(frozen=True)
class Shape:
    """A stack of layers, one of which changes."""

    lowers: int
    changing: int
    """Number of the lower that changes, 0 is the top."""
    has_upper: bool

    def __str__(self) -> str:
        return f"{self.changing + 1} of {self.lowers}{' with upper' if self.has_upper else ''}"


SHAPES = [
    Shape(lowers, changing, has_upper)
    for lowers in (1, 2, 3)
    for changing in range(lowers)
    for has_upper in (True, False)
    if has_upper or lowers > 1  # the kernel takes no overlay of one layer
]


@dataclass(frozen=True)
class Place:
    """Which layers beside the changing one have the directory as well."""

    in_upper: bool
    in_others: bool

    def __str__(self) -> str:
        return (
            " and ".join(where for has, where in ((self.in_upper, "in upper"), (self.in_others, "in others")) if has)
            or "alone"
        )


def places(shape: Shape) -> list[Place]:
    """All that make a difference."""
    upper = (False, True) if shape.has_upper else (False,)
    others = (False, True) if shape.lowers > 1 else (False,)
    return [Place(in_upper, in_others) for in_upper in upper for in_others in others]


@dataclass(frozen=True)
class Scene:
    """Overlays over one changing layer, and what is to happen to it."""

    changing: bytes
    cases: Sequence[Case]
    repaired: Sequence[Overlay]
    """Innermost first."""
    observed: Sequence[Overlay] = ()

    def happen(self) -> None:
        """All at once, in an order that has nothing to do with the names."""
        shuffled = list(self.cases)
        random.Random(len(shuffled)).shuffle(shuffled)
        for case in shuffled:
            case.accident.happen(self.changing + b"/" + case.directory)

    def missing(self) -> set[bytes]:
        """Names that somebody looks for before they are there."""
        return {case.directory + b"/" + name for case in self.cases for name in case.accident.missing}


def set_scene(
    sandbox: Sandbox,
    shape: Shape,
    changing: bytes,
    *,
    other: bytes = b"",
    options: Options = (),
    accidents: Iterable[str] = ACCIDENTS,
) -> Scene:
    """The layers, and on them an overlay to be repaired and one to be observed. `other` is a lower that is made already
    (see `populate_others`)."""
    others = [other or sandbox.directory(b"low%d" % number) for number in range(shape.lowers)]
    lowers = [*others[: shape.changing], changing, *others[shape.changing + 1 :]]
    uppers = {name: sandbox.directory(b"up-" + name) for name in (b"merged", OBSERVED)} if shape.has_upper else {}
    cases = []
    for place in places(shape):
        for name in accidents:
            case = Case(ACCIDENTS[name], _directory(name, place))
            populate(changing, case.directory, with_program=name in NEEDS_PROGRAM)
            for lower in lowers if place.in_others and not other else ():
                if lower != changing:
                    _populate_other(lower + b"/" + case.directory, is_below=lowers.index(lower) > shape.changing)
            if place.in_upper:
                for upper in uppers.values():
                    _populate_upper(upper + b"/" + case.directory)
            cases.append(case)
    overlays = [
        mount_overlay(sandbox, name, lowers, upper=uppers.get(name), options=options) for name in (b"merged", OBSERVED)
    ]
    return Scene(changing, cases, overlays[:1], overlays[1:])


def populate_others(layer: bytes, shape: Shape) -> None:
    """A lower for such a stack, below the one that changes, for every accident."""
    for place in places(shape):
        for name in ACCIDENTS if place.in_others else ():
            _populate_other(layer + b"/" + _directory(name, place), is_below=True)


def _directory(accident: str, place: Place) -> bytes:
    return f"{accident}, {place}".encode()


def _populate_other(directory: bytes, *, is_below: bool) -> None:
    """Another lower, of which nothing changes; one below has some of the names of the one that does."""
    os.makedirs(directory + b"/dir", exist_ok=True)
    for name in (b"elsewhere", b"dir/elsewhere", *((b"file", b"dir/a") if is_below else ())):
        write(directory + b"/" + name, b"of another layer")


def _populate_upper(directory: bytes) -> None:
    os.makedirs(directory + b"/dir")
    for name in (b"of-upper", b"dir/of-upper"):
        write(directory + b"/" + name, b"upper")


def mount_overlay(
    sandbox: Sandbox, name: bytes, lowers: Sequence[bytes], *, upper: bytes | None, options: Options = ()
) -> Overlay:
    """Lowers and upper are paths."""
    given: list[tuple[bytes, bytes | None]] = [*options, *((b"lowerdir+", lower) for lower in lowers)]
    if upper is not None:
        given += [(b"upperdir", upper), (b"workdir", sandbox.directory(name + b".work"))]
    return Overlay(sandbox.mount_overlay(name, given), [*([upper] if upper else []), *lowers], options)


def remember(overlay: Overlay, missing: Iterable[bytes]) -> set[bytes]:
    """Have the mount cache everything, and that the names to come are missing; returns all of these names."""
    with open_root(overlay.root) as root:
        names = names_below(root) | set(missing)
        look(root, names)
    return names


def untruths(overlay: Overlay, names: set[bytes]) -> Wrong:
    """What the mount shows and should show instead, of these names and all that there are."""
    at = overlay.merged + b".twin"
    os.makedirs(at, exist_ok=True)
    with (
        open_root(overlay.root) as root,
        open_twin(at, overlay.layers, data_only=overlay.data_only, options=overlay.options) as twin,
    ):
        # Names from before come first: to look up a directory under its new name can heal the old one.
        asked = [*sorted(names), *sorted(names_below(twin) - names)]
        shown, true = look(root, asked), look(twin, asked)
    return {path: (shown[path], true[path]) for path in shown if shown[path] != true[path]}


def play(scene: Scene, daemon: Daemon) -> None:
    """Cache, change, sync, compare."""
    overlays = [*scene.repaired, *scene.observed]
    merged = [overlay.merged for overlay in overlays]
    daemon.sync(*merged)
    missing = scene.missing()
    names = set().union(*(remember(overlay, missing) for overlay in overlays))
    scene.happen()
    told = daemon.ask("sync", mounts=[os.fsdecode(path) for path in merged])["mounts"]
    for overlay in scene.repaired:
        answer = told_of(told, overlay)
        assert not stale_of(answer)
        assert answer["stale"] or answer["state"] == "coherent"
        wrong = untruths(overlay, names)
        assert not wrong, f"not healed: {wrong}"
    for overlay in scene.observed:
        assert_reported(told_of(told, overlay), untruths(overlay, names))
        assert is_told_to_be_healed(overlay, daemon)
    daemon.assert_calm()


def is_told_to_be_healed(overlay: Overlay, daemon: Daemon) -> bool:
    """Whether what somebody else healed is called right. What the daemon looks at in that moment stays in the cache."""
    for _ in range(10):
        heal(overlay)
        [told] = daemon.sync(overlay.merged)
        if not stale_of(told):
            return True
    return False


def heal(overlay: Overlay) -> None:
    """What the daemon only observes is healed by somebody else."""
    clone = open_tree_clone(AT_FDCWD, overlay.merged)
    try:
        invalidate(clone, read_only=bool(os.statvfs(overlay.merged).f_flag & os.ST_RDONLY))
    finally:
        os.close(clone)


def told_of(mounts: Sequence[Json], overlay: Overlay) -> Json:
    """What was said of this one."""
    path = os.fsdecode(overlay.merged)
    return next(mount for mount in mounts if any(point["path"] == path for point in mount["mount_points"]))


def assert_reported(told: Json, wrong: Wrong) -> None:
    """What is wrong was reported, and what was reported is wrong."""
    reported = {path_of(entry): entry["kind"] for entry in stale_of(told)}
    unreported = {path: what for path, what in wrong.items() if not any(above in reported for above in _up_from(path))}
    assert not unreported, f"wrong and not reported: {unreported}"
    needed = {above for path in wrong for above in _up_from(path)}
    alarms = {path: kind for path, kind in reported.items() if path not in needed}
    assert not alarms, f"reported and not wrong: {alarms}"


def stale_of(told: Json) -> list[Json]:
    """What is not as the layers have it now; damage is, and should not be."""
    return [entry for entry in told["stale"] if entry["kind"] not in LASTING]


def path_of(entry: Json) -> bytes:
    """The name that an entry of `stale` is about, byte for byte."""
    return b64decode(entry["path_b64"]) if "path_b64" in entry else os.fsencode(entry["path"])


def _up_from(path: bytes) -> Iterator[bytes]:
    while path:
        yield path
        path = path.rpartition(b"/")[0]
