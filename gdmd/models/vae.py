"""diffusers VAEs behind the Codec Protocol: scaling and shift, chunks, tiles, and the VAE's own precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gdmd.diffusion.device import to_device_async

TILE = 512
"""Pixels along the side of a tile. The VAE's default is its native size: one tile for a whole image of 1024 pixels."""


NEUTRAL_SCALING = {"scaling_factor": 1.0, "shift_factor": 0.0, "latents_mean": None, "latents_std": None}
"""The config keys that scale latents, with the values that leave them unchanged."""


def check_scaling(vae: Any, read: Sequence[str], model: str, pipeline: str) -> None:
    """ValueError for a VAE with a scaling key that its pipeline ignores: stock decoding would be wrong."""
    for key, neutral in NEUTRAL_SCALING.items():
        value = vae.config.get(key)
        if key not in read and value is not None and value != neutral:
            raise ValueError(
                f"{model}: its VAE has {key} = {value}, which a {pipeline} does not read; use a VAE of that pipeline"
            )


class VaeCodec:
    """An AutoencoderKL: latents z [B, C, h, w] -> images [B, 3, H, W] in about [0, 1].

    decode: D(z / scaling + shift), rescaled from [-1, 1]; encode: (mean of q(z | image) - shift) scaling. With
    latents_mean and latents_std in the VAE's config: D(z std / scaling + mean), and its inverse.
    ``chunk`` images per call. The VAE computes in its own dtype, regardless of autocast. ``tiled``: in overlapping
    tiles of TILE pixels, which are recomputed in a backward pass, so that one tile is in memory at a time. Video and deep
    VAEs have their own tiles, which are not recomputed.
    """

    def __init__(self, vae: Any, chunk: int = 1, *, tiled: bool = False) -> None:
        self.vae, self.chunk = vae.eval().requires_grad_(False), chunk
        if tiled:
            vae.enable_tiling()
            _set_tile_size(vae)
        config = vae.config
        scaling, shift = float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)
        self._scale, self._shift = torch.tensor(1 / scaling), torch.tensor(shift)
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            self._scale = torch.tensor(config["latents_std"]).reshape(-1, 1, 1) / scaling
            self._shift = torch.tensor(config["latents_mean"]).reshape(-1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode, with gradient to the latents. [B, C, h, w] -> [B, 3, H, W], fp32"""
        z = self.to_vae(latents)
        with torch.autocast(latents.device.type, enabled=False):
            images = [self.decode_chunk(part.to(self.vae.dtype)) for part in torch.split(z, self.chunk)]
        return (torch.cat(images).float() + 1) / 2

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, C, h, w], fp32; the mean of the posterior, not a sample."""
        with torch.autocast(images.device.type, enabled=False):
            z = [self.encode_chunk((2 * part - 1).to(self.vae.dtype)) for part in torch.split(images, self.chunk)]
        return self.from_vae(torch.cat(z).float())

    def to_vae(self, latents: Tensor) -> Tensor:
        """Latents -> the VAE's z, fp32."""
        scale, shift = self._constants(latents.device)
        return latents.float() * scale + shift

    def from_vae(self, z: Tensor) -> Tensor:
        """The inverse of ``to_vae``."""
        scale, shift = self._constants(z.device)
        return (z - shift) / scale

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(scale, shift), moved once to the device of the latents."""
        self._scale, self._shift = to_device_async(self._scale, device), to_device_async(self._shift, device)
        return self._scale, self._shift

    def decode_chunk(self, z: Tensor) -> Tensor:
        """The VAE's decoder; images in [-1, 1]."""
        images: Tensor = self.vae.decode(z, return_dict=False)[0]
        return images

    def encode_chunk(self, images: Tensor) -> Tensor:
        """The mean of the VAE's encoder."""
        mean: Tensor = self.vae.encode(images, return_dict=False)[0].mode()
        return mean


def on_white(images: Tensor) -> Tensor:
    """Images in [0, 1], transparent ones blended with white. [B, 3 or 4, H, W] -> [B, 3, H, W]"""
    if images.shape[1] == 3:
        return images
    alpha = images[:, 3:]
    return images[:, :3] * alpha + 1 - alpha


def _set_tile_size(vae: Any) -> None:
    """Tiles of TILE pixels for VAEs whose tile is their native size; video and deep VAEs already have smaller tiles."""
    if not hasattr(vae, "tile_latent_min_size"):
        return
    vae.tile_sample_min_size = TILE
    vae.tile_latent_min_size = TILE // 2 ** (len(vae.config.block_out_channels) - 1)
    decode = vae.decoder.forward

    def one_tile(z: Tensor) -> Any:
        if not (torch.is_grad_enabled() and z.requires_grad):
            return decode(z)
        return checkpoint(decode, z, use_reentrant=False, preserve_rng_state=False)  # eval mode: no random numbers

    vae.decoder.forward = one_tile
