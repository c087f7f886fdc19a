"""What was measured, as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

WATCHD = "watchd"
NOTHING = "-"


class Target(msgspec.Struct, frozen=True):
    """What watchd has to reach: at most or at least `limit`, of its own value or of its ratio to the row's reference."""

    limit: float
    is_ratio: bool = False
    is_least: bool = False

    def __str__(self) -> str:
        return f"{'>=' if self.is_least else '<='} {self.limit:,g}{'x' if self.is_ratio else ''}"

    def is_met(self, value: float) -> bool:
        """Whether `value` is on the right side."""
        return value >= self.limit if self.is_least else value <= self.limit


class Row(msgspec.Struct, frozen=True):
    """One quantity, for each subject that has it."""

    benchmark: str
    name: str
    unit: str
    values: dict[str, float | None]
    """By subject; None if it could not be measured."""
    reference: str | None = None
    """The baseline that the ratio is taken to."""
    target: Target | None = None

    def ratio(self) -> float | None:
        """watchd's value divided by the reference's, None if there is none."""
        ours, theirs = self.values.get(WATCHD), self.values.get(self.reference or "")
        return ours / theirs if ours is not None and theirs else None

    def verdict(self) -> str | None:
        """ok, or over (under a target that is a least), None if there is nothing to judge."""
        judged = self.ratio() if self.target and self.target.is_ratio else self.values.get(WATCHD)
        if self.target is None or judged is None:
            return None
        if self.target.is_met(judged):
            return "ok"
        return "under" if self.target.is_least else "over"


class Report(msgspec.Struct, frozen=True):
    """A whole run."""

    machine: dict[str, str | int]
    parameters: dict[str, object]
    rows: list[Row]
    notes: list[str]

    def to_json(self) -> bytes:
        """The report as one JSON object, with ratios and verdicts."""
        rows = [{**msgspec.to_builtins(row), "ratio": row.ratio(), "verdict": row.verdict()} for row in self.rows]
        plain = {"machine": self.machine, "parameters": self.parameters, "rows": rows, "notes": self.notes}
        return msgspec.json.format(msgspec.json.encode(plain), indent=2) + b"\n"

    def to_text(self) -> str:
        """The report as aligned tables, one for each benchmark."""
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        benchmarks = dict.fromkeys(row.benchmark for row in self.rows)
        tables = [_table([row for row in self.rows if row.benchmark == benchmark]) for benchmark in benchmarks]
        return "\n\n".join([machine, *tables, *self.notes])


def _number(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def _table(rows: Sequence[Row]) -> str:
    subjects = list(dict.fromkeys([WATCHD, *(subject for row in rows for subject in row.values)]))
    lines = [[rows[0].benchmark, "unit", *subjects, "ratio", "to", "target", ""]]
    for row in rows:
        ratio = row.ratio()
        lines.append(
            [
                row.name,
                row.unit,
                *(_number(row.values.get(subject)) for subject in subjects),
                NOTHING if ratio is None else f"{ratio:.2f}",
                row.reference or NOTHING,
                str(row.target or NOTHING),
                row.verdict() or "",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(_align, line, widths, range(len(line)))).rstrip() for line in lines)


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)
