"""Journal records for scripts and for people. Pure.

The JSON keys are a contract: keys may be added, never renamed. What is not known is left out. A name that is not
UTF-8 is given exactly as `<key>_b64`, beside a lossy `<key>`.
"""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from watchd.journal.changes import Changes, DirectoryEntry, PathEntry
from watchd.records import STATUS, Action, Change, Damage, Desync, Kind, Record, Resync, Start, Stop, Via, unpack_status


def to_json(seq: int, record: Record) -> dict[str, Any]:
    """One record as a JSON object, in the order in which its keys are documented."""
    head = {
        "seq": seq,
        "time": format_time(record.time_ns),
        "type": type(record).__name__.lower(),
        "layer": record.layer,
    }
    return head | _particulars(record)


def changes_to_json(changes: Changes) -> dict[str, Any]:
    """The answer of `watchd changes` as a JSON object."""
    return {
        "cursor": str(changes.cursor),
        "fresh": changes.fresh,
        "entries": [entry_to_json(entry) for entry in changes.entries],
    }


def entry_to_json(entry: PathEntry | DirectoryEntry) -> dict[str, Any]:
    """One entry of it."""
    head = {"layer": entry.layer, **_name("path", entry.path)}
    tail = {"recursive": True} if entry.recursive else {}
    if isinstance(entry, DirectoryEntry):
        return {**head, "seq": entry.seq, **tail}
    return {
        **head,
        "kinds": kind_names(entry.kinds),
        "exists": entry.exists,
        "is_dir": entry.is_dir,
        "seq": entry.seq,
        **(_name("from", entry.from_path) if entry.from_path is not None else {}),
        **({"inode": entry.inode} if entry.inode is not None else {}),
        **tail,
    }


def entry_to_text(entry: PathEntry | DirectoryEntry) -> str:
    """One entry of it as a line for a terminal."""
    path = printable(entry.path) or "."
    below = ["(with everything below)"] if entry.recursive else []
    if isinstance(entry, DirectoryEntry):
        return "  ".join([str(entry.seq), printable(entry.layer), " ".join([f"{path}/", *below])])
    words = [",".join(kind_names(entry.kinds)), path + "/" if entry.is_dir else path]
    if entry.from_path is not None:
        words.append(f"from {printable(entry.from_path)}")
    if not entry.exists:
        words.append("(gone)")
    return "  ".join([str(entry.seq), printable(entry.layer), " ".join(words + below)])


def to_text(seq: int, record: Record) -> str:
    """One record as a line for a terminal. Nothing that came from a file name can control the terminal."""
    words = [str(seq), format_time(record.time_ns), printable(record.layer) or "-", _sentence(record)]
    return "  ".join(words)


def format_time(time_ns: int) -> str:
    """RFC 3339 in UTC with nanoseconds."""
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    return f"{_format_second(seconds)}.{nanoseconds:09}Z"


@lru_cache(1024)  # neighbours share their second, and making it takes longer than all the rest of a record
def _format_second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


def printable(name: bytes | str) -> str:
    """`name` with everything escaped that is not printable text, and backslashes doubled."""
    if isinstance(name, bytes):
        name = name.decode("utf-8", "surrogateescape")
    return "".join(char if char.isprintable() and char != "\\" else _escape(char) for char in name)


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def kind_names(kinds: int) -> list[str]:
    """The words for `Kind` bits."""
    return list(_kind_names(kinds))


@lru_cache(1024)
def _kind_names(kinds: int) -> tuple[str, ...]:
    return tuple(str(kind.name).lower() for kind in Kind if kinds & kind)


def _particulars(record: Record) -> dict[str, Any]:
    """The keys that only records of this type have."""
    match record:
        case Change():
            return _change(record)
        case Desync():
            return {"reason": record.reason}
        case Resync():
            return {"closes": record.closes, "differences": record.differences}
        case Action():
            return _action(record)
        case Damage():
            return {
                "mount": record.mount,
                **_name("mount_point", record.mount_point),
                **_name("path", record.path),
                "reason": record.reason,
            }
        case Start() | Stop():
            return {"version": record.version, "boot_id": record.boot_id}


def _change(change: Change) -> dict[str, Any]:
    return {
        **_name("path", change.path),
        "kinds": kind_names(change.kinds),
        "exists": change.exists,
        "is_dir": change.is_dir,
        **(_name("from", change.from_path) if change.from_path is not None else {}),
        **({"inode": change.inode} if change.inode is not None else {}),
        **_status(change.status),
        **({"pid": change.pid} if change.pid is not None else {}),
        **(_name("command", change.command) if change.command is not None else {}),
        "via": via_name(change.via),
    }


def _status(packed: bytes | None) -> dict[str, Any]:
    if packed is None or len(packed) != STATUS.size:
        return {}
    status = unpack_status(packed)
    return {
        "mode": f"{status.mode:o}",
        "uid": status.uid,
        "gid": status.gid,
        "size": status.size,
        "mtime": format_time(status.mtime_ns),
        "ctime": format_time(status.ctime_ns),
    }


@lru_cache(16)
def via_name(via: int) -> str:
    """The word for a `Via` value."""
    return Via(via).name.lower()


def _action(action: Action) -> dict[str, Any]:
    return {
        "mount": action.mount,
        **_name("mount_point", action.mount_point),
        "method": action.method,
        "result": action.result,
        "stale_before": action.stale_before,
        "stale_after": action.stale_after,
        "duration_ns": action.duration_ns,
        "upto": action.upto,
    }


def _name(key: str, name: bytes) -> dict[str, str]:
    """`name` under `key`, and exactly under `<key>_b64` when it is not UTF-8."""
    try:
        return {key: name.decode("utf-8")}
    except UnicodeDecodeError:
        return {key: name.decode("utf-8", "replace"), f"{key}_b64": base64.b64encode(name).decode("ascii")}


def _sentence(record: Record) -> str:
    match record:
        case Change():
            return _change_sentence(record)
        case Desync():
            return f"desync: {printable(record.reason)}; changes may be missing from here on"
        case Resync():
            return f"resync: closes {record.closes}, {record.differences} differences found"
        case Action():
            return (
                f"{printable(record.method)} of {printable(record.mount_point)} ({printable(record.mount)}): "
                f"{printable(record.result)}, stale {record.stale_before} -> {record.stale_after}, "
                f"{record.duration_ns / 1e6:.3f} ms, up to {record.upto}"
            )
        case Damage():
            return (
                f"damage of {printable(record.path)} in {printable(record.mount_point)} ({printable(record.mount)}): "
                f"{printable(record.reason)}"
            )
        case Start() | Stop():
            return f"{type(record).__name__.lower()} of watchd {printable(record.version)}"


def _change_sentence(change: Change) -> str:
    path = printable(change.path) or "."
    if change.is_dir:
        path += "/"
    words = [",".join(kind_names(change.kinds)), path]
    if change.from_path is not None:
        words.append(f"from {printable(change.from_path)}")
    if not change.exists:
        words.append("(gone)")
    if change.pid is not None:
        words.append(f"by {printable(change.command or b'?')}[{change.pid}]")
    if change.via != Via.EVENT:
        words.append(f"via {via_name(change.via)}")
    return " ".join(words)
