"""Classifier-free guidance (arXiv 2207.12598): both passes in one batched call, no unconditional pass at guidance 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdmd.diffusion.schedule import expand, from_native, renoise, to_native
from gdmd.types import Cond, Denoiser, Guide, Native, Prediction, Schedule


def plain(cond: Prediction, uncond: Prediction, guidance: float, t: Tensor) -> Prediction:
    """x0 = x0_uncond + guidance (x0_cond - x0_uncond); at a fixed x_t the same in eps- or v-space."""
    del t
    x0, eps = (u + guidance * (c - u) for c, u in ((cond.x0, uncond.x0), (cond.eps, uncond.eps)))
    return Prediction(x0, eps)


@dataclass(frozen=True)
class KeepTokenNorm:
    """Plain guidance of the velocity, then each token rescaled to its norm with the caption alone: v |v_cond| / |v|.

    A token is ``patch`` x ``patch`` positions with all their channels. Rectified flow only: x0 = x_t - t v. Not linear
    in the guidance. What the pipeline of Qwen-Image (arXiv 2508.02324) does.
    """

    patch: int

    def __call__(self, cond: Prediction, uncond: Prediction, guidance: float, t: Tensor) -> Prediction:
        mixed = plain(cond, uncond, guidance, t).velocity
        kept = mixed * (self._norm(cond.velocity) / self._norm(mixed))
        sigma, moved = t.view(-1, 1, 1, 1), cond.velocity - kept
        return Prediction(cond.x0 + sigma * moved, cond.eps - (1 - sigma) * moved)

    def _norm(self, v: Tensor) -> Tensor:
        """The norm of every token, at each of its positions. [B, C, H, W] -> [B, 1, H, W]"""
        b, c, h, w = v.shape
        p = self.patch
        lengths = v.reshape(b, c, h // p, p, w // p, p).square().sum((1, 3, 5)).sqrt()
        return lengths.repeat_interleave(p, 1).repeat_interleave(p, 2)[:, None]


@dataclass(frozen=True)
class Rescaled:
    """Plain guidance of the network's output y, then y (phi std(y_cond) / std(y) + 1 - phi), phi = ``rescale``.

    The std is over a sample's C, H, W (arXiv 2305.08891, section 3.4): for models with zero terminal SNR, which plain
    guidance overexposes. Not linear in the guidance. What diffusers calls guidance_rescale.
    """

    rescale: float
    native: Native
    schedule: Schedule

    def __call__(self, cond: Prediction, uncond: Prediction, guidance: float, t: Tensor) -> Prediction:
        alone, mixed = (
            to_native(one, self.native, t, self.schedule) for one in (cond, plain(cond, uncond, guidance, t))
        )
        spread = alone.flatten(1).std(1) / mixed.flatten(1).std(1)
        factor = expand(self.rescale * spread + 1 - self.rescale, mixed)
        x_t = renoise(cond.x0, t, cond.eps, self.schedule)
        return from_native(factor * mixed, self.native, x_t, t, self.schedule)


@dataclass(frozen=True)
class Guided:
    """A denoiser with guidance built in, for samplers."""

    denoiser: Denoiser
    guidance: float
    uncond: Cond
    guide: Guide = plain

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        if self.guidance == 1.0:
            return self.denoiser(x_t, t, cond)
        return self.guide(*_twice(self.denoiser, x_t, t, cond, self.uncond), self.guidance, t)


def _twice(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond) -> tuple[Prediction, Prediction]:
    """The predictions with and without the caption, from one call on 2B samples."""
    joined = {name: torch.cat([cond[name], uncond[name]]) for name in cond}
    both = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), joined)
    (x0_cond, x0_uncond), (eps_cond, eps_uncond) = both.x0.chunk(2), both.eps.chunk(2)
    return Prediction(x0_cond, eps_cond), Prediction(x0_uncond, eps_uncond)
