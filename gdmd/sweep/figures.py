"""Figures of a sweep that need only its table: scores, all measures, divergence of gradients, reward curves.

Each is a PNG on white, so that it looks the same on every page. matplotlib is imported on first use.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdmd.io import writing
from gdmd.reporting.plots import BINS, COLORS, colors_of
from gdmd.shapes.evaluate import HELDOUT
from gdmd.sweep.tables import OVERALL, Line, Results, Row, quality

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT = "#1d1f24", "#8a8f99"
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.parse_math": False,
}
DPI = 110
MARGIN = 0.08
"""Margin of the score axis on both sides of the seeds; wider intervals are cut off."""
MOST_LINES = 8
"""Largest number of students in the figure of all measures."""
COLUMNS = 4
"""Panels per line of that figure."""
FIGURES: Mapping[str, tuple[str, str]] = {
    "overall.png": (
        "ShapesEval overall",
        "Dots are seeds, diamonds their mean, bars its 95 % t interval (a wide one is cut off); the dashed line is the best "
        "teacher row.",
    ),
    "fig1_measures.png": (
        "Fig. 1: all measures",
        "Means over seeds with 95 % t intervals (a wide one is cut off). †: trained on. Fréchet: lower is better.",
    ),
    "fig3_features.png": (
        "Fig. 3: feature space of the held-out scorer",
        "Two principal components (of all panels together) of images of 8 colors x 6 objects; the color of a point is "
        "the caption's color, its marker the object (a plus is a cross, a star a ring). Spread is the mean distance to the "
        "center of the cluster: lower is tighter but also less diverse, so the mean pairwise distance within a cluster is "
        "given too. Outliers (black rings) are closer to the center of another cluster's true renders than to that of "
        "their own.",
    ),
    "fig4_divergence.png": (
        "Fig. 4: do reward and distillation gradients agree?",
        "First seed. Cosine of the reward's gradient and of DMD's in parameter space on identical draws (1: the reward "
        "only rescales the DMD step; 0: unrelated; below 0: opposed); share of targets with r < 1/2; distribution of r "
        "over the second half (W = r at lambda = gamma, beta = 1; softmax weights come from the same scores); change of the "
        "trained rewards of the one-step output per student update, in standard deviations of the "
        "batch. Each point is one iteration on one batch, so small changes are noise, above all for a reward with few "
        "values; they end at 0 with the learning rate.",
    ),
    "fig4_curves.png": (
        "Fig. 4: without a cold start",
        "First seed, from the first update on: the rewards that a row was trained on (mean change since the start) next to "
        "measures that no row was trained on. Trained rewards up and unseen measures down would be reward hacking.",
    ),
    "fig6_grid.png": ("Fig. 6: the same noise, method by method", "Two images per caption and method."),
    "fig7_grid.png": (
        "Fig. 7: positions and attribute binding",
        "The two hardest tasks, the same noise in every column.",
    ),
}
"""File name -> (title, what to see); in the order of the page."""


def draw_all(results: Results, folder: Path, features: Sequence[Mapping[str, Any]]) -> None:
    """Write every figure for which there are numbers; ``features`` are the panels of ``feature_figure``."""
    drawers: dict[str, Callable[[], Figure | None]] = {
        "overall.png": lambda: overall_figure(results),
        "fig1_measures.png": lambda: measure_figure(results),
        "fig3_features.png": lambda: feature_figure(features),
        "fig4_divergence.png": lambda: divergence_figure(results),
        "fig4_curves.png": lambda: curve_figure(results),
    }
    _draw(drawers, folder)


def draw_pipelines(families: Mapping[str, Results], folder: Path) -> None:
    """Write FAMILY_overall.png of every family of a sweep over pipelines."""
    _draw({f"{name}_overall.png": partial(overall_figure, results) for name, results in families.items()}, folder)


def _draw(drawers: Mapping[str, Callable[[], Figure | None]], folder: Path) -> None:
    from matplotlib import rc_context

    with writing("the figures", folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, draw in drawers.items():
        with rc_context(STYLE):
            figure = draw()
            if figure is not None:
                _save(figure, folder / name)


def overall_figure(results: Results) -> Figure | None:
    """Seeds and interval of the overall score, row by row."""
    rows = results.present()[::-1]
    if not rows:
        return None
    figure, axes = _figure(7.2, 0.9 + 0.3 * len(rows))
    for place, row in enumerate(rows):
        values = list(results.values(row.name, OVERALL).values())
        axes.plot(values, [place] * len(values), "o", color=_color(results, row), alpha=0.45, markersize=4)
        _dot(axes, results, row, OVERALL, place)
        text = f"{_mean(results, row, OVERALL):.3f}"
        axes.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8.5)
    top = max((row for row in rows if row.kind == "teacher"), key=lambda r: _mean(results, r, OVERALL), default=None)
    if top is not None:
        axes.axvline(_mean(results, top, OVERALL), color=SOFT, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    seen = [value for row in rows for value in results.values(row.name, OVERALL).values()]
    edges = (max(0.0, min(seen) - MARGIN), min(1.0, max(seen) + MARGIN))
    axes.set(xlabel="ShapesEval overall", ylim=(-0.6, len(rows) - 0.4), xlim=edges)
    axes.grid(axis="y", visible=False)
    return figure


def measure_figure(results: Results) -> Figure | None:
    """A dot plot of every quality measure: mean and interval, row by row."""
    rows = _shown(results)[::-1]
    measures = [m for m in quality(results) if m.best and any(results.summary(r.name, m.place) for r in rows)]
    if len(rows) < 2:
        return None
    from matplotlib.figure import Figure

    lines = -(-len(measures) // COLUMNS)
    figure = Figure(figsize=(10.2, lines * (0.9 + 0.24 * len(rows))), layout="constrained")
    grid = figure.subplots(lines, COLUMNS, sharey=True, squeeze=False)
    for axes, measure in zip(grid.flat, measures, strict=False):
        for place, row in enumerate(rows):
            _dot(axes, results, row, measure.place, place)
        means = [_mean(results, row, measure.place) for row in rows]
        known = [mean for mean in means if math.isfinite(mean)]
        pad = 0.35 * (max(known) - min(known)) + 0.01 * abs(max(known))
        axes.set(title=measure.title, xlim=(min(known) - pad, max(known) + pad), ylim=(-0.6, len(rows) - 0.4))
        axes.set_yticks(range(len(rows)), [row.title for row in rows])
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="y", visible=False)
    for axes in list(grid.flat)[len(measures) :]:
        axes.set_visible(False)
    return figure


def _dot(axes: Axes, results: Results, row: Row, place: tuple[str, ...], height: float) -> None:
    """The mean of a row and its interval, where it has several seeds."""
    found = results.summary(row.name, place)
    if found is None:
        return
    half = 0.0 if math.isnan(found.low) else found.mean - found.low
    color = _color(results, row)
    axes.errorbar(found.mean, height, xerr=half, fmt="D", color=color, capsize=3, markersize=5, linewidth=1.6)


def feature_figure(panels: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Scatter plots from ``sweep.images``: title, points (x, y, color, marker, outlier), three scores."""
    if not panels:
        return None
    from matplotlib.figure import Figure

    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(2.7 * columns, 2.9 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _scatter(axes, panel)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    return figure


def divergence_figure(results: Results) -> Figure | None:
    """Four panels over student updates (the third: over r)."""
    lines = _diagnosed(results)
    if not lines:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 6.4), layout="constrained")
    (top, share), (spread, change) = figure.subplots(2, 2)
    for row, line in lines:
        _points(top, results, row, line, "cosine")
        _points(change, results, row, line, "change")
        _r_distribution(spread, results, row, line)
    _share_bars(share, results, lines)
    spread.set_visible(bool(spread.patches))
    top.axhline(0, color=SOFT, linewidth=0.8)
    change.axhline(0, color=SOFT, linewidth=0.8)
    top.set(title="cosine of RL and DMD gradients", xlabel="student updates", ylim=(-1.08, 1.08))
    spread.axvline(0.5, color=SOFT, linestyle="--", linewidth=0.8)
    spread.set(title="distribution of r", xlabel="r", ylabel="share of targets", xlim=(0, 1))
    change.set(title="realized reward change per update", xlabel="student updates", ylabel="batch std")
    handles = {
        text: line
        for axes in (top, change, spread)
        for line, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure


def curve_figure(results: Results) -> Figure | None:
    """Trained rewards, held-out scorer and ShapesEval over student updates."""
    lines = [(row, line) for row, line in _diagnosed(results) if row.kind != "control" or row.name == results.headline]
    if not lines:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.2, 3.7), layout="constrained")
    trained, heldout, overall = figure.subplots(1, 3)
    for row, line in lines:
        points = line["points"]
        updates = [point["updates"] for point in points]
        gains = [_gain(points, k, line["trained"] or results.trained) for k in range(len(points))]
        style = {**_look(results, row), "marker": "o", "markersize": 3}
        trained.plot(updates, gains, label=row.title, **style)
        heldout.plot(updates, [point["rewards"].get(HELDOUT, math.nan) for point in points], **style)
        overall.plot(updates, [point["shapeseval"] for point in points], **style)
    trained.set(title="trained rewards, change since start", xlabel="student updates")
    heldout.set(title="held-out scorer (unseen)", xlabel="student updates")
    overall.set(title="ShapesEval (unseen)", xlabel="student updates")
    figure.legend(loc="outside lower center", ncols=5)
    return figure


