"""Draws the README's figure and prints its table from the stored results: ``python docs/figures/readme.py``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "results" / "one_stage" / "shapes.jsonl"
OUT = ROOT / "docs" / "img" / "readme_results.png"

ROWS = {
    "teacher_100": ("teacher", "100", "-"),
    "dmd": ("DMD", "4", "4,000"),
    "dmdr": ("DMDR", "4", "4,000"),
    "then_gdmd": ("DMD, then tilted GDMD", "4", "4,000 + 300"),
    "gdmd_gradient": ("tilted GDMD with reward gradient", "4", "4,000"),
}
"""Row of the table -> name, NFE per image, student updates."""
COLORS = ("#222222", "#b58900", "#7a5195", "#56b4e9", "#d55e00")
T_975 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447}
"""Student's t at 97.5 % by degrees of freedom."""

Values = dict[int, float]  # seed -> value


def read(table: Path = TABLE) -> dict[str, dict[str, Values]]:
    """Row -> measure -> seed -> value; a seed is 1,200 images of captions never trained on."""
    found: dict[str, dict[str, Values]] = {row: {} for row in ROWS}
    for line in table.read_text(encoding="utf-8").splitlines():
        cell = json.loads(line)
        if cell["method"] not in ROWS or cell["budget"] != "updates":
            continue
        values = {
            "ShapesEval": cell["shapeseval"],
            "held-out scorer": cell["rewards"]["shapes_clip_heldout"],
            "diversity": cell["diversity"],
        }
        for name, value in values.items():
            found[cell["method"]].setdefault(name, {})[cell["seed"]] = value
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % t interval."""
    return mean(values), T_975[len(values) - 1] * stdev(values) / math.sqrt(len(values))


def markdown(results: Mapping[str, Mapping[str, Values]]) -> list[str]:
    """The rows of the README's table: mean +- standard deviation over seeds; differences are paired by seed."""
    lines = []
    for row, (name, calls, updates) in ROWS.items():
        measures = results[row]
        overall, teacher = measures["ShapesEval"], results["teacher_100"]["ShapesEval"]
        difference = "-"
        if row != "teacher_100":
            middle, half = interval([overall[seed] - teacher[seed] for seed in sorted(overall)])
            difference = f"{middle:+.3f} [{middle - half:+.3f}, {middle + half:+.3f}]"
        spread = f"{mean(overall.values()):.3f} +- {stdev(overall.values()):.3f}"
        other = [f"{mean(measures[key].values()):.3f}" for key in ("held-out scorer", "diversity")]
        lines.append(f"| {' | '.join([name, calls, updates, str(len(overall)), spread, difference, *other])} |")
    return lines


def draw(results: Mapping[str, Mapping[str, Values]], out: Path = OUT) -> None:
    """A dot per seed, the mean and its 95 % interval per row, and the teacher's mean as a dashed line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 2.7), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, measure in zip(panels, ("ShapesEval", "diversity"), strict=True):
        for k, row in enumerate(ROWS):
            values, place = list(results[row][measure].values()), len(ROWS) - 1 - k
            middle, half = interval(values)
            axes.plot(values, [place] * len(values), "o", color=COLORS[k], alpha=0.4, markersize=4)
            axes.errorbar(middle, place, xerr=half, fmt="D", color=COLORS[k], capsize=3, markersize=5)
        axes.axvline(mean(results["teacher_100"][measure].values()), color="#777777", linestyle="--", linewidth=1)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(ROWS)), [f"{name} ({calls} NFE)" for name, calls, _ in reversed(ROWS.values())])
    panels[0].set_xlabel("ShapesEval: share of correct images")
    panels[1].set_xlabel("diversity of a prompt's images")
    figure.savefig(out, dpi=160, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    results = read()
    draw(results)
    print("\n".join(markdown(results)))
