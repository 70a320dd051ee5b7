"""The networks of the Shapes world: a small VAE and a text-conditional DiT (arXiv 2212.09748) in its latent space."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdmd.shapes.grammar import CAPTION_TOKENS, WORDS

LATENT_CHANNELS = 8
LOCAL = 32
"""Channels at full latent resolution around the transformer."""
SIDE = 4
"""Patches along a side of a latent."""


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, with a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return x + h


class ShapesVae(nn.Module):
    """Images [B, 3, 4h, 4w] in [0, 1] <-> latents [B, 8, h, w] of unit scale (``shift`` and ``scale`` per channel)."""

    shift: Tensor
    scale: Tensor

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        half = width // 2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, width, 3, padding=1),
            ResBlock(width),
            nn.Conv2d(width, width, 4, stride=2, padding=1),
            ResBlock(width),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * LATENT_CHANNELS, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, width, 3, padding=1),
            ResBlock(width),
            nn.Conv2d(width, 4 * half, 3, padding=1),
            nn.PixelShuffle(2),
            ResBlock(half),
            nn.GroupNorm(8, half),
            nn.SiLU(),
            nn.Conv2d(half, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.register_buffer("shift", torch.zeros(LATENT_CHANNELS))
        self.register_buffer("scale", torch.ones(LATENT_CHANNELS))

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the unscaled latents, each [B, 8, h, w]."""
        mean, log_var = self.encoder(2 * images - 1).chunk(2, 1)
        return mean, log_var.clamp(-12, 4)

    def encode(self, images: Tensor) -> Tensor:
        """The posterior mean, scaled to zero mean and unit variance per channel over the data."""
        mean, _ = self.posterior(images)
        return (mean - self.shift[:, None, None]) / self.scale[:, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, 4h, 4w], about in [0, 1], not clamped."""
        signed: Tensor = self.decoder(latents * self.scale[:, None, None] + self.shift[:, None, None])
        return (signed + 1) / 2


class Block(nn.Module):
    """Transformer block with adaLN-zero modulation by the time embedding."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shape = x.shape  # [B, N, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, -1)
        h = F.layer_norm(x, shape[-1:]) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).reshape(*shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(shape)
        x = x + gate1 * self.proj(h)
        h = F.layer_norm(x, shape[-1:]) * (1 + scale2) + shift2
        x = x + gate2 * self.down(F.gelu(self.up(h), approximate="tanh"))
        return x


class ShapesDit(nn.Module):
    """velocity(x_t, t, tokens): latents [B, 8, h, w], t [B] in [0, 1], caption tokens [B, 8] -> eps - x0.

    Image patches (2 x 2) and caption words share one sequence. Two convolutions before the patches and two after them
    work at full latent resolution: an outline crosses patches, and attention alone needs far more data to join it.
    """

    frequencies: Tensor

    def __init__(self, width: int = 96, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(LATENT_CHANNELS, LOCAL), nn.SiLU(), _conv(LOCAL, LOCAL))
        self.patch = nn.Linear(4 * LOCAL, width)
        self.place = nn.Parameter(0.02 * torch.randn(SIDE**2 + CAPTION_TOKENS, width))
        self.words = nn.Embedding(len(WORDS), width)
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(1000.0), 32)), persistent=False)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 4 * LOCAL)
        last = _conv(2 * LOCAL, LATENT_CHANNELS)
        self.join = nn.Sequential(_conv(2 * LOCAL, 2 * LOCAL), nn.SiLU(), last)
        for weights in (*self.modulation.parameters(), *last.parameters()):
            nn.init.zeros_(weights)

    def features(self, local: Tensor, t: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of the image tokens after the last block [B, N, D], and the time embedding [B, D]."""
        angles = t[:, None] * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1).to(local.dtype))
        patches = F.pixel_unshuffle(local, 2).flatten(2).transpose(1, 2)  # [B, N, 4 LOCAL]
        x = torch.cat([self.patch(patches), self.words(tokens)], 1) + self.place
        for block in self.blocks:
            x = block(x, time)
        return x[:, : patches.shape[1]], time

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor, *, hidden: bool = False) -> Tensor:
        """The velocity; with ``hidden`` the image tokens after the last block [B, N, D], which a GAN head reads."""
        local = self.stem(x_t)  # [B, LOCAL, h, w]
        x, time = self.features(local, t, tokens)
        if hidden:
            return x
        shift, scale = self.modulation(time)[:, None].chunk(2, -1)
        patches = self.head(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)
        world = F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (SIDE, SIDE)), 2)  # [B, LOCAL, h, w]
        velocity: Tensor = self.join(torch.cat([local, world], 1))
        return velocity


def _conv(inside: int, outside: int) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1)
