"""The configuration: its typed schema and its loading.

`/etc/watchd/watchd.yaml` (or a file that was named) is read first, then `conf.d/*.yaml` beside it in lexical order. Mappings
merge, lists replace. Every key has a default. An error is one line that names file, line and dotted key and says what would
be right.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET

from watchd.config.decode import decode
from watchd.config.schema import SOCKET_NAME, Config
from watchd.config.tree import Node, merge, origin_of, read, unreadable

__all__ = ["DEFAULT_FILE", "SOCKET_NAME", "Config", "Loaded", "flatten", "load"]

DEFAULT_FILE = Path("/etc/watchd/watchd.yaml")


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration with the files it was read from, and for each dotted key `file:line` or `default`."""

    config: Config
    origins: Mapping[str, str]
    files: tuple[Path, ...]


def load(path: Path | None = None) -> Loaded:
    """Reads `path`, or the default file if there is one, and the `conf.d` beside it.

    Raises ConfigError for anything that is wrong in them, NotPermittedError for a file that may not be read.
    """
    main = path or DEFAULT_FILE
    files = _present_files(main, required=path is not None)
    tree = Node("default", {})
    for file in files:
        node = read(file)
        decode(Config, node, "")  # each file by itself, so that an error is found even where a later file hides it
        tree = merge(tree, node)
    config: Config = decode(Config, tree, "")
    origins = {key: origin_of(tree, key) for key, _ in flatten(config)}
    return Loaded(config=config, origins=origins, files=tuple(files))


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that is set, dotted, with its value: `("sources.backend", "auto")`, `("layers[0].path", Path(..))`.

    Lists are values as a whole; a list of mappings is given as a whole and then entry by entry.
    """
    if isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from flatten(getattr(value, name), f"{key}.{name}" if key else name)
    elif value is not UNSET:
        yield key, value
        if isinstance(value, tuple) and value and isinstance(value[0], msgspec.Struct):
            for index, entry in enumerate(value):
                yield from flatten(entry, f"{key}[{index}]")


def _present_files(main: Path, *, required: bool) -> list[Path]:
    try:
        names = sorted(name for name in os.listdir(main.parent / "conf.d") if fnmatch.fnmatchcase(name, "[!.]*.yaml"))
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise unreadable(main.parent / "conf.d", error) from None
    present = [main] if required or os.path.lexists(main) else []
    return present + [main.parent / "conf.d" / name for name in names]
