"""Images of a sweep's figures, in a separate process: ``python -m gdmd.sweep.images OUT``.

Samples the students of the first seed (and the teacher) from the same noise: two grids, and the feature-space panels in
images.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdmd.diffusion.generate import Components, Sampler, images_of
from gdmd.io import write_atomic
from gdmd.reporting.distances import cluster_spread, pairwise_distance
from gdmd.shapes.evaluate import HELDOUT
from gdmd.shapes.grammar import TASKS, catalog, fixed_rows
from gdmd.shapes.render import draw_scenes, render
from gdmd.shapes.rewards import ShapesClip, shipped_scorer
from gdmd.shapes.same_noise import write_same_noise
from gdmd.sweep.runs import GRIDS, IMAGES, SweepRun, figure_folder, images_key, shown_runs
from gdmd.sweep.spec import Sweep, read_sweep
from gdmd.sweep.worker import run_sampler

RENDERS = 16
"""True renders per cluster, whose mean is the cluster's true center."""
MARKERS = ("o", "s", "^", "D", "P", "*")
"""Markers of circle, square, triangle, diamond, cross, ring."""
COLORS = ("#d62728", "#ff8c1a", "#e6c700", "#2ca02c", "#17becf", "#1f4fd6", "#8e44ad", "#ffffff")
"""Colors of the captions' red, orange, yellow, green, cyan, blue, purple, white."""
HARDEST = ("position", "color_attr")


@dataclass(frozen=True)
class Shown:
    """A finished run whose images are shown."""

    title: str
    components: Components
    sampler: Sampler


def main(folder: Path) -> int:
    """Write fig6_grid.png and fig7_grid.png next to the other figures, and images.json; returns the exit code."""
    torch.set_num_threads(1)
    sweep = read_sweep(str(folder / "sweep.yaml"))
    shown = [_shown(sweep, run, folder) for run in shown_runs(sweep, folder)]
    seed = sweep.config.evaluation.seed
    count = sweep.config.images.captions
    for name, tasks in zip(GRIDS, (TASKS, HARDEST), strict=True):
        samplers = [(replace(each.sampler, name=each.title), each.components) for each in shown]
        path = figure_folder(sweep, folder) / name
        write_same_noise(path, samplers, _captions(tasks, count), seed, scale=2, option="--out")
    panels = feature_panels(shown, sweep.config.images.per_cluster, seed)
    content = {"key": images_key(sweep, folder), "panels": panels}
    write_atomic(folder / IMAGES, json.dumps(content), "the features")
    return 0


def feature_panels(shown: Sequence[Shown], per_cluster: int, seed: int) -> list[dict[str, Any]]:
    """PCA of held-out image features; the components are those of all images together.

    spread: mean distance to the mean of the cluster. diversity: mean 1 - cosine of pairs within a cluster. outliers:
    share of images closer to the true center of another cluster than to that of their own.
    """
    scorer = shipped_scorer(HELDOUT)
    assert isinstance(scorer, ShapesClip)
    rows = torch.nonzero(catalog().task == TASKS.index("colors"))[:, 0]  # one caption per color and object
    cluster = torch.arange(len(rows)).repeat_interleave(per_cluster)
    texts = [catalog().captions[row].text for row in rows[cluster].tolist()]
    renders = render(draw_scenes(rows.repeat_interleave(RENDERS), torch.Generator().manual_seed(seed)))
    with torch.no_grad():
        center = scorer.image_features(renders).unflatten(0, (len(rows), RENDERS)).mean(1)  # [K, D]
        features = [scorer.image_features(images_of(each.sampler, each.components, texts, seed)) for each in shown]
    plane = _plane(torch.cat(features))
    looks = [(COLORS[int(catalog().color[row, 0])], MARKERS[int(catalog().shape[row, 0])]) for row in rows]
    return [
        {"title": each.title, **_panel(own, cluster, center, plane, looks)}
        for each, own in zip(shown, features, strict=True)
    ]


def _panel(
    own: Tensor, cluster: Tensor, center: Tensor, plane: tuple[Tensor, Tensor], looks: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    mean, axes = plane
    xy = ((own - mean) @ axes).tolist()
    outlier = torch.cdist(own, center).argmin(1) != cluster
    points = [
        [round(x, 4), round(y, 4), *looks[k], bool(far)]
        for (x, y), k, far in zip(xy, cluster.tolist(), outlier.tolist(), strict=True)
    ]
    return {
        "points": points,
        "spread": cluster_spread(own, cluster),
        "diversity": pairwise_distance(own, cluster) if len(cluster) > len(center) else 0.0,
        "outliers": float(outlier.float().mean()),
    }


def _plane(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and the first two principal directions [D, 2]; signs fixed by their largest entry."""
    mean = features.mean(0)
    _, _, directions = torch.linalg.svd((features - mean).double(), full_matrices=False)
    axes = directions[:2].T
    largest = axes.abs().argmax(0)
    return mean, (axes * axes[largest, torch.arange(2)].sign()).to(features.dtype)


def _captions(tasks: Sequence[str], count: int) -> list[str]:
    """About ``count`` captions of the evaluation set, equally many from each of these tasks."""
    each = -(-count // len(tasks))
    rows = fixed_rows("eval", each).tolist()
    own = [row for row in rows if TASKS[int(catalog().task[row])] in tasks]
    return [catalog().captions[row].text for row in own]


def _shown(sweep: Sweep, run: SweepRun, folder: Path) -> Shown:
    components, sampler = run_sampler(run.job, run.folder(folder))
    return Shown(sweep.config.titles[run.method], components, sampler)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
