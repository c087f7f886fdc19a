"""The values that one scalar of the configuration can hold.

Each has `parse`, which raises ValueError with the rest of a sentence that begins with the text, and `str`, its inverse.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import ClassVar, NamedTuple, Self


class Duration(int):
    """A length of time in nanoseconds, written `250ms`, `2s`, `30d`."""

    UNITS_NS: ClassVar[dict[str, int]] = {
        "ns": 1,
        "us": 1_000,
        "ms": 1_000_000,
        "s": 10**9,
        "m": 60 * 10**9,
        "h": 3600 * 10**9,
        "d": 86400 * 10**9,
    }

    @classmethod
    def parse(cls, text: str) -> Self:
        match = re.fullmatch(r"([0-9]{1,15})(ns|us|ms|s|m|h|d)", text)
        if match is None:
            raise ValueError("is no duration such as 250ms, 2s or 30d")
        return cls(int(match[1]) * cls.UNITS_NS[match[2]])

    def __str__(self) -> str:
        return _in_largest_unit(self, self.UNITS_NS)

    __repr__ = __str__


class Size(int):
    """A number of bytes, written `512B`, `64MiB`, `1GiB`."""

    UNITS_BYTES: ClassVar[dict[str, int]] = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

    @classmethod
    def parse(cls, text: str) -> Self:
        match = re.fullmatch(r"([0-9]{1,15})(B|KiB|MiB|GiB|TiB)", text)
        if match is None:
            raise ValueError("is no size such as 512KiB, 64MiB or 1GiB")
        return cls(int(match[1]) * cls.UNITS_BYTES[match[2]])

    def __str__(self) -> str:
        return _in_largest_unit(self, self.UNITS_BYTES)

    __repr__ = __str__


class Percentage(float):
    """A share of a whole as a fraction (0.1), written `10%` with at most three decimals."""

    @classmethod
    def parse(cls, text: str) -> Self:
        match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)%", text)
        if match is None:
            raise ValueError("is no percentage such as 10%")
        return cls(Fraction(match[1]) / 100)

    def __str__(self) -> str:
        return f"{float(self) * 100:.3f}".rstrip("0").rstrip(".") + "%"

    __repr__ = __str__


class FileMode(int):
    """Permission bits, written in octal: `"0660"`."""

    @classmethod
    def parse(cls, text: str) -> Self:
        if re.fullmatch(r"0?[0-7]{3}", text) is None:
            raise ValueError("is no octal file mode such as 0660")
        return cls(int(text, 8))

    def __str__(self) -> str:
        return format(int(self), "04o")

    __repr__ = __str__


class Address(NamedTuple):
    """A TCP address to listen on, written `127.0.0.1:9877` or `[::1]:9877`."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([\w.-]+)):([0-9]{1,5})", text, re.ASCII)
        if match is None or not 1 <= int(match[3]) <= 65535:
            raise ValueError("is no address such as 127.0.0.1:9877, and not off")
        return cls(match[1] or match[2], int(match[3]))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Range(NamedTuple):
    """The values that a key accepts, both ends included, as they are written."""

    low: str
    high: str


def _in_largest_unit(amount: int, units: dict[str, int]) -> str:
    """Exactly that amount in the largest unit that divides it; zero is given in the smallest."""
    unit = next((unit for unit in reversed(units) if amount and amount % units[unit] == 0), next(iter(units)))
    return f"{int(amount) // units[unit]}{unit}"
