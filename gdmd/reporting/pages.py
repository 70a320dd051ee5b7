"""Self-contained HTML pages: one look, and dot plots with intervals in plain HTML.

Templates extend ``reporting/base.html.jinja`` and take their parts from ``reporting/macros.html.jinja``. Every text is
escaped; a page loads nothing and runs nothing.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from gdmd.reporting.tables import Cell


@dataclass(frozen=True)
class Number:
    """A large number at the top of a page and what it is."""

    label: str
    value: str


@dataclass(frozen=True)
class Verdict:
    """The answer of a page: one sentence, a few numbers, and notes on how to read them."""

    sentence: str
    numbers: Sequence[Number] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class TableRow:
    """A measure and its value for each model."""

    title: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Group:
    """Rows of a table under a heading; ``mark`` ("trained", "unseen" or "") colors it."""

    title: str
    rows: Sequence[TableRow]
    mark: str = ""


@dataclass(frozen=True)
class Dot:
    """A row of a dot plot. low, high: its 95 % interval, NaN where unknown."""

    label: str
    color: str
    mean: float
    low: float = math.nan
    high: float = math.nan
    text: str = ""


@dataclass(frozen=True)
class DotPlot:
    """Rows on a common axis; positions are percent of its width. reference: a line to compare with."""

    title: str
    rows: Sequence[tuple[Dot, float, float, float]]  # dot, position, start and width of the interval
    ticks: Sequence[tuple[float, str]]
    reference: float | None = None
    note: str = ""

    @property
    def long(self) -> bool:
        """Whether labels and values leave no room for the axis between them in a narrow panel."""
        return max(len(dot.label) + len(dot.text) for dot, *_ in self.rows) > 30


def dot_plot(title: str, dots: Sequence[Dot], reference: float | None = None, note: str = "") -> DotPlot | None:
    """The plot of the dots that have a mean; None without any."""
    dots = [dot for dot in dots if math.isfinite(dot.mean)]
    if not dots:
        return None
    ends = [end for dot in dots for end in (dot.mean, dot.low, dot.high) if math.isfinite(end)]
    low, high, ticks = _axis([*ends, *([] if reference is None else [reference])])

    def percent(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    rows = []
    for dot in dots:
        start, end = (dot.mean if math.isnan(end) else end for end in (dot.low, dot.high))
        rows.append((dot, percent(dot.mean), percent(start), round(percent(end) - percent(start), 2)))
    shown = [(percent(value), text) for value, text in ticks]
    return DotPlot(title, rows, shown, None if reference is None else percent(reference), note)


def _axis(values: Sequence[float]) -> tuple[float, float, list[tuple[float, str]]]:
    """Ends of an axis around the values and round ticks on it; fewer where their labels are long."""
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 0.05 * abs(low) or 0.05
    low, high = low - pad, high + pad
    power = math.floor(math.log10((high - low) / 5))
    digits = max(0, -power)
    most = {0: 6, 1: 5, 2: 4}.get(digits, 3)
    step = next(f * 10.0**power for f in (1, 2, 5, 10, 20, 50) if (high - low) / (f * 10.0**power) <= most)
    digits = max(0, -math.floor(math.log10(step * 1.0001)))
    first = math.ceil(low / step)
    ticks = [(k * step, f"{k * step:.{digits}f}") for k in range(first, math.floor(high / step) + 1)]
    return low, high, [(value, "0" if float(text) == 0 else text) for value, text in ticks]


def digits_for(halves: Sequence[float]) -> int:
    """Decimals that show two digits of the smallest half width, at least three and at most five."""
    known = [half for half in halves if half > 1e-6 and math.isfinite(half)]  # below: rounding
    return 3 if not known else min(5, max(3, 1 - math.floor(math.log10(min(known)))))


def data_uri(content: bytes, kind: str = "png") -> str:
    """An image as the value of ``src``."""
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def render(template: str, **values: Any) -> str:
    """A page from a template, named by its path in the package."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def source(name: str) -> str:
        return resources.files("gdmd").joinpath(*name.split("/")).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(source), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**values)
