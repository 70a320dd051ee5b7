"""Latents as sequences of 2 x 2 patches, as FLUX and Qwen-Image read them."""

from __future__ import annotations

from torch import Tensor


def pack(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, (H / 2) (W / 2), 4 C]; a token holds its channels first, then rows, then columns."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse: [B, (H / 2) (W / 2), 4 C] -> [B, C, H, W], H and W in latent positions."""
    b, _, c = tokens.shape
    parts = tokens.reshape(b, height // 2, width // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return parts.reshape(b, c // 4, height, width)


def in_patches(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 4 C, H / 2, W / 2], the tokens of ``pack`` on their grid: FLUX.2's initial noise."""
    b, c, h, w = x.shape
    return pack(x).transpose(1, 2).reshape(b, 4 * c, h // 2, w // 2)
