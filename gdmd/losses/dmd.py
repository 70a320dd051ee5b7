"""Distribution matching distillation: the gradient and its regression form (arXiv 2311.18828, 2405.14867)."""

from __future__ import annotations

import torch
from torch import Tensor

from gdmd.losses.denoising import mean_square

SMALLEST_NORMALIZER = 1e-6
"""Floor of n: where the teacher reproduces x0 to 1e-6 there is nothing to learn, and 0 / 0 would be NaN."""


def normalizer(x0: Tensor, x0_real: Tensor) -> Tensor:
    """DMD2's per-sample normalizer n = mean_{C,H,W} |x0 - x0_real|, floored at 1e-6. [B, C, H, W] -> [B, 1, 1, 1]"""
    n = (x0 - x0_real).abs().mean(tuple(range(1, x0.ndim)), keepdim=True)
    return n.clamp_min(SMALLEST_NORMALIZER)


@torch.no_grad()
def dmd_gradient(x0: Tensor, x0_real: Tensor, x0_fake: Tensor, *, normalize: bool = True) -> Tensor:
    """grad = (x0_fake(x_t) - x0_real(x_t)) / n, DMD's gradient in x0-space (arXiv 2604.19009, section 3.1).

    x0 student prediction, x0_real guided teacher prediction, x0_fake fake prediction: [B, C, H, W] in fp32 (or
    float64). Without ``normalize`` n = 1. Returns [B, C, H, W], no gradient.
    """
    raw = x0_fake - x0_real
    return raw / normalizer(x0, x0_real) if normalize else raw


def dmd_loss(x0: Tensor, x_tar: Tensor) -> Tensor:
    """L_DMD = || x0 - sg(x_tar) ||^2 per sample [B]; with x_tar = x0 - grad its gradient is 2 grad / (C H W)."""
    return mean_square(x0 - x_tar.detach())


def regression_loss(x0: Tensor, x0_ode: Tensor) -> Tensor:
    """|| G(z, c) - sg(y) ||^2 per sample [B], y the teacher's ODE sample from the same noise z.

    x0, x0_ode [B, C, H, W]. The paper measures the distance by LPIPS between decoded images; here it is the mean
    square in latent space, without a decoder pass or a perceptual network.
    Gradient: 2 (x0 - x0_ode) / (C H W), into x0 only.
    """
    return mean_square(x0 - x0_ode.detach())
