"""Classifier-free guidance (arXiv 2207.12598): both passes in one batched call, none at guidance 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdmd.types import Cond, Denoiser, Prediction


@dataclass(frozen=True)
class Pair:
    """The teacher's two answers at the same x_t; ``x0_uncond`` is None when only guidance 1 was asked for."""

    x0_cond: Tensor  # [B, C, H, W]
    x0_uncond: Tensor | None

    def at(self, guidance: float) -> Tensor:
        """x0 = x0_uncond + guidance (x0_cond - x0_uncond); at a fixed x_t the same in eps- or v-space."""
        if guidance == 1.0:
            return self.x0_cond
        if self.x0_uncond is None:
            raise ValueError(f"guidance {guidance} needs the unconditional pass, which was not made")
        return self.x0_uncond + guidance * (self.x0_cond - self.x0_uncond)


def predict_pair(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, *, both: bool = True) -> Pair:
    """One call on 2B samples (or B when ``both`` is false). x_t [B, C, H, W], t [B]."""
    if not both:
        return Pair(denoiser(x_t, t, cond).x0, None)
    twice = {name: torch.cat([cond[name], uncond[name]]) for name in cond}
    x0_cond, x0_uncond = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), twice).x0.chunk(2)
    return Pair(x0_cond, x0_uncond)


@dataclass(frozen=True)
class Guided:
    """A denoiser with guidance built in, for samplers."""

    denoiser: Denoiser
    guidance: float
    uncond: Cond

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        if self.guidance == 1.0:
            return self.denoiser(x_t, t, cond)
        twice = {name: torch.cat([cond[name], self.uncond[name]]) for name in cond}
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), twice)
        x0, eps = ((u + self.guidance * (c - u)) for c, u in (both.x0.chunk(2), both.eps.chunk(2)))
        return Prediction(x0, eps)
