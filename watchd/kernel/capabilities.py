"""What this process may do (capabilities(7)).

Facts: the mask of effective capabilities stands in /proc/<pid>/status as `CapEff`, a hexadecimal number with a bit for each.
"""

from __future__ import annotations

from collections.abc import Mapping


def missing_capabilities(wanted: Mapping[str, int]) -> list[str]:
    """The names of those that are not effective, of `wanted` name -> bit."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    return [name for name, bit in wanted.items() if not effective >> bit & 1]
