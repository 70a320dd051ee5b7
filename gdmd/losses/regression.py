"""The regression term of DMD on pairs of noise and the teacher's ODE sample (arXiv 2311.18828, eq. 9)."""

from __future__ import annotations

from torch import Tensor

from gdmd.losses.denoising import mean_square


def regression_loss(x0: Tensor, x0_ode: Tensor) -> Tensor:
    """|| G(z, c) - sg(y) ||^2 per sample [B], y the teacher's ODE sample from the same noise z.

    x0, x0_ode [B, C, H, W]. The paper measures the distance by LPIPS between decoded pictures; here it is the mean
    square in latent space, which needs neither a decoder pass nor a perceptual network.
    Gradient: 2 (x0 - x0_ode) / (C H W), into x0 only.
    """
    return mean_square(x0 - x0_ode.detach())
