"""YAML files as trees of nodes that know where they were written.

Facts about YAML that shape this module:

* YAML 1.1 turns an unquoted `0660` into 432 and `off` into false. Only the node tree is read here, never the constructed
  objects: each value is parsed from the text that the user wrote, by the type of its key. Quoting makes no difference.
* PyYAML's composer recurses once a level, keeps the last of two equal keys without a word, and expands aliases, so that a
  small file can stand for an enormous tree. Depth and file size are bounded, aliases and duplicate keys refused.
* PyYAML lets ValueError and OverflowError through from escapes and directives with absurd numbers.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from watchd.errors import ConfigError, NotPermittedError

FILE_LIMIT_BYTES = 1 << 20
DEPTH_LIMIT = 16


class Node(NamedTuple):
    """A value as it was written, and where."""

    origin: str
    """`file:line`, or `default`."""
    content: str | dict[str, Node] | list[Node] | None
    """The text of a scalar, None for a null, or the children."""


def read(file: Path) -> Node:
    """The node tree of one file; an empty file is an empty mapping. Raises ConfigError and NotPermittedError."""
    try:
        with file.open("rb") as stream:
            data = stream.read(FILE_LIMIT_BYTES + 1)
    except OSError as error:
        raise unreadable(file, error) from None
    if len(data) > FILE_LIMIT_BYTES:
        raise ConfigError(f"{shown(file)}: is larger than 1 MiB, this is no configuration of watchd")
    return _Reader(file).read(data)


def unreadable(file: Path, error: OSError) -> ConfigError | NotPermittedError:
    """The error to raise for a file or directory that cannot be read."""
    message = f"{shown(file)}: cannot be read: {error.strerror}"
    if isinstance(error, PermissionError):
        return NotPermittedError(message, remedy="run as root or make the file readable")
    return ConfigError(message, remedy="name a file that exists" if isinstance(error, FileNotFoundError) else "")


class _BoundedLoader(yaml.SafeLoader):
    """Composes nodes, of bounded depth and without aliases."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases (*) are not accepted, write the value out", problem_mark=mark)
        if self.depth >= DEPTH_LIMIT:
            raise yaml.MarkedYAMLError(problem=f"is nested more than {DEPTH_LIMIT} deep", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Reader:
    """Turns the bytes of one file into nodes."""

    NULL_TAG = "tag:yaml.org,2002:null"
    CORE_TAGS = frozenset(
        f"tag:yaml.org,2002:{name}"
        for name in ("null", "bool", "int", "float", "str", "timestamp", "value", "merge", "map", "seq")
    )

    def __init__(self, file: Path) -> None:
        self._name = shown(file)

    def read(self, data: bytes) -> Node:
        root = self._compose(data)
        if root is None or root.tag == self.NULL_TAG:
            return Node(f"{self._name}:1", {})
        if not isinstance(root, yaml.MappingNode):
            raise self._error(root.start_mark.line, "expected `key: value` lines")
        return self._convert(root)

    def _compose(self, data: bytes) -> yaml.Node | None:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(data.count(b"\n", 0, error.start), "is not UTF-8") from None
        loader = None
        try:
            loader = _BoundedLoader(text)
            node: yaml.Node | None = loader.get_single_node()
            return node
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = ", ".join(part for part in (error.context, error.problem) if part)
            raise self._error(mark.line if mark else 0, problem) from None
        except yaml.reader.ReaderError as error:
            raise self._error(text.count("\n", 0, error.position), "holds a character that YAML forbids") from None
        except (ValueError, OverflowError) as error:
            raise self._error(loader.line if loader else 0, f"is no YAML: {error}") from None

    def _convert(self, node: yaml.Node) -> Node:
        line = node.start_mark.line
        if node.tag not in self.CORE_TAGS:
            raise self._error(line, f"the tag {shown(node.tag)} is not accepted, leave it out")
        if isinstance(node, yaml.MappingNode):
            return self._convert_mapping(node)
        if isinstance(node, yaml.SequenceNode):
            return Node(f"{self._name}:{line + 1}", [self._convert(child) for child in node.value])
        if node.tag == self.NULL_TAG:
            return Node(f"{self._name}:{line + 1}", None)
        if not _is_name(node.value):
            raise self._error(line, f"{quoted(node.value)} holds a character that no name can hold")
        return Node(f"{self._name}:{line + 1}", node.value)

    def _convert_mapping(self, node: yaml.MappingNode) -> Node:
        children: dict[str, Node] = {}
        for key, value in node.value:
            line = key.start_mark.line
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(line, "a key must be one word")
            if key.value in children:
                before = children[key.value].origin.rpartition(":")[2]
                raise self._error(line, f"{quoted(key.value)} is given twice, first on line {before}")
            # The value's place is that of its key: that is the line that people look for.
            children[key.value] = self._convert(value)._replace(origin=f"{self._name}:{line + 1}")
        return Node(f"{self._name}:{node.start_mark.line + 1}", children)

    def _error(self, line: int, problem: str) -> ConfigError:
        return ConfigError(f"{self._name}:{line + 1}: {shown(problem)}")


def merge(base: Node, over: Node) -> Node:
    """`over` upon `base`: mappings merge, everything else replaces."""
    if not isinstance(base.content, dict) or not isinstance(over.content, dict):
        return over if over.content is not None else base
    merged = dict(base.content)
    for key, child in over.content.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(over.origin, merged)


def origin_of(tree: Node, key: str) -> str:
    """Where the value of a dotted key was written, as `file:line`, or `default`."""
    node = tree
    for step in re.findall(r"[^.\[\]]+", key):
        if isinstance(node.content, dict) and step in node.content:
            node = node.content[step]
        elif isinstance(node.content, list):
            node = node.content[int(step)]
        elif isinstance(node.content, str):
            break  # `metrics: off` stands for the whole section
        else:
            return "default"
    return node.origin


def _is_name(text: str) -> bool:
    """Whether the kernel could be given this text as a name."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def quoted(text: str) -> str:
    """A value within a line: bounded, and in quotes that show where it begins and ends."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def shown(text: str | Path) -> str:
    """Text within a line: bounded, and without anything that could break the line."""
    shown = "".join(one if one.isprintable() else repr(one)[1:-1] for one in str(text))
    return shown if len(shown) <= 400 else shown[:397] + "..."
