"""DiffusionNFT (arXiv 2509.16117): positive and negative policies on scored samples, with its self-normalized loss."""

from __future__ import annotations

import torch
from torch import Tensor

from gdmd.losses.denoising import mean_square

SMALLEST_NORMALIZER = 1e-5
"""Floor of the mean absolute error that divides a branch, as in the authors' code."""


@torch.no_grad()
def nft_optimality(advantage: Tensor, clip: float = 5.0) -> Tensor:
    """r = clamp(A / clip / 2 + 1/2, 0, 1): advantage -> the probability that a sample is a positive one.

    advantage: any shape, units of a standard deviation; NaN ("not scored") stays NaN. No gradient.
    """
    return (advantage / clip / 2 + 0.5).clamp(0, 1)


def nft_loss(
    x0: Tensor, x0_old: Tensor, x_target: Tensor, r: Tensor, beta: float, *, scale: float = 5.0, normalize: bool = True
) -> Tensor:
    """(scale / beta) [r ||x+ - x||^2 / m+ + (1 - r) ||x- - x||^2 / m-] per sample [B], x = x_target the scored sample.

    x+ = beta x0 + (1 - beta) x_old,  x- = (1 + beta) x_old - beta x0,  m+- = sg(mean_{C,H,W} |x+- - x|), floored at
    1e-5; without ``normalize`` m+- = 1. The paper mixes velocities: at one x_t this is the same mixture in x0.
    x0 [B, C, H, W] by the student from the re-noised sample carries the gradient; x0_old by the old policy at the
    same x_t, x_target and r [B] in [0, 1] are constants. ``scale`` is the clip of the advantage in their code.
    On-policy gradient without normalization: scale (2 / (C H W)) (2r - 1) (x_old - x).
    """
    x0_old, x_target, r = x0_old.detach(), x_target.detach(), r.detach()
    x_plus = beta * x0 + (1 - beta) * x0_old
    x_minus = (1 + beta) * x0_old - beta * x0
    positive, negative = (_branch(x - x_target, normalize) for x in (x_plus, x_minus))
    return scale / beta * (r * positive + (1 - r) * negative)


def _branch(error: Tensor, normalize: bool) -> Tensor:
    if not normalize:
        return mean_square(error)
    return mean_square(error) / error.detach().abs().flatten(1).mean(1).clamp_min(SMALLEST_NORMALIZER)
