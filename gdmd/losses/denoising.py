"""Denoising losses of the fake score (arXiv 2604.19009, eq. 2; native form as in DMD2, arXiv 2405.14867)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from gdmd.types import Prediction

Target = Literal["x0", "eps", "velocity"]


def mean_square(x: Tensor) -> Tensor:
    """||x||^2 of the specification: the mean over all but the first dimension. [B, ...] -> [B]"""
    return x.square().flatten(1).mean(1)


def denoising_loss(prediction: Prediction, x0: Tensor, eps: Tensor, target: Target = "velocity") -> Tensor:
    """Per-sample denoising loss [B]: || prediction.target - target ||^2, mean over C, H, W, no 1/2.

    prediction: of x_t = alpha x0 + sigma eps. x0, eps [B, C, H, W], fp32, constants (detached here).
    target: "eps" or "velocity" is the native form of the two families, "x0" is eq. 2 of the paper.
    Gradient: 2 (prediction - target) / (C H W), into the prediction only.
    """
    match target:
        case "x0":
            return mean_square(prediction.x0 - x0.detach())
        case "eps":
            return mean_square(prediction.eps - eps.detach())
        case "velocity":
            return mean_square(prediction.velocity - (eps - x0).detach())
    raise ValueError(f"denoising target must be 'x0', 'eps' or 'velocity', got {target!r}")
