"""Tables of numbers, built once and shown on a terminal, as Markdown or by a template.

Readers see every number in one format: ``0.644 +- 0.020`` (mean and standard deviation), ``0.644 [0.624, 0.664]`` (95 %
interval), ``+0.056 [+0.033, +0.079]`` (difference), and ``-`` for what was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.table

MISSING = "-"
Place = tuple[str, ...]
"""Where a nested record holds a number: keys from the outside in, for example ("rewards", "shapes_clip")."""


@dataclass(frozen=True)
class Measure:
    """A measured quantity: its title and where a record holds it. best: +1 higher, -1 lower is better, 0 neither."""

    title: str
    place: Place
    best: int = 1
    digits: int = 3
    scale: float = 1.0

    def of(self, record: Mapping[str, Any]) -> float | None:
        """The number of a record; None if it was not measured."""
        return value_at(record, self.place)


@dataclass(frozen=True)
class Cell:
    """The text of a cell, and whether to emphasize it as the best of its column (or row)."""

    text: str = MISSING
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Titles of the columns and rows of cells; the first cell of a row names it. ``str(table)`` is Markdown.

    sections: groups of rows, separated by a line on a terminal.
    """

    columns: Sequence[str]
    sections: Sequence[Sequence[Sequence[Cell]]]

    @property
    def rows(self) -> Iterator[Sequence[Cell]]:
        """The rows of all sections."""
        return (row for section in self.sections for row in section)

    def __bool__(self) -> bool:
        """Whether there are rows."""
        return any(self.sections)

    def __str__(self) -> str:
        """A Markdown table with numbers aligned right and the best in bold; "" without rows."""
        if not self:
            return ""
        ruler = [":--", *("--:" for _ in self.columns[1:])]
        body = [[f"**{cell.text}**" if cell.best else cell.text for cell in row] for row in self.rows]
        lines = [" | ".join(text.replace("|", "\\|") for text in line) for line in (self.columns, ruler, *body)]
        return "".join(f"| {line} |\n" for line in lines)

    def rich(self, title: str = "", width: int | None = None) -> rich.table.Table:
        """The table for a terminal. width: the largest width of a column of numbers."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        shown = RichTable(title=title or None, title_justify="left", pad_edge=False, box=box.SIMPLE)
        shown.add_column(self.columns[0], no_wrap=True)
        for name in self.columns[1:]:
            shown.add_column(Text(name), justify="right", max_width=width)
        for section in self.sections:
            for row in section:
                shown.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in row))
            shown.add_section()
        return shown

    def data(self) -> dict[str, Any]:
        """Plain data for a template: {"columns": [text], "rows": [[{"text", "best"}]]}."""
        rows = [[{"text": cell.text, "best": cell.best} for cell in row] for row in self.rows]
        return {"columns": list(self.columns), "rows": rows}


def texts(*values: str) -> list[Cell]:
    """A row of plain cells."""
    return [Cell(value) for value in values]


def value_at(record: Mapping[str, Any], place: Place) -> float | None:
    """The number at a place of a nested record; None if it was not measured."""
    found: Any = record
    for key in place:
        found = found.get(key) if isinstance(found, Mapping) else None
    return None if found is None else float(found)


def best_of(values: Sequence[float | None], direction: int) -> float | None:
    """The highest (direction 1) or lowest (-1) value; None without a direction, or if all values are equal."""
    known = {value for value in values if value is not None and not math.isnan(value)}
    if not direction or len(known) < 2:
        return None
    return max(known) if direction > 0 else min(known)


def number(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """0.644 or 1,200; with ``signed`` +0.644."""
    if value is None or math.isnan(value):
        return MISSING
    rounded = round(value, digits) + 0.0  # -0.0 is 0
    return f"{rounded:{'+' if signed else ''},.{digits}f}"


def plus_minus(mean: float | None, std: float, digits: int = 3) -> str:
    """0.644 +- 0.020, or 0.644 without a spread (NaN)."""
    spread = "" if math.isnan(std) else f" +- {number(std, digits)}"
    return MISSING if number(mean) == MISSING else number(mean, digits) + spread


def interval(low: float | None, high: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """[0.624, 0.664]"""
    ends = number(low, digits, signed=signed), number(high, digits, signed=signed)
    return MISSING if MISSING in ends else f"[{', '.join(ends)}]"


def estimate(
    value: float | None, low: float | None, high: float | None, digits: int = 3, *, signed: bool = False
) -> str:
    """0.644 [0.624, 0.664], or 0.644 without an interval."""
    ends = interval(low, high, digits, signed=signed)
    shown = number(value, digits, signed=signed)
    return shown if MISSING in (shown, ends) else f"{shown} {ends}"


def difference(value: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    """+0.056 [+0.033, +0.079]"""
    return estimate(value, low, high, digits, signed=True)


def p_value(p: float) -> str:
    """0.042, or < 0.001."""
    return "< 0.001" if p < 0.001 else number(p)
