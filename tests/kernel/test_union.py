"""overlay.union judged by the kernel: random stacks of layers, and a freshly built overlay of them says what is right."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.kernel.sandbox import Options, Sandbox
from watchd.kernel.files import AT_HANDLE_FID, FileHandle, name_to_handle_at, try_openat2
from watchd.kernel.libc import AT_EMPTY_PATH
from watchd.overlay.union import Union
from watchd.wire.handles import parse_overlay_handle

NAMES = (b"a", b"b", b"c")
DEPTH = 3
PATHS = [b"/".join(names) for depth in range(1, DEPTH + 1) for names in itertools.product(NAMES, repeat=depth)]

# ---- what a layer may hold ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    content: bytes = b""
    whiteout: bool = False
    """By xattr: an empty file that the directory's opaque="x" tells to look for."""

    def make(self, path: bytes, prefix: str) -> None:
        with open(path, "wb") as file:
            file.write(self.content)
        if self.whiteout:
            os.setxattr(path, prefix + "whiteout", b"y")


@dataclass(frozen=True)
class Link:
    def make(self, path: bytes, prefix: str) -> None:
        os.symlink(b"a", path)


@dataclass(frozen=True)
class Device:
    """A whiteout, unless it has a number."""

    number: int = 0

    def make(self, path: bytes, prefix: str) -> None:
        os.mknod(path, stat.S_IFCHR, self.number)


@dataclass(frozen=True)
class Dir:
    entries: dict[bytes, Node] = field(default_factory=dict)
    opaque: bytes = b""
    redirect: bytes = b""

    def make(self, path: bytes, prefix: str) -> None:
        os.mkdir(path)
        for name, node in self.entries.items():
            node.make(path + b"/" + name, prefix)
        for attribute, value in (("opaque", self.opaque), ("redirect", self.redirect)):
            if value:
                os.setxattr(path, prefix + attribute, value)


Node = File | Link | Device | Dir

FILE, LINK, WHITEOUT, XATTR_WHITEOUT = File(b"content"), Link(), Device(), File(whiteout=True)

leaves: st.SearchStrategy[Node] = st.sampled_from([FILE, File(), LINK, WHITEOUT, WHITEOUT, Device(os.makedev(1, 3))])
redirects = st.sampled_from(NAMES) | st.lists(st.sampled_from(NAMES), min_size=1, max_size=DEPTH).map(
    lambda names: b"/" + b"/".join(names)
)


@dataclass(frozen=True)
class Kind:
    """What the overlay knows of, by its options and by where the layer lies in it."""

    redirects: bool
    xattr_whiteouts: bool


def directories(kind: Kind, depth: int) -> st.SearchStrategy[Dir]:
    inner: st.SearchStrategy[Node] = leaves if depth == 0 else leaves | directories(kind, depth - 1)
    plain = st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
    redirect = st.sampled_from([b"", b""]) | redirects if kind.redirects else st.just(b"")
    found = st.builds(Dir, plain, st.sampled_from([b"", b"", b"", b"y"]), redirect)
    if kind.xattr_whiteouts:
        hiding = st.dictionaries(st.sampled_from(NAMES), inner | st.just(XATTR_WHITEOUT), max_size=3)
        found |= st.builds(Dir, hiding, st.just(b"x"), redirect)
    return found


def layers(kind: Kind) -> st.SearchStrategy[Dir]:
    """The root of a layer: an overlay's root is never opaque and never redirected."""
    inner = leaves | directories(kind, DEPTH - 2)
    return st.builds(Dir, st.dictionaries(st.sampled_from(NAMES), inner, max_size=3))


@st.composite
def stacks(draw: st.DrawFn, *, redirects: bool) -> tuple[Sequence[Dir], bool]:
    """Layers, top first, and whether the top one is the upper."""
    upper = draw(st.booleans())
    count = draw(st.integers(2, 4))
    # The kernel looks for xattr whiteouts neither in the upper nor in the last layer. Where it follows no redirects, it takes
    # the last one that has a directory for the last layer, and then what is listed depends on what was looked up before.
    lower = range(int(upper), count - 1) if redirects else range(0)
    kinds = [Kind(redirects, xattr_whiteouts=number in lower) for number in range(count)]
    return [draw(layers(kind)) for kind in kinds], upper


# ---- what the kernel says, and what the union says ------------------------------------------------------------------

Seen = tuple[FileHandle | None, bool, dict[bytes, bool] | None] | None
"""The real object's handle, whether it is a directory, and its listing with what is a directory."""


def seen_by_kernel(merged: int, path: bytes) -> Seen:
    """Raises OSError where the kernel refuses: two directories of a writable overlay that share a lower one (ESTALE)."""
    descriptor = try_openat2(merged, path or b".")
    if -descriptor in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return None
    if descriptor < 0:
        raise OSError(-descriptor, os.strerror(-descriptor))
    try:
        handle = name_to_handle_at(descriptor, flags=AT_EMPTY_PATH | AT_HANDLE_FID)
        real = parse_overlay_handle(handle.type, handle.fid)
        is_dir = stat.S_ISDIR(os.stat(descriptor).st_mode)
        return FileHandle(real.type, real.fid), is_dir, listed(descriptor) if is_dir else None
    finally:
        os.close(descriptor)