def _gain(points: Sequence[Mapping[str, Any]], k: int, trained: Sequence[str]) -> float:
    """Mean change since the first point, over the trained rewards that were measured."""
    known = [name for name in trained if name in points[0]["rewards"]]
    changes = [points[k]["rewards"][name] - points[0]["rewards"][name] for name in known]
    return sum(changes) / len(changes) if changes else math.nan


def _points(axes: Axes, results: Results, row: Row, line: Line, key: str) -> None:
    found = [(p["updates"], p[key]) for p in line["points"] if p.get(key) is not None]
    if found:
        style = {**_look(results, row), "marker": "o", "markersize": 3}
        axes.plot(*zip(*found, strict=True), label=row.title, **style)


def _r_distribution(axes: Axes, results: Results, row: Row, line: Line) -> None:
    shares = [line.get("statistics", {}).get(f"histogram/r_{k}") for k in range(BINS)]
    if None in shares or row.kind == "control":
        return
    edges = [k / BINS for k in range(BINS + 1)]
    axes.stairs(shares, edges, label=row.title, **_look(results, row))


def _share_bars(axes: Axes, results: Results, lines: Sequence[tuple[Row, Line]]) -> None:
    """Share of r < 1/2 for each method that logs it."""
    key = "weight/share_below_half"
    own = [(row, line["statistics"][key]) for row, line in lines if key in line.get("statistics", {})][::-1]
    axes.set_visible(bool(own))
    colors = [_color(results, row) for row, _ in own]
    hatches = [_HATCHES[_cycle(results, row)] for row, _ in own]
    axes.barh([row.title for row, _ in own], [v for _, v in own], color=colors, hatch=hatches, edgecolor="white")
    axes.axvline(0.5, color=SOFT, linestyle="--", linewidth=0.8)
    axes.set(title="share of targets with r < 1/2", xlim=(0, 1))
    axes.grid(axis="y", visible=False)


