"""Draws the README's figure and prints its tables from the stored results: ``python docs/figures/readme.py``."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from gdmd.reporting.statistics import paired_t, summarize
from gdmd.reporting.tables import difference, number, plus_minus
from gdmd.sweep.results import stored_results
from gdmd.sweep.spec import read_sweep
from gdmd.sweep.tables import OVERALL, Place, Results

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "img" / "readme_results.png"

ROWS = {
    "teacher_100": ("teacher", "100", "-"),
    "dmd": ("DMD", "4", "4,000"),
    "dmdr": ("DMDR", "4", "4,000"),
    "then_gdmd": ("tilted GDMD, black-box rewards", "4", "4,000 + 300"),
    "gdmd_second": ("tilted GDMD, reward gradient", "4", "3,200 + 800"),
}
"""Row of the sweep one_stage -> name, NFE per image, student updates."""
PIPELINES = {
    "teacher": ("teacher", "56"),
    "dmd_600": ("DMD", "4"),
    "refl_600": ("DMD + ReFL", "4"),
    "gdmd_600": ("tilted GDMD, 2.5 times the passes", "4"),
    "refl_passes": ("DMD + ReFL, 1,484 updates: as many passes as GDMD", "4"),
}
"""Row of the sweep pipelines, without its family -> name, NFE per image."""
COLORS = ("#222222", "#b58900", "#7a5195", "#56b4e9", "#d55e00")
DIVERSITY: Place = ("diversity",)
HELDOUT: Place = ("rewards", "shapes_clip_heldout")


def read() -> Results:
    """The stored lines; a line is one seed: 1,200 images of captions never trained on."""
    return stored_results(read_sweep("one_stage"), ROOT / "docs" / "results" / "one_stage", past=True).results


def markdown(results: Results) -> list[str]:
    """The rows of the README's table: mean +- standard deviation over seeds; differences are paired by seed."""
    lines = []
    for row, (name, calls, updates) in ROWS.items():
        values = results.values(row, OVERALL)
        own, minus = summarize(list(values.values())), "-"
        if row != "teacher_100":
            test = paired_t(values, results.values("teacher_100", OVERALL))
            minus = difference(test.difference, test.low, test.high)
        other = [number(mean(results.values(row, place).values())) for place in (HELDOUT, DIVERSITY)]
        cells = [name, calls, updates, str(own.count), plus_minus(own.mean, own.std), minus, *other]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def pipelines_markdown() -> list[str]:
    """The rows of the README's table of pipelines: mean ShapesEval over seeds, and the diversity in parentheses."""
    results = stored_results(read_sweep("pipelines"), ROOT / "docs" / "results").results
    lines = []
    for row, (name, calls) in PIPELINES.items():
        cells = [name, calls]
        for family in ("sd3", "flux2"):
            score, spread = (mean(results.values(f"{family}_{row}", place).values()) for place in (OVERALL, DIVERSITY))
            cells.append(f"{number(score)} ({number(spread)})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(results: Results, out: Path = OUT) -> None:
    """A dot per seed, the mean and its 95 % interval per row, and the teacher's mean as a dashed line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 2.7), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, measure in zip(panels, (OVERALL, DIVERSITY), strict=True):
        for k, row in enumerate(ROWS):
            values, place = list(results.values(row, measure).values()), len(ROWS) - 1 - k
            own = summarize(values)
            axes.plot(values, [place] * len(values), "o", color=COLORS[k], alpha=0.4, markersize=4)
            axes.errorbar(own.mean, place, xerr=own.high - own.mean, fmt="D", color=COLORS[k], capsize=3, markersize=5)
        axes.axvline(
            mean(results.values("teacher_100", measure).values()), color="#777777", linestyle="--", linewidth=1
        )
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(ROWS)), [f"{name} ({calls} NFE)" for name, calls, _ in reversed(ROWS.values())])
    panels[0].set_xlabel("ShapesEval: share of correct images")
    panels[1].set_xlabel("diversity of a prompt's images")
    figure.savefig(out, dpi=160, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    stored = read()
    draw(stored)
    print("\n".join([*markdown(stored), *pipelines_markdown()]))
