"""Curves of a report as inline SVG text, in the page's text color; and the color of every method.

Every function returns one <svg> element without scripts or outside references. matplotlib is imported on first use.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, float]]
"""Rows of metrics.jsonl: "step" and statistics by group/name; NaN = nothing scored."""
Points = Sequence[tuple[float, float]]

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7a5195", "#8c564b")
"""Distinct for color-blind readers (after Okabe and Ito), and visible on white and on near black."""
COLORS: Mapping[str, str] = {
    "teacher": "#7d8590",
    "dmd": PALETTE[0],
    "gdmd": PALETTE[1],
    "dmdr": PALETTE[2],
    "dmd_refl": PALETTE[3],
    "gdmd_tilted": PALETTE[4],
    "dmd2": PALETTE[5],
    "dmd_nft": PALETTE[6],
    "dmd_grpo": PALETTE[7],
}
"""The color of a method in every figure and page, by method.kind."""
_MORE = ("#3b3b98", "#a0a000", "#00838f", "#ad1457", "#6d8b00", "#5d6d7e")
INK = "#123456"  # stands for the page's text color until the SVG is written
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "grid.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
BINS = 10
MARGINS = {"left": 0.15, "right": 0.97, "bottom": 0.18, "top": 0.96}
"""Margins of curve plots, the same for all, so that their axes align in a column: room for seven digits and a unit."""


def method_in(name: str) -> str | None:
    """The method that the name of a model or sampler mentions: "tilted GDMD, 4 steps" -> gdmd_tilted; None without one."""
    words = f"_{re.sub('[^a-z0-9]+', '_', name.lower())}_".replace("_tilted_gdmd_", "_gdmd_tilted_")
    found = [kind for kind in COLORS if f"_{kind}_" in words]
    return max(found, key=len, default=None)


def colors_of(names: Sequence[str]) -> list[str]:
    """The color of each name: its method's for every teacher and for the first that mentions it, else one that is free.

    A name that is the method's own goes before one that mentions it: of gdmd_paper and gdmd, gdmd has the color.
    """
    owner: dict[str, int] = {}
    for k in sorted(range(len(names)), key=lambda k: names[k] not in COLORS):
        owner.setdefault(method_in(names[k]) or "", k)
    own = [m if (m := method_in(name)) and (m == "teacher" or owner[m] == k) else None for k, name in enumerate(names)]
    free = [color for color in (*PALETTE, *_MORE) if color not in {COLORS[m] for m in own if m}]
    others = [k for k, method in enumerate(own) if method is None]
    return [COLORS[m] if m else free[others.index(k) % len(free)] for k, m in enumerate(own)]


def curves(metrics: Metrics, keys: Mapping[str, str], title: str) -> str:
    """Lines over outer iterations; ``keys`` maps a key of the metrics to its name in the legend. "" without values.

    The title names the figure to a screen reader and is not drawn.
    """
    with _styled(title):
        figure, axes = _figure(MARGINS)
        drawn = [_line(axes, metrics, key, name, PALETTE[k % 8]) for k, (key, name) in enumerate(keys.items())]
        if not any(drawn):
            return ""
        axes.set(xlabel="outer iteration")
        if len(keys) > 1:
            axes.legend()
        return _svg(figure, title)


def compared_curves(own: Points, others: Mapping[str, Points], title: str) -> str:
    """A run's curve over the share of the run that is done, and in gray those of other runs behind it."""
    with _styled(title):
        figure, axes = _figure(MARGINS)
        for k, (name, points) in enumerate(others.items()):
            style = ("-", "--", ":", "-.")[k % 4]
            axes.plot(*zip(*points, strict=True), label=name, color=COLORS["teacher"], linestyle=style, linewidth=1.4)
        axes.plot(*zip(*own, strict=True), label="this run", color=PALETTE[1], linewidth=2, marker=_marker(own))
        axes.set(xlabel="share of the run", xlim=(0, 1))
        axes.legend()
        return _svg(figure, title)


class Chart(NamedTuple):
    """One of ``stacked_curves``: its title, its key of the metrics, and the teacher's value."""

    title: str
    key: str
    teacher: float | None = None


def stacked_curves(metrics: Metrics, charts: Sequence[Chart], title: str) -> str:
    """A column of charts, one per key, over outer iterations; a dashed line is the teacher. "" without values."""
    shown = [one for one in charts if any(math.isfinite(row.get(one.key, math.nan)) for row in metrics)]
    if not shown:
        return ""
    from matplotlib.figure import Figure

    with _styled(title):
        figure = Figure(figsize=(4.6, 0.6 + 1.5 * len(shown)), layout="constrained")
        column = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
        for k, (axes, one) in enumerate(zip(column, shown, strict=True)):
            _line(axes, metrics, one.key, "student", PALETTE[k % 8])
            if one.teacher is not None:
                axes.axhline(one.teacher, color=COLORS["teacher"], linestyle="--", linewidth=1.2, label="teacher")
                axes.legend()
            axes.set_title(one.title, loc="left")
        column[-1].set(xlabel="outer iteration")
        return _svg(figure, title)


def r_histogram(metrics: Metrics) -> str:
    """Share of targets in each tenth of r (upwards) over outer iterations (to the right); "" without values."""
    keys = [f"histogram/r_{k}" for k in range(BINS)]
    rows = [row for row in metrics if all(math.isfinite(row.get(key, math.nan)) for key in keys)]
    if not rows:
        return ""
    title = "Optimality r over training"
    with _styled(title):
        figure, axes = _figure()
        shares = [[row[key] for row in rows] for key in keys]
        steps = [row["step"] for row in rows]
        span = steps[-1] - steps[0] or 1
        edges = (steps[0] - span / max(len(steps) - 1, 1) / 2, steps[-1] + span / max(len(steps) - 1, 1) / 2)
        axes.grid(False)
        shown = axes.imshow(
            shares,
            origin="lower",
            aspect="auto",
            extent=(*edges, 0, 1),
            cmap="viridis",
            interpolation="nearest",
            vmin=0,
        )
        axes.axhline(0.5, color="white", linewidth=0.8, linestyle="--")
        axes.set(xlabel="outer iteration", ylabel="r")
        figure.colorbar(shown, ax=axes, label="share of targets")
        return _svg(figure, title)


def _line(axes: Axes, metrics: Metrics, key: str, name: str, color: str) -> bool:
    points = [(row["step"], row[key]) for row in metrics if key in row and math.isfinite(row[key])]
    if points:
        axes.plot(*zip(*points, strict=True), label=name, color=color, linewidth=1.6, marker=_marker(points))
    return bool(points)


def _marker(points: Points) -> str:
    """A marker for one or two points, which are hard to see as a line."""
    return "o" if len(points) < 3 else ""


def _styled(salt: str) -> Any:
    """Our style alone; the salt keeps the ids of two figures on one page apart, and the same from run to run."""
    from matplotlib import rc_context

    return rc_context({**STYLE, "svg.hashsalt": salt})


def _figure(margins: Mapping[str, float] | None = None) -> tuple[Figure, Axes]:
    """``margins`` None: fitted to the labels, which takes more than half of the time of a figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.8), layout="none" if margins else "constrained")
    if margins:
        figure.subplots_adjust(**margins)
    return figure, figure.add_subplot()


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Title": title})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return text.replace(INK, "currentColor")
