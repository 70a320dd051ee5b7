"""Stable Diffusion XL (arXiv 2307.01952): a UNet on a VP schedule, micro-conditioning, two CLIPs.

Time: ours is t in [0, 1]; the UNet reads the training step 999 t (``timesteps.VpTimesteps``), and alpha and sigma come from
the scheduler's betas (``diffusion.schedule.VpSchedule``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.config.model import DiffusersModel
from gdmd.diffusion.device import to_device_async
from gdmd.models.families.base import PipelineText, network_dtype
from gdmd.models.families.unet import UnetFamily
from gdmd.types import Cond


class Sdxl(UnetFamily):
    """The network reads the training step 999 t, and size and crop as six numbers (original size, corner, target size)."""

    name = "sdxl"
    pipeline = "StableDiffusionXLPipeline"
    needs = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    fixed_captions = True
    blocks = ("BasicTransformerBlock",)
    scaling = ("scaling_factor", "latents_mean", "latents_std")
    feature_cost = 0.43  # of the published UNet at 512 and 1024, rank 64

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        super().__init__(pipe, cfg)
        self.encoder = SdxlText(pipe, cfg)

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Any:
        dtype = network_dtype(net)
        height, width = (side * self.pixels_per_latent for side in x_t.shape[-2:])
        size = torch.tensor([height, width, 0, 0, height, width])
        time_ids = to_device_async(size, x_t.device).to(dtype).expand(len(x_t), 6)
        return net(
            x_t.to(dtype),
            self.timesteps.network_step(t),  # 999 t
            encoder_hidden_states=cond["embeds"].to(dtype),
            timestep_cond=self.guidance_input(t, dtype),
            added_cond_kwargs={"text_embeds": cond["pooled"].to(dtype), "time_ids": time_ids},
            return_dict=False,
        )[0]

    def blank_text(self, count: int) -> Cond:
        config = self.pipe.unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {"embeds": self._blank(count, 77, config.cross_attention_dim), "pooled": self._blank(count, pooled)}


class SdxlText(PipelineText):
    """embeds [B, 77, D]: the penultimate hidden states of both CLIPs; pooled [B, P] of the second."""

    def embed(self, texts: Sequence[str]) -> Cond:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=list(texts), device=self.device, do_classifier_free_guidance=False
        )
        return {"embeds": embeds, "pooled": pooled}

    def embed_null(self) -> Cond:
        """Zeros if the pipeline was trained that way (force_zeros_for_empty_prompt), else the empty caption."""
        empty = self.embed([""])
        if not self.pipe.config.get("force_zeros_for_empty_prompt"):
            return empty
        return {name: torch.zeros_like(value) for name, value in empty.items()}
