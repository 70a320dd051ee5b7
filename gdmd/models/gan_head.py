"""The GAN head of DMD2 (arXiv 2405.14867, section 4.3): a small classifier on the features of the fake network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdmd.types import Cond, FeatureDenoiser

WIDEST = 512
"""Channels of a head at most [I]. DMD2's head of SDXL keeps the UNet's 1280 in four convolutions, 105 M weights, beside a
fake with all its weights; on the 3072 of FLUX.1 one such convolution has 151 M. Ours has 10 M on SDXL and 25 M there."""


class GanHead(nn.Module):
    """A classifier on image tokens: features [B, N, D], N = rows columns of ``grid`` -> logits [B], high = real.

    A strided convolution over the grid of tokens, GroupNorm and SiLU, then the mean over places, as small as the trunk
    allows (DMD2, arXiv 2405.14867, stacks such blocks on the UNet's bottleneck until one place is left).
    """

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid, inner = grid, min(width, WIDEST)
        self.conv = nn.Conv2d(width, inner, 4, stride=2, padding=1)
        self.norm = nn.GroupNorm(math.gcd(8, inner), inner)
        self.logit = nn.Linear(inner, 1)

    def forward(self, features: Tensor) -> Tensor:
        places = F.layer_norm(features, features.shape[-1:]).transpose(1, 2)  # [B, D, N]
        seen = F.silu(
            self.norm(self.conv(places.reshape(*places.shape[:2], *self.grid)))
        )  # [B, D', rows / 2, columns / 2]
        logit: Tensor = self.logit(seen.mean((2, 3)))
        return logit[:, 0]


def seeded_head(width: int, grid: tuple[int, int], seed: int, device: torch.device) -> GanHead:
    """A head whose weights depend on the seed only; the global generator stays where it was. fp32"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = GanHead(width, grid)
    return head.to(device)


class FeatureCritic:
    """A GAN head on the features of a denoiser, a Critic. The head computes in fp32."""

    def __init__(self, trunk: FeatureDenoiser, head: GanHead) -> None:
        self.trunk, self.head = trunk, head

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        features = self.trunk.features(x_t, t, cond)
        with torch.autocast(x_t.device.type, enabled=False):
            logits: Tensor = self.head(features)
        return logits