def _scatter(axes: Axes, panel: Mapping[str, Any]) -> None:
    for marker in dict.fromkeys(point[3] for point in panel["points"]):
        own = [point for point in panel["points"] if point[3] == marker]
        x, y = [p[0] for p in own], [p[1] for p in own]
        axes.scatter(x, y, c=[p[2] for p in own], marker=marker, s=24, edgecolors=SOFT, linewidths=0.3)
    far = [point for point in panel["points"] if point[4]]
    axes.scatter([p[0] for p in far], [p[1] for p in far], s=62, facecolors="none", edgecolors=INK, linewidths=0.7)
    scores = (
        f"spread {panel['spread']:.2f}, diversity {panel['diversity']:.2f}, outliers {100 * panel['outliers']:.0f} %"
    )
    axes.set_title(f"{panel['title']}\n{scores}", fontsize=8.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor("#f4f4f1")
    axes.grid(visible=False)


def _diagnosed(results: Results) -> list[tuple[Row, Line]]:
    """Each student with its diagnosed run of the lowest seed."""
    found = []
    for row in results.present(keep=lambda row: row.kind != "teacher"):
        own = [line for _, line in sorted(results.runs(row.name).items()) if line.get("points")]
        found += [(row, own[0])] if own else []
    return found


def _shown(results: Results) -> list[Row]:
    """Rows of the figure of all measures: first teacher, headline, baselines, other GDMD rows while there is room."""
    teachers = results.present(keep=lambda row: row.kind == "teacher")[:1]
    others = results.present(keep=lambda row: row.kind in ("baseline", "gdmd"))
    first = sorted(others, key=lambda row: (row.name != results.headline, row.kind != "baseline"))[:MOST_LINES]
    return [*teachers, *[row for row in others if row in first]]


def _mean(results: Results, row: Row, place: tuple[str, ...]) -> float:
    found = results.summary(row.name, place)
    return math.nan if found is None else found.mean


def row_colors(results: Results) -> dict[str, str]:
    """The color of every row, the same in all figures; the headline row has that of its method."""
    names = sorted((row.name for row in results.rows), key=lambda name: name != results.headline)
    colors = dict(zip(names, colors_of(names), strict=True))
    return colors | {row.name: COLORS["teacher"] for row in results.rows if row.kind == "teacher"}


def _color(results: Results, row: Row) -> str:
    return row_colors(results)[row.name]


_DASHES = ("-", (0, (4, 2)), (0, (1, 1.2)))
"""Line styles of the first, second and third row of the same color."""
_HATCHES = ("", "///", "...")


def _cycle(results: Results, row: Row) -> int:
    """How many rows before this one have its color."""
    colors = row_colors(results)
    same = [name for name, color in colors.items() if color == colors[row.name]]
    return same.index(row.name) % len(_DASHES)


def _look(results: Results, row: Row) -> dict[str, Any]:
    """Color, width and dashes of the line of a row."""
    width = 2.4 if row.name == results.headline else 1.3
    return {"color": _color(results, row), "linewidth": width, "linestyle": _DASHES[_cycle(results, row)]}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    with writing("the figure", path):
        path.write_bytes(buffer.getvalue())
