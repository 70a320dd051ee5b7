"""Figures of a report as inline SVG text: they take the page's text color, so they read on light and dark ground.

Every function gives one <svg> element without scripts or outside references. matplotlib is imported on first use.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, float]]
"""Rows of metrics.jsonl: "step" and statistics by place/name; NaN = nothing scored."""

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7a5195", "#8c564b")
"""Distinct for color-blind readers (after Okabe and Ito), and visible on white and on near black."""
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
MARGINS = {"left": 0.15, "right": 0.98, "bottom": 0.16, "top": 0.9}
"""Of curves, which so stand below each other in a column: room for seven digits and a unit."""


def curves(metrics: Metrics, keys: Mapping[str, str], title: str, unit: str = "") -> str:
    """Lines over outer iterations; ``keys`` maps a key of the metrics to its name in the legend. "" without values."""
    with _styled(title):
        figure, axes = _figure(MARGINS)
        drawn = [_line(axes, metrics, key, name, PALETTE[k % 8]) for k, (key, name) in enumerate(keys.items())]
        if not any(drawn):
            return ""
        axes.set(xlabel="outer iteration", ylabel=unit, title=title)
        if len(keys) > 1:
            axes.legend()
        return _svg(figure, title)


def radar(rows: Mapping[str, Mapping[str, Any]], tasks: Sequence[str], title: str = "ShapesEval by task") -> str:
    """One closed line per row (name -> Evaluation.json()) over the tasks, 0 in the middle, 1 at the rim."""
    with _styled(title):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.6, 4.2), layout="constrained")
        axes: Any = figure.add_subplot(projection="polar")
        angles = [2 * math.pi * k / len(tasks) for k in range(len(tasks))]
        for k, (name, row) in enumerate(rows.items()):
            values = [_number(row["shapeseval"].get(task)) for task in tasks]
            axes.plot([*angles, angles[0]], [*values, values[0]], color=PALETTE[k % 8], label=name, linewidth=1.8)
            axes.fill(angles, values, color=PALETTE[k % 8], alpha=0.06)
        axes.set_xticks(angles, [task.replace("_", " ") for task in tasks])
        axes.tick_params(axis="x", pad=10)
        axes.set_ylim(0, 1)
        axes.set_yticks([0.25, 0.5, 0.75, 1.0], ["", ".5", "", "1"])
        axes.set_theta_offset(math.pi / 2)
        axes.spines["polar"].set_visible(True)
        if rows:
            figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, title)


def axes_radar(axes_names: Sequence[str], rows: Mapping[str, Sequence[float | None]], title: str) -> str:
    """One closed line per row; an axis runs from the worst row (inner ring) to the best (rim), values at its name.

    "" below three axes or two rows, and where a value is missing.
    """
    values = [list(column) for column in zip(*rows.values(), strict=True)]
    if len(axes_names) < 3 or len(rows) < 2 or any(value is None for column in values for value in column):
        return ""
    known = [[_number(value) for value in column] for column in values]
    with _styled(title):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.6, 4.2), layout="constrained")
        axes: Any = figure.add_subplot(projection="polar")
        angles = [2 * math.pi * k / len(axes_names) for k in range(len(axes_names))]
        for k, name in enumerate(rows):
            spans = [(column[k] - min(column), max(column) - min(column)) for column in known]
            radii = [0.2 + 0.8 * (up / span if span else 1.0) for up, span in spans]
            axes.plot([*angles, angles[0]], [*radii, radii[0]], color=PALETTE[k % 8], label=name, linewidth=1.8)
        ends = [
            f"{name}\n{min(column):.4g} to {max(column):.4g}" for name, column in zip(axes_names, known, strict=True)
        ]
        axes.set_xticks(angles, ends)
        axes.tick_params(axis="x", pad=12)
        axes.set_ylim(0, 1.03)
        axes.set_yticks([0.2, 0.6, 1.0], ["", "", ""])
        axes.set_theta_offset(math.pi / 2)
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, title)


def r_histogram(metrics: Metrics, title: str = "Optimality r over training") -> str:
    """Share of targets in each tenth of r (upwards) over outer iterations (to the right); "" without values."""
    keys = [f"histogram/r_{k}" for k in range(BINS)]
    rows = [row for row in metrics if all(math.isfinite(row.get(key, math.nan)) for key in keys)]
    if not rows:
        return ""
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
        axes.set(xlabel="outer iteration", ylabel="r", title=title)
        figure.colorbar(shown, ax=axes, label="share of targets")
        return _svg(figure, title)


def bars(values: Mapping[str, float | None], title: str, unit: str) -> str:
    """Horizontal bars on a logarithmic axis, with their numbers; for speeds that differ by orders of magnitude."""
    known = {name: value for name, value in values.items() if value is not None and value > 0}
    if not known:
        return ""
    with _styled(title):
        figure, axes = _figure(height=0.9 + 0.4 * len(known))
        names = list(known)[::-1]
        drawn = axes.barh(names, [known[name] for name in names], color=PALETTE[0])
        axes.bar_label(drawn, [f"{known[name]:,.1f}" for name in names], padding=4, color=INK)
        axes.set(xscale="log", title=title, xlabel=f"{unit} (logarithmic)")
        axes.margins(x=0.15)
        axes.grid(visible=False)
        axes.tick_params(axis="x", which="both", bottom=False, labelbottom=False)  # the bars carry their numbers
        return _svg(figure, title)


def _line(axes: Axes, metrics: Metrics, key: str, name: str, color: str) -> bool:
    points = [(row["step"], row[key]) for row in metrics if key in row and math.isfinite(row[key])]
    if points:
        axes.plot(*zip(*points, strict=True), label=name, color=color, linewidth=1.6, marker=_marker(points))
    return bool(points)


def _marker(points: Sequence[tuple[float, float]]) -> str:
    """Single points would be invisible as a line."""
    return "o" if len(points) < 3 else ""


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _styled(salt: str) -> Any:
    """Our style alone; the salt keeps the ids of two figures on one page apart, and the same from run to run."""
    from matplotlib import rc_context

    return rc_context({**STYLE, "svg.hashsalt": salt})


def _figure(margins: Mapping[str, float] | None = None, height: float = 3.0) -> tuple[Figure, Axes]:
    """``margins`` None: made to fit, which takes more than half of the time of a figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, height), layout="none" if margins else "constrained")
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
    return text.replace(INK, "currentColor")
