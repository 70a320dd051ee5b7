"""VAEs of diffusers behind the Codec Protocol: scaling and shift, chunks, and their own precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gdmd.diffusion.device import to_device_async

TILE = 512
"""Pixels along the side of a tile. The VAE's own choice is the size it was made for: one tile for a whole image of 1024."""


SCALING = {"scaling_factor": 1.0, "shift_factor": 0.0, "latents_mean": None, "latents_std": None}
"""What scales latents, and what changes nothing."""


def check_scaling(vae: Any, read: Sequence[str], model: str, pipeline: str) -> None:
    """ValueError for a VAE that scales its latents by what its pipeline does not read, and so could not decode."""
    for key, neutral in SCALING.items():
        value = vae.config.get(key)
        if key not in read and value is not None and value != neutral:
            raise ValueError(
                f"{model}: its VAE has {key} = {value}, which a {pipeline} does not read; use a VAE made for that pipeline"
            )


class VaeCodec:
    """An AutoencoderKL: latents z [B, C, h, w] -> images [B, 3, H, W] in about [0, 1].

    decode: D(z / scaling + shift), rescaled from [-1, 1]; encode: (mean of q(z | image) - shift) scaling.
    ``chunk`` images per call. The VAE computes in its own dtype, whatever the precision around it. ``tiled``: in
    overlapping tiles of TILE pixels, which are computed again in a backward pass, so that one is in memory at a time.
    """

    def __init__(self, vae: Any, chunk: int = 1, *, tiled: bool = False) -> None:
        self.vae, self.chunk = vae.eval().requires_grad_(False), chunk
        if tiled:
            vae.enable_tiling()
            _divide(vae)
        config = vae.config
        scaling, shift = float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)
        self._scale, self._shift = torch.tensor(1 / scaling), torch.tensor(shift)
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            self._scale = torch.tensor(config["latents_std"]).reshape(-1, 1, 1) / scaling
            self._shift = torch.tensor(config["latents_mean"]).reshape(-1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """With gradient to the latents. [B, C, h, w] -> [B, 3, H, W], fp32"""
        z = self.to_vae(latents)
        with torch.autocast(latents.device.type, enabled=False):
            images = [self.decode_chunk(part.to(self.vae.dtype)) for part in torch.split(z, self.chunk)]
        return (torch.cat(images).float() + 1) / 2

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, C, h, w], fp32; the mean of the posterior, no draw."""
        with torch.autocast(images.device.type, enabled=False):
            z = [self.encode_chunk((2 * part - 1).to(self.vae.dtype)) for part in torch.split(images, self.chunk)]
        return self.from_vae(torch.cat(z).float())

    def to_vae(self, latents: Tensor) -> Tensor:
        """Latents -> z as the VAE has it, fp32."""
        scale, shift = self._constants(latents.device)
        return latents.float() * scale + shift

    def from_vae(self, z: Tensor) -> Tensor:
        """The inverse."""
        scale, shift = self._constants(z.device)
        return (z - shift) / scale

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(scale, shift) beside the latents, where they then stay."""
        self._scale, self._shift = to_device_async(self._scale, device), to_device_async(self._shift, device)
        return self._scale, self._shift

    def decode_chunk(self, z: Tensor) -> Tensor:
        """The bare decoder, images in [-1, 1]."""
        images: Tensor = self.vae.decode(z, return_dict=False)[0]
        return images

    def encode_chunk(self, images: Tensor) -> Tensor:
        """The bare encoder's mean."""
        mean: Tensor = self.vae.encode(images, return_dict=False)[0].mode()
        return mean


def _divide(vae: Any) -> None:
    """Tiles of TILE pixels for the VAEs that take the size they were made for; the video and deep ones have smaller ones."""
    if not hasattr(vae, "tile_latent_min_size"):
        return
    vae.tile_sample_min_size = TILE
    vae.tile_latent_min_size = TILE // 2 ** (len(vae.config.block_out_channels) - 1)
    decode = vae.decoder.forward

    def one_tile(z: Tensor) -> Any:
        if not (torch.is_grad_enabled() and z.requires_grad):
            return decode(z)
        return checkpoint(decode, z, use_reentrant=False, preserve_rng_state=False)  # nothing draws: eval mode

    vae.decoder.forward = one_tile
