"""The GAN head of DMD2 (arXiv 2405.14867, section 4.3): a small classifier on the features of the fake score network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdmd.types import Cond, FeatureDenoiser

MAX_CHANNELS = 512
"""Largest width of a head. DMD2's SDXL head keeps the UNet's 1280 in four convolutions (105 M weights, next to a fully
trained fake score); on the 3072 of FLUX.1 one such convolution has 151 M. Ours has 10 M on SDXL and 25 M on FLUX.1."""


class GanHead(nn.Module):
    """A classifier on image tokens: features [B, N, D] on a ``grid`` of N = rows * columns -> logits [B], high = real.

    A strided convolution over the grid of tokens, GroupNorm and SiLU, then the mean over positions: as small as the
    backbone allows (DMD2 stacks such blocks on the UNet's bottleneck until one position is left).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = min(width, MAX_CHANNELS)
        self.conv = nn.Conv2d(width, inner, 4, stride=2, padding=1)
        self.norm = nn.GroupNorm(math.gcd(8, inner), inner)
        self.logit = nn.Linear(inner, 1)

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        x = F.layer_norm(features, features.shape[-1:]).transpose(1, 2)  # [B, D, N]
        x = x.reshape(*x.shape[:2], *grid)  # [B, D, rows, columns]
        x = F.silu(self.norm(self.conv(x)))  # [B, D', rows / 2, columns / 2]
        logit: Tensor = self.logit(x.mean((2, 3)))
        return logit[:, 0]


def seeded_head(width: int, seed: int, device: torch.device) -> GanHead:
    """An fp32 head whose weights depend on the seed only; the global generator is not advanced."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = GanHead(width)
    return head.to(device)


class FeatureCritic:
    """A GAN head on the features of a denoiser, a Critic. The head computes in fp32."""

    def __init__(self, denoiser: FeatureDenoiser, head: GanHead) -> None:
        self.denoiser, self.head = denoiser, head

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        features = self.denoiser.features(x_t, t, cond)
        with torch.autocast(x_t.device.type, enabled=False):
            logits: Tensor = self.head(features, self.denoiser.feature_grid(x_t))
        return logits
