"""The decoder through which the rewards see images: a tiny decoder, or the pipeline's own VAE."""

from __future__ import annotations

from typing import Any

from gdmd.diffusion.device import DTYPES
from gdmd.hub import unreachable
from gdmd.models.families.base import Family
from gdmd.models.loading import FAMILIES, is_local
from gdmd.models.pipeline_files import load_errors, note_revision
from gdmd.models.vae import VaeCodec
from gdmd.types import Codec


def scoring_codec(family: Family, device: str = "cpu") -> Codec:
    """The decoder for rewards: the tiny decoder cfg.scoring_decoder, or the pipeline's own VAE."""
    cfg = family.cfg
    if cfg.scoring_decoder is None:
        return family.codec
    require_tiny(family)
    import diffusers

    local = is_local(cfg.scoring_decoder, "model.scoring_decoder", "config.json")
    kind: Any = diffusers.AutoencoderTiny
    options: dict[str, Any] = {"dtype": DTYPES[cfg.dtype], "use_safetensors": True}
    revision = cfg.scoring_decoder_revision
    if local:
        note_revision(f"model.scoring_decoder {cfg.scoring_decoder!r}", revision)
    options |= {} if local else {"revision": revision}
    try:
        cached_only = local or bool(unreachable(cfg.scoring_decoder, "config.json", revision))
        options["local_files_only"] = cached_only
        tiny = kind.from_pretrained(cfg.scoring_decoder, **options)
    except load_errors() as error:
        raise ValueError(
            f"model.scoring_decoder {cfg.scoring_decoder!r}: no AutoencoderTiny can be loaded: {error}"
        ) from error
    check_tiny(family, tiny)
    return VaeCodec(tiny.to(device), cfg.decode_chunk)


def require_tiny(family: Family) -> None:
    """ValueError for a scoring decoder on a family without tiny decoders."""
    if not family.tiny_decoder:
        known = ", ".join(kind.name for kind in FAMILIES if kind.tiny_decoder)
        raise ValueError(
            f"model.scoring_decoder {family.cfg.scoring_decoder!r}: no AutoencoderTiny decodes latents of {family.name} "
            f"(those of {known} have one); leave it out, and save memory with model.decode_tiled=true"
        )


def check_tiny(family: Family, tiny: Any) -> None:
    """ValueError for an AutoencoderTiny of different latents: other channels, or other pixels per latent."""
    config = tiny.config
    what = f"model.scoring_decoder {family.cfg.scoring_decoder!r}"
    if config.latent_channels != family.latent_channels:
        raise ValueError(
            f"{what} decodes {config.latent_channels} channels, but latents of {family.name} have "
            f"{family.latent_channels}; give one for this family"
        )
    if family.pipe.vae.config.get("latents_mean") is not None and config.get("latents_mean") is None:
        raise ValueError(
            f"{what} decodes the latents of the published {family.name} models, but this model's VAE has its own "
            "latents_mean and latents_std; leave it out, and save memory with model.decode_tiled=true"
        )
    pixels = config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1)
    if pixels != family.pixels_per_latent:
        raise ValueError(
            f"{what} decodes a latent position to {pixels} x {pixels} pixels, but one of {family.name} is "
            f"{family.pixels_per_latent} x {family.pixels_per_latent}; give one for this family"
        )
