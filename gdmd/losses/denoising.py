"""Denoising losses of the fake score (arXiv 2604.19009, eq. 2; native form as in DMD2, arXiv 2405.14867)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from gdmd.types import Prediction

Target = Literal["x0", "eps", "velocity", "v"]
"""What is compared; "v" is the VP one, alpha eps - sigma x0."""


def mean_square(x: Tensor) -> Tensor:
    """||x||^2 of the specification: the mean over all but the first dimension. [B, ...] -> [B]"""
    return x.square().flatten(1).mean(1)


def denoising_loss(
    prediction: Prediction,
    x0: Tensor,
    eps: Tensor,
    target: Target = "velocity",
    v: Callable[[Prediction], Tensor] | None = None,
) -> Tensor:
    """Per-sample denoising loss [B]: || prediction.target - target ||^2, mean over C, H, W, no 1/2.

    prediction: of x_t = alpha x0 + sigma eps. x0, eps [B, C, H, W], fp32, constants (detached here).
    target: "eps", "velocity" or "v" is the native form of a family, "x0" is eq. 2 of the paper.
    v: for target "v", the VP v of a prediction, which depends on the schedule and t (``diffusion.schedule.to_v_vp``).
    Gradient: 2 (prediction - target) / (C H W), into the prediction only.
    """
    match target:
        case "x0":
            return mean_square(prediction.x0 - x0.detach())
        case "eps":
            return mean_square(prediction.eps - eps.detach())
        case "velocity":
            return mean_square(prediction.velocity - (eps - x0).detach())
        case "v":
            if v is None:
                raise ValueError("denoising target 'v' depends on the schedule; give v")
            return mean_square(v(prediction) - v(Prediction(x0.detach(), eps.detach())))
    raise ValueError(f"denoising target must be 'x0', 'eps', 'velocity' or 'v', got {target!r}")
