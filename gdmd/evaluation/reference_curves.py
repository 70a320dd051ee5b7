"""Dimensionless statistics over a run, and those of healthy runs to compare them with.

Each is a ratio, so that runs of different models can be compared: neither the scale of the latents nor the units of the
rewards matter. Losses, gaps and rewards themselves are not comparable. A ratio still depends on the method and its
options.
``tools/reference_curves.py`` makes reference_curves.json, next to this file, from run folders.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from gdmd.config.methods.gdmd_tilted import TiltedGDMDConfig
from gdmd.config.run import RunConfig
from gdmd.reporting.plots import Metrics, compared_curves

FILE = Path(__file__).with_suffix(".json")
POINTS = 20
"""Parts of a run; a point of a curve is the ratio of the means over one part."""
TARGETS = "number of targets"
"""Stands in for a key: the eta K targets of tilted GDMD."""
Curve = Sequence[tuple[float, float]]
"""(share of the run, value)"""


class Ratio(NamedTuple):
    """A statistic: the key of its numerator, of its denominator ("" = 1), and how to read it."""

    title: str
    over: str
    under: str
    meaning: str


RATIOS = (
    Ratio(
        "Construction gain, in units of Z",
        "gain/construction",
        "",
        "R(target) - R(sample); Z is the running std of a reward.",
    ),
    Ratio("Realized gain, in units of Z", "gain/realized", "", "How much of it the student has after the updates."),
    Ratio(
        "Effective number of targets, of all",
        "weight/effective",
        TARGETS,
        "1: all targets weigh the same, the rewards do not act. Toward 1 / K: one target alone counts.",
    ),
    Ratio("Share of targets with r < 1/2", "weight/share_below_half", "", "Targets that are worse than the sample."),
    Ratio(
        "Reward spread within a group, of all",
        "reward/group_share",
        "",
        "Toward 0: the rewards tell prompts apart, but not the images of one prompt.",
    ),
    Ratio(
        "DMD gradient / gap to the teacher",
        "gap/grad",
        "gap/real",
        "rms of x0_fake - x0_real over mean |x0 - x0_real|; above 1 the target overshoots the teacher's prediction.",
    ),
    Ratio("Reward gradient / DMD gradient", "gap/pull", "gap/grad", "Above 1 the rewards outweigh the teacher."),
)


class Reference(NamedTuple):
    """A healthy run: its name, its command, and its curves by title."""

    name: str
    command: str
    curves: Mapping[str, Curve]


def curves_of(metrics: Metrics, cfg: RunConfig) -> dict[str, Curve]:
    """The curve of every ratio that the run has logged."""
    method = cfg.method
    targets = method.group_size * method.continuations if isinstance(method, TiltedGDMDConfig) else math.nan
    found = {one.title: list(_points(metrics, one, cfg.loop.steps, targets)) for one in RATIOS}
    return {title: curve for title, curve in found.items() if curve}


def _points(metrics: Metrics, ratio: Ratio, steps: int, targets: float) -> Iterator[tuple[float, float]]:
    """Parts in which a denominator is not positive have no point."""
    for part in range(POINTS):
        rows = [row for row in metrics if part < POINTS * row["step"] / steps <= part + 1]
        known = {TARGETS: targets, "": 1.0}
        pairs = [
            (row.get(ratio.over, math.nan), known.get(ratio.under, row.get(ratio.under, math.nan))) for row in rows
        ]
        finite = [(over, under) for over, under in pairs if math.isfinite(over) and math.isfinite(under)]
        under = math.fsum(pair[1] for pair in finite)
        if under > 0:
            yield (part + 0.5) / POINTS, math.fsum(pair[0] for pair in finite) / under


def compared_panels(metrics: Metrics, cfg: RunConfig) -> list[tuple[str, str, str]]:
    """(title, SVG, meaning) of every ratio that the run and a healthy run have; the run's curve is in front."""
    own, panels = curves_of(metrics, cfg), []
    for ratio in RATIOS:
        others = {one.name: one.curves[ratio.title] for one in references() if ratio.title in one.curves}
        if ratio.title in own and others:
            panels.append((ratio.title, compared_curves(own[ratio.title], others, ratio.title), ratio.meaning))
    return panels


@cache
def references() -> tuple[Reference, ...]:
    """The healthy runs that ship with the package."""
    stored = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(Reference(**one) for one in stored["runs"])


def stored(name: str, command: str, metrics: Metrics, cfg: RunConfig) -> dict[str, Any]:
    """The entry of a run in ``FILE``; its numbers have four digits."""
    curves = {
        title: [(round(x, 4), float(f"{y:.4g}")) for x, y in curve] for title, curve in curves_of(metrics, cfg).items()
    }
    return {"name": name, "command": command, "curves": curves}
