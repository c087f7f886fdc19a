"""From a tree of nodes to the schema, with errors that name file, line and key."""

from __future__ import annotations

import difflib
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import UNSET, UnsetType

from watchd.config.schema import LADDER, SOCKET_NAME, Layer, Metrics
from watchd.config.tree import Node, quoted, shown
from watchd.errors import ConfigError

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_OFF = frozenset({"off", "no", "false"})
_ON = frozenset({"on", "yes", "true"})

SOCKET_PATH_LIMIT_BYTES = 107
"""sockaddr_un.sun_path holds 108 bytes with the final NUL (unix(7))."""


def decode(kind: Any, node: Node, key: str) -> Any:
    """The value of type `kind` that a node holds. Raises ConfigError, naming `key` in full.

    `kind` is a Struct of the schema, a tuple of one kind, a Literal, bool, str, Path, or a class of `watchd.config.units`,
    perhaps in a union with None (which is written `off`) or UNSET (for a key that is not given).
    """
    if get_origin(kind) in (Union, types.UnionType):
        if type(None) in get_args(kind) and _is_off(node):
            return None
        kind = next(one for one in get_args(kind) if one not in (type(None), UnsetType))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return _decode_section(kind, node, key)
    if node.content is None:
        raise _wrong(node, key, "has no value; give one or leave the key out")
    if get_origin(kind) is tuple:
        return _decode_list(kind, node, key)
    if not isinstance(node.content, str):
        raise _wrong(node, key, f"expects one value, not a {'mapping' if isinstance(node.content, dict) else 'list'}")
    try:
        return _parse(kind, node.content)
    except ValueError as error:
        raise _wrong(node, key, f"{quoted(node.content)} {error}") from None


def _decode_section(kind: type[_Struct], node: Node, key: str) -> _Struct:
    content = node.content
    if kind is Metrics and _is_off(node):
        return kind(listen=None)
    if content is None:  # a heading under which everything is commented out
        content = {}
    if not isinstance(content, dict):
        raise _wrong(node, key, f"expects keys below it: {', '.join(kind.__struct_fields__)}")
    for name, child in content.items():
        if name not in kind.__struct_fields__:
            raise _wrong(child, _below(key, shown(name)), _unknown(name, kind.__struct_fields__))
    values = {}
    for field in msgspec.structs.fields(kind):
        below = _below(key, field.name)
        if field.name in content:
            values[field.name] = decode(field.type, content[field.name], below)
            _check(below, values[field.name], content[field.name])
        elif field.required:
            raise _wrong(node, below, "is missing")
    return kind(**values)


def _decode_list(kind: Any, node: Node, key: str) -> tuple[Any, ...]:
    if not isinstance(node.content, list):
        # Who writes a command as one string means its words: as one name it would be accepted and never run.
        words = ", ".join(map(quoted, node.content.split() or [""])) if isinstance(node.content, str) else ""
        given = f", such as [{words}]" if words else ", not a mapping"
        raise _wrong(node, key, f"expects a list{given}")
    entry_kind = get_args(kind)[0]
    return tuple(decode(entry_kind, child, f"{key}[{index}]") for index, child in enumerate(node.content))


def _parse(kind: Any, text: str) -> Any:
    """One scalar. Raises ValueError with the rest of a sentence that begins with the text."""
    if get_origin(kind) is Annotated:
        kind, (low, high) = get_args(kind)
        value = _parse(kind, text)
        if not kind.parse(low) <= value <= kind.parse(high):
            raise ValueError(f"is not between {low} and {high}")
        return value
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(f"is none of {', '.join(get_args(kind))}")
        return text
    parser: Callable[[str], Any] = _PARSERS.get(kind) or kind.parse
    return parser(text)


def _parse_bool(text: str) -> bool:
    if text.lower() in _ON | _OFF:
        return text.lower() in _ON
    raise ValueError("is neither true nor false")


def _parse_text(text: str) -> str:
    if not text:
        raise ValueError("is empty")
    return text


def _parse_path(text: str) -> Path:
    if not text.startswith("/"):
        raise ValueError("is no absolute path")
    return Path("/" + text.lstrip("/"))  # two slashes at the beginning mean something to pathlib, nothing to Linux


_PARSERS: dict[Any, Callable[[str], Any]] = {bool: _parse_bool, str: _parse_text, Path: _parse_path}


def _check(key: str, value: Any, node: Node) -> None:
    """What the type of a key alone cannot say."""
    if key == "runtime_directory" and len(os.fsencode(value / SOCKET_NAME)) > SOCKET_PATH_LIMIT_BYTES:
        limit = SOCKET_PATH_LIMIT_BYTES - len(SOCKET_NAME) - 1
        raise _wrong(node, key, f"is too long to hold a socket, at most {limit} bytes")
    if key.endswith("actions") and list(value) != [method for method in LADDER if method in value]:
        ordered = ", ".join(method for method in LADDER if method in value)
        raise _wrong(node, key, f"actions are tried once each and in this order: write [{ordered}]")
    if key.endswith(".after") and value and "/" in value[0] and not value[0].startswith("/"):
        raise _wrong(node, f"{key}[0]", f"{quoted(value[0])} is neither the name of a program nor an absolute path")
    if key == "layers" and isinstance(node.content, list):
        _check_layers(value, node.content)


def _check_layers(layers: tuple[Layer, ...], nodes: list[Node]) -> None:
    for field in ("path", "name"):
        seen = set()
        for index, layer in enumerate(layers):
            value = getattr(layer, field)
            if value in seen:
                raise _wrong(nodes[index], f"layers[{index}].{field}", f"{quoted(str(value))} is given twice")
            if value is not UNSET:
                seen.add(value)


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _unknown(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown key, did you mean {near[0]}?" if near else f"unknown key, known here: {', '.join(known)}"


def _wrong(node: Node, key: str, problem: str) -> ConfigError:
    return ConfigError(f"{node.origin}: {key}: {problem}" if key else f"{node.origin}: {problem}")


def _is_off(node: Node) -> bool:
    return isinstance(node.content, str) and node.content.lower() in _OFF
