"""`watchd config`: the configuration, checked or shown."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import msgspec
import yaml

from watchd.cli.options import config_argument, config_option, json_option
from watchd.cli.render import echo_json, printable
from watchd.config import Loaded, flatten, load
from watchd.config.programs import missing_programs
from watchd.config.units import Duration, Percentage, Size


@click.group("config", no_args_is_help=False)
def config() -> None:
    """Check the configuration, or show it with its origins."""


@config.command("check")
@config_argument
@json_option
@config_option
def check(file: Path | None, as_json: bool, config_file: Path | None) -> None:
    """Say whether the configuration is good, or what is wrong with it."""
    loaded = load(file or config_file)
    files = [str(one) for one in loaded.files]
    warnings = missing_programs(loaded.config)
    if as_json:
        echo_json({"ok": True, "files": files, "warnings": warnings})
    else:
        click.echo(printable(f"ok: {', '.join(files) or 'no file is present, the built-in defaults hold'}"))
        for warning in warnings:
            click.echo(printable(f"warning: {warning}"), err=True)


@config.command("dump")
@config_argument
@json_option
@config_option
def dump(file: Path | None, as_json: bool, config_file: Path | None) -> None:
    """Show the configuration that is in effect, with where each value came from."""
    loaded = load(file or config_file)
    if as_json:
        echo_json(
            {
                key: {"value": _plain(value), "origin": loaded.origins[key]}
                for key, value in flatten(loaded.config)
                if "[" not in key
            }
        )
    else:
        for line in dump_lines(loaded):
            click.echo(line)


def dump_lines(loaded: Loaded) -> Iterator[str]:
    """The lines of a YAML file that loads as the same configuration, each value with its origin in a comment."""
    yield from _section_lines(loaded.config, "", loaded.origins)


def _section_lines(section: msgspec.Struct, prefix: str, origins: Mapping[str, str], indent: str = "") -> Iterator[str]:
    for name in section.__struct_fields__:
        value, key = getattr(section, name), f"{prefix}{name}"
        comment = f"  # {origins[key]}" if key in origins else ""
        if isinstance(value, msgspec.Struct):
            yield f"{indent}{name}:"
            yield from _section_lines(value, f"{key}.", origins, f"{indent}  ")
        elif isinstance(value, tuple) and value and isinstance(value[0], msgspec.Struct):
            yield f"{indent}{name}:{comment}"
            for index, entry in enumerate(value):
                lines = _section_lines(entry, f"{key}[{index}].", origins)
                yield from (f"{indent}{'  ' if row else '- '}{line}" for row, line in enumerate(lines))
        elif value is not msgspec.UNSET:
            yield f"{indent}{name}: {_yaml(value)}{comment}"


def _yaml(value: Any) -> str:
    """A value on one line of YAML."""
    if _is_list(value):
        return f"[{', '.join(_yaml(one) for one in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(_plain(value))
    if isinstance(value, (Duration, Percentage, Size)) or _is_plain(text):
        return text
    return yaml.safe_dump(text, default_style='"', width=sys.maxsize).rstrip("\n")


def _is_plain(text: str) -> bool:
    """Whether every reader of YAML takes it for text without quotes."""
    return re.fullmatch(r"[A-Za-z/][A-Za-z0-9_/.-]*", text) is not None and text.lower() != "null"


def _plain(value: Any) -> Any:
    """A value as JSON can hold it, numbers with a unit as they are written in the file."""
    if _is_list(value):
        return [_plain(one) for one in value]
    if isinstance(value, msgspec.Struct):
        return {name: _plain(one) for name, one in msgspec.structs.asdict(value).items() if one is not msgspec.UNSET}
    if isinstance(value, bool):
        return value
    return "off" if value is None else str(value)


def _is_list(value: Any) -> bool:
    """Whether it is a list of the configuration; an Address is a tuple too, but one value."""
    return type(value) is tuple
