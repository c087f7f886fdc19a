r"""Making an overlay from its captured options and the directories its layers are now.

Facts
* fsconfig resolves layer strings when they are given, in the namespace and with the root directory of who gives them.
* `lowerdir=` takes all lowers in one string, escaped; `lowerdir+=` and `datadir+=` (6.8) one each, as it is. A descriptor in
  their place, and in that of `upperdir=` and `workdir=`, is taken since 6.13 and then shown as the path of the directory.
* A second overlay with the same upper empties `workdir/work` and makes it anew, while the first one still works there: from
  then on unlink, rename, and creation in a directory of a lower fail with ENOENT in the first one, and a copy-up under
  way loses its temporary file. If that directory is renamed before, both go on to work, each in its own (measured).
* An overlay copies up with the credentials of whoever made it: without CAP_SETFCAP a program with file capabilities cannot be
  written to any more by anybody (EPERM), without CAP_MKNOD not even the times of a device node can be set (measured).
* What lies beside `work` in the work directory, overlayfs never looks at.
* ustat(2) tells whether a superblock with a device number is alive; arm64 has no such call.

What this means for us: strings that were absolute are given again as they were, because people search mountinfo for them;
relative ones become absolute. The work directory of the old overlay steps aside for the new one, as `watchd-replaced-DEVICE`,
and goes when its superblock has gone: at once, or with a later replacement if somebody still uses the old mount.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence

import msgspec

from watchd.errors import RefusedError
from watchd.kernel.files import RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2
from watchd.kernel.filesystems import superblock_is_alive
from watchd.kernel.libc import AT_FDCWD
from watchd.kernel.mounts import (
    FSCONFIG_CMD_CREATE,
    FSCONFIG_SET_FD,
    FSCONFIG_SET_FLAG,
    FSCONFIG_SET_STRING,
    FSCONFIG_STRING_MAX,
    fsconfig,
    fsmount,
    fsopen,
)
from watchd.overlay.capture import Capture
from watchd.overlay.model import ResolvedStack, device_number, split_lowerdir, unescape

_SAID_BY_KERNEL = frozenset({b"rw", b"seclabel"})
_WORK = b"work"
REPLACED = b"watchd-replaced-"
_ASIDE_NAME = re.compile(r"watchd-replaced-(\d+:\d+)(?:\.\d+)?")
_SPECIAL = re.compile(rb"([:\\,])")


MOUNTER_CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_FSETID": 4,
    "CAP_LINUX_IMMUTABLE": 9,
    "CAP_SYS_ADMIN": 21,
    "CAP_MKNOD": 27,
    "CAP_SETFCAP": 31,
}
"""What copying up may need, and whoever makes an overlay with an upper must have."""


class Setting(msgspec.Struct, frozen=True):
    """One fsconfig(2) call."""

    key: bytes
    value: bytes | None
    """None for a flag."""
    path: bytes = b""
    """The directory that is meant, to be given as a descriptor where the value is longer than a string may be."""


class Recipe(msgspec.Struct, frozen=True):
    """What an overlay is made of. Paths hold in the view of its layers."""

    settings: tuple[Setting, ...]
    workdir: bytes = b""
    """b"" without an upper."""
    predecessor: str = ""
    """major:minor of the overlay that works there until it is replaced by this one."""
    exposed: bool = False
    """Somebody else than root could make a path lead elsewhere: no link on the way to a layer is followed."""


class Made(msgspec.Struct, frozen=True):
    """A new overlay, not mounted anywhere yet."""

    mount: int
    """Descriptor (O_PATH) of a detached mount, owned by whoever gets this."""
    aside: bytes = b""
    """What the directory that its predecessor works in is called now; b"" if there was none."""


def recipe(captured: Capture, stack: ResolvedStack, *, exposed: bool = False) -> Recipe:
    """How to make the captured overlay again of the layers in `stack`, whose paths are absolute; `exposed`: see `Recipe`."""
    settings = [Setting(b"source", captured.source)]
    lowers, data_only = [layer.path for layer in stack.lowers], [layer.path for layer in stack.data_only]
    upper = stack.upper.path if stack.upper else b""
    one_by_one = {b"lowerdir+": iter(lowers), b"datadir+": iter(data_only)}
    workdir = b""
    for name, value in captured.options:
        if name == b"lowerdir":
            settings += _lowerdir(value, lowers, data_only, one_by_one=exposed)
        elif name in one_by_one:
            settings.append(_layer(name, value, next(one_by_one[name])))
        elif name == b"upperdir":
            settings.append(_layer(name, value, upper))
        elif name == b"workdir":
            workdir = _beside_upper(captured, upper, unescape(value))
            settings.append(_layer(name, value, workdir))
        elif name not in _SAID_BY_KERNEL:
            settings.append(Setting(name, value or None))
    return Recipe(tuple(settings), workdir, captured.device, exposed)


def make(what: Recipe) -> Made:
    """The overlay, detached. Makes system calls only: may run as an errand, where `what` holds.

    Raises RefusedError if the kernel will not have it; then nothing has changed.
    """
    clear_workdir(what)  # before the new one gets the device number of one that is gone
    aside = _set_aside(what)
    try:
        return Made(_create(what), aside)
    except BaseException:
        step_back(what, aside)
        raise


def step_back(what: Recipe, aside: bytes) -> None:
    """Give the predecessor its work directory back; to be used when the new overlay is gone. An errand like `make`."""
    if aside:
        with contextlib.suppress(OSError), _open_directory(what.workdir, what) as workdir:
            shutil.rmtree(os.fsdecode(_WORK), dir_fd=workdir, ignore_errors=True)
            os.rename(aside, _WORK, src_dir_fd=workdir, dst_dir_fd=workdir)


def clear_workdir(what: Recipe) -> None:
    """Take away what overlays that are no more left in the work directory. Raises nothing; belongs where `what` holds."""
    if not what.workdir:
        return
    with contextlib.suppress(OSError), _open_directory(what.workdir, what) as workdir:
        for name in os.listdir(workdir):
            device = _ASIDE_NAME.fullmatch(name)
            if device and not superblock_is_alive(device_number(device[1])):
                shutil.rmtree(name, dir_fd=workdir, ignore_errors=True)


def _lowerdir(
    value: bytes, lowers: Sequence[bytes], data_only: Sequence[bytes], *, one_by_one: bool
) -> Iterator[Setting]:
    if not all(path.startswith(b"/") for path in sum(split_lowerdir(value), ())):
        value = b"::".join([b":".join(map(_escape, lowers)), *map(_escape, data_only)])
    if len(value) <= FSCONFIG_STRING_MAX and not one_by_one:
        yield Setting(b"lowerdir", value)
        return
    yield from (Setting(b"lowerdir+", path, path) for path in lowers)
    yield from (Setting(b"datadir+", path, path) for path in data_only)


def _layer(name: bytes, value: bytes, path: bytes) -> Setting:
    if value.startswith(b"/"):
        return Setting(name, value, path)
    return Setting(name, path if name.endswith(b"+") else _escape(path), path)


def _beside_upper(captured: Capture, upper: bytes, workdir: bytes) -> bytes:
    """An absolute path; a relative one begins where that of the upper does."""
    shown = unescape(captured.option(b"upperdir") or b"")
    return workdir if workdir.startswith(b"/") else upper[: len(upper) - len(shown)] + workdir


def _escape(path: bytes) -> bytes:
    return _SPECIAL.sub(rb"\\\1", path)


def _give(context: int, setting: Setting, what: Recipe) -> None:
    try:
        if setting.value is None:
            fsconfig(context, FSCONFIG_SET_FLAG, setting.key)
        elif setting.path and (what.exposed or len(setting.value) > FSCONFIG_STRING_MAX):
            with _open_directory(setting.path, what) as directory:
                fsconfig(context, FSCONFIG_SET_FD, setting.key, aux=directory)
        else:
            fsconfig(context, FSCONFIG_SET_STRING, setting.key, setting.value)
    except OSError as error:
        key, value = os.fsdecode(setting.key), os.fsdecode(setting.path or setting.value or b"")
        raise RefusedError(f"the kernel refuses {key}={value}: {error.strerror}", remedy=_remedy(error)) from error


def _remedy(error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return "with index=on an upper directory is given to one overlay only: unmount it and mount it anew"
    if error.errno == errno.ELOOP:
        return "there is a symbolic link on its way, which somebody else than root may have put there"
    return ""


@contextlib.contextmanager
def _open_directory(path: bytes, what: Recipe) -> Iterator[int]:
    resolve = RESOLVE_NO_MAGICLINKS | (RESOLVE_NO_SYMLINKS if what.exposed else 0)
    descriptor = openat2(AT_FDCWD, path, flags=os.O_RDONLY | os.O_DIRECTORY, resolve=resolve)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _set_aside(what: Recipe) -> bytes:
    if not what.workdir:
        return b""
    try:
        with _open_directory(what.workdir, what) as workdir:
            status = os.stat(_WORK, dir_fd=workdir, follow_symlinks=False)
            if stat.S_IMODE(status.st_mode) or not stat.S_ISDIR(status.st_mode):
                raise RefusedError(f"{os.fsdecode(what.workdir)} is not the work directory of an overlay any more")
            aside = _free_name(workdir, REPLACED + what.predecessor.encode())
            os.rename(_WORK, aside, src_dir_fd=workdir, dst_dir_fd=workdir)
            return aside
    except OSError as error:
        if error.errno == errno.EROFS:
            return b""  # so nobody works there
        shown = os.fsdecode(what.workdir)
        raise RefusedError(f"{shown}: the work directory cannot be shared: {error.strerror}") from error


def _free_name(directory: int, wanted: bytes) -> bytes:
    taken = {os.fsencode(name) for name in os.listdir(directory)}
    names = itertools.chain([wanted], (wanted + b".%d" % number for number in itertools.count(1)))
    return next(name for name in names if name not in taken)


def _create(what: Recipe) -> int:
    context = fsopen(b"overlay")
    try:
        for setting in what.settings:
            _give(context, setting, what)
        try:
            fsconfig(context, FSCONFIG_CMD_CREATE)
        except OSError as error:
            raise RefusedError(f"the kernel refuses a new overlay: {error.strerror}", remedy=_remedy(error)) from error
        return fsmount(context)
    finally:
        os.close(context)
