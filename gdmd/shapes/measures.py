"""Render fidelity and attribute coverage of Shapes images, exact because the truth can be rendered."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gdmd.shapes.check import matched
from gdmd.shapes.detect import Detections, from_scenes
from gdmd.shapes.grammar import ANY, COLORS, catalog
from gdmd.shapes.render import BACKGROUND, RADIUS, draw_scenes, render

PLACES, SIZES, REPEATS, DATA_SEED = 4, 6, 16, 20260438
"""Bins per axis of the position, bins of the size, data scenes drawn per row, and their seed."""


def fidelity(images: Tensor, found: Detections) -> Tensor:
    """Render fidelity 1 - |I - R|^2 / (|I - bg|^2 + |R - bg|^2), R the re-render of the detected scene. [B] in [0, 1]

    0 if nothing was detected, or if image and re-render are anti-correlated.
    """
    background = images.new_tensor(BACKGROUND)[:, None, None]
    again = render(found.scenes)
    energy = ((images - background).square() + (again - background).square()).sum((1, 2, 3))
    score = 1 - (images - again).square().sum((1, 2, 3)) / energy.clamp_min(1e-12)
    return torch.where(found.present.any(1), score.clamp_min(0), 0.0)


def coverage(found: Detections, rows: Tensor, correct: Tensor) -> float:
    """Attribute coverage: the mean of ``coverage_by_attribute``; 0 if no image is correct."""
    scores = coverage_by_attribute(found, rows, correct)
    return sum(scores.values()) / len(scores) if scores else 0.0


def coverage_by_attribute(found: Detections, rows: Tensor, correct: Tensor) -> dict[str, float]:
    """1 - JSD (base 2) of the colors, positions and sizes of the objects that captions ask for, against the data.

    rows, correct [B]. Only correct images count; data scenes are drawn for the same rows. Colors count if the caption
    leaves them free; an attribute that no caption leaves free is left out.
    """
    own = rows[correct.to(rows.device)].cpu()
    if not len(own):
        return {}
    mine = _histograms(_select(found, correct), own)
    generator = torch.Generator().manual_seed(DATA_SEED)
    many = own.repeat(REPEATS)
    theirs = _histograms(from_scenes(draw_scenes(many, generator)), many)
    return {name: 1 - _jsd(mine[name], theirs[name]) for name in mine if mine[name].sum() > 0}


def _select(found: Detections, mine: Tensor) -> Detections:
    mine = mine.to(found.shape.device)
    return Detections(*(getattr(found, name)[mine] for name in Detections.__dataclass_fields__))


def _histograms(found: Detections, rows: Tensor) -> dict[str, Tensor]:
    """Counts of color [8], position [16] and size [6] of the requested objects; other sizes go to the end bins."""
    asked = matched(found, rows.to(found.shape.device))
    free = asked & (catalog().color[rows, 0] == ANY)[:, None].to(asked.device)
    low, high = RADIUS
    column, line = ((p[asked] * PLACES).floor().clamp(0, PLACES - 1).long() for p in (found.x, found.y))
    size = ((found.radius[asked] - low) / (high - low) * SIZES).floor().clamp(0, SIZES - 1).long()
    bins = {
        "color": (found.color[free], len(COLORS)),
        "place": (line * PLACES + column, PLACES**2),
        "size": (size, SIZES),
    }
    return {name: torch.bincount(index.cpu(), minlength=count).double() for name, (index, count) in bins.items()}


def _jsd(p: Tensor, q: Tensor) -> float:
    """Jensen-Shannon divergence in bits of two count vectors, in [0, 1]."""
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    nats = sum(torch.xlogy(side, side / middle.clamp_min(1e-300)).sum().item() / 2 for side in (p, q))
    return min(max(nats / math.log(2), 0.0), 1.0)  # rounding only: the divergence is in [0, 1]