def listed(directory: int) -> dict[bytes, bool]:
    with os.scandir(b"/proc/self/fd/%d" % directory) as entries:
        return {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}


def seen_by_union(union: Union, path: bytes, *, upper: bool) -> Seen:
    entry = union.lookup(path)
    assert union.exists(path) is (entry is not None)
    opened = union.open(path)
    if entry is None:
        assert opened is None
        return None
    assert opened is not None
    assert name_to_handle_at(opened) == entry.handle
    os.close(opened)
    revealed: FileHandle | None = entry.handle
    if upper and entry.layer == 0 and entry.is_dir and path:
        revealed = union.second(path) or entry.handle
    return revealed, entry.is_dir, union.listing(path) if entry.is_dir else None


@contextlib.contextmanager
def built(sandbox: Sandbox, stack: Sequence[Dir], *, upper: bool, userxattr: bool) -> Iterator[tuple[int, Union]]:
    """A fresh overlay of these layers, and the union of them."""
    prefix = "user.overlay." if userxattr else "trusted.overlay."
    roots = [sandbox.path(b"layers/%d" % number) for number in range(len(stack))]
    sandbox.directory(b"layers")
    for root, layer in zip(roots, stack, strict=True):
        layer.make(root, prefix)
    options: Options = [(b"userxattr", None)] if userxattr else [(b"redirect_dir", b"follow")]
    options = [*options, *((b"lowerdir+", root) for root in roots[upper:])]
    if upper:
        options += [(b"upperdir", roots[0]), (b"workdir", sandbox.directory(b"layers/work"))]
    with contextlib.ExitStack() as stack_of_descriptors:
        stack_of_descriptors.callback(shutil.rmtree, sandbox.path(b"layers"))
        path = sandbox.mount_overlay(b"merged", options)
        stack_of_descriptors.callback(sandbox.umount, b"merged")
        merged, *opened = (os.open(directory, os.O_PATH) for directory in (path, *roots))
        for descriptor in (merged, *opened):
            stack_of_descriptors.callback(os.close, descriptor)
        union = Union(opened, userxattr=userxattr)
        stack_of_descriptors.callback(union.close)
        yield merged, union


def judge(sandbox: Sandbox, stack: Sequence[Dir], *, upper: bool = False, userxattr: bool = False) -> None:
    with built(sandbox, stack, upper=upper, userxattr=userxattr) as (merged, union):
        right: dict[bytes, Seen] = {}
        for path in (b"", *PATHS):
            with contextlib.suppress(OSError):
                right[path] = seen_by_kernel(merged, path)
        assert {path: seen_by_union(union, path, upper=upper) for path in right} == right
        # The order in which paths are asked must make no difference.
        assert {path: seen_by_union(union, path, upper=upper) for path in reversed(right)} == right


bounded = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def root(**entries: Node) -> Dir:
    return Dir({os.fsencode(name): node for name, node in entries.items()})


DEEP = root(a=root(a=root(a=FILE), b=FILE), b=root(a=root(b=FILE), c=FILE), c=FILE)


@bounded
@given(stack=stacks(redirects=True))
@example(stack=([root(a=Dir({}, redirect=b"b")), DEEP], False)).via("a relative redirect")
@example(stack=([root(c=root(b=Dir({}, redirect=b"/b/a"))), root(c=Dir({}, opaque=b"y")), DEEP], False)).via(
    "an absolute redirect leaves what its parent consists of"
)
@example(stack=([root(a=Dir({}, redirect=b"/b/a")), root(b=root(a=Dir({}, redirect=b"c"))), DEEP], False)).via(
    "a relative redirect on the way of an absolute one"
)
@example(stack=([root(a=Dir({}, redirect=b"/b/a")), root(b=Dir({}, redirect=b"a")), DEEP], False)).via(
    "a directory on the way is redirected itself"
)
@example(stack=([root(a=Dir({}, redirect=b"/b/a")), root(b=Dir({b"a": Dir()}, opaque=b"y")), DEEP], False)).via(
    "a directory on the way is opaque"
)
@example(stack=([root(a=root(a=WHITEOUT)), root(a=WHITEOUT), DEEP], False)).via("a whiteout that hides nothing")
@example(stack=([root(), root(a=root(a=WHITEOUT))], False)).via("a whiteout in a directory of one layer alone")
@example(stack=([root(a=Dir({b"b": XATTR_WHITEOUT}, opaque=b"x")), DEEP], False)).via("whiteouts by xattr")
@example(stack=([root(a=Dir({}, opaque=b"y")), DEEP], True)).via("an opaque directory in the upper")
@example(stack=([root(a=FILE, c=root(a=FILE)), DEEP], True)).via("file over directory and directory over file")
def test_the_union_is_what_the_kernel_makes_of_the_layers(sandbox: Sandbox, stack: tuple[Sequence[Dir], bool]) -> None:
    judge(sandbox, stack[0], upper=stack[1])


@bounded
@given(stack=stacks(redirects=False))
def test_the_union_is_what_the_kernel_makes_of_layers_marked_by_users(
    sandbox: Sandbox, stack: tuple[Sequence[Dir], bool]
) -> None:
    judge(sandbox, stack[0], upper=stack[1], userxattr=True)
