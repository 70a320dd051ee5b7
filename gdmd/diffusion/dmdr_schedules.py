"""DMDR's schedules of the first stage (arXiv 2511.13649v4): the cosine of DynaDG, and DynaRS's Beta times."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_PANELS = 16384
"""Intervals of the tabulated Beta distribution function."""


def cosine_anneal(step: int, length: int) -> float:
    """c = (1 + cos(pi min(step / length, 1))) / 2: from 1 at step 0 to 0 at ``length``; length 0 gives 0."""
    return 0.5 * (1 + math.cos(math.pi * min(step / length, 1.0))) if length else 0.0


def annealed_shape(a: float, b: float, c: float) -> tuple[float, float]:
    """DynaRS: Beta(1 + (a - 1) c, 1 + (b - 1) c). c = 1 is Beta(a, b), c = 0 the uniform distribution."""
    return 1 + (a - 1) * c, 1 + (b - 1) * c


@torch.no_grad()
def beta_quantile(uniform: Tensor, a: float, b: float) -> Tensor:
    """Inverse distribution function of Beta(a, b): a uniform draw in (0, 1) -> t in (0, 1), same shape and dtype.

    Inversion keeps a draw a function of one keyed uniform (no rejection). a, b >= 1 (a bounded density), else
    ValueError; Beta(1, 1) returns the draw itself, bit for bit.

    The density is integrated over the angle of t = sin^2(angle), where it has no steep edge, and taken as linear inside
    an interval. The error of t is below 1e-6 for a, b up to 1000.
    """
    if a < 1 or b < 1:
        raise ValueError(f"Beta({a}, {b}): DynaRS needs a >= 1 and b >= 1, where the density is bounded")
    if a == b == 1:
        return uniform
    angle = torch.linspace(0, math.pi / 2, _PANELS + 1, dtype=torch.float64, device=uniform.device)
    log_density = (2 * a - 1) * angle.sin().log() + (2 * b - 1) * angle.flip(0).sin().log()
    density = (log_density - log_density.max()).exp()  # [P + 1], of the angle
    area = torch.cumulative_trapezoid(density, angle)
    cdf = torch.cat([area.new_zeros(1), area / area[-1]])  # [P + 1], the distribution function on the grid
    target = uniform.double().contiguous()
    right = torch.searchsorted(cdf, target).clamp(1, _PANELS)
    left = right - 1
    start, end = density[left], density[right]
    part = (start + end) / 2 * (target - cdf[left]) / (cdf[right] - cdf[left])
    share = 2 * part / (start + (start**2 + 2 * (end - start) * part).sqrt())  # start s + (end - start) s^2 / 2 = part
    return torch.lerp(angle[left], angle[right], share.clamp(0, 1)).sin().square().to(uniform.dtype)
