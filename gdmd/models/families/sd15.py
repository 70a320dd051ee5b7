"""Stable Diffusion 1.x and 2.x (arXiv 2112.10752): a UNet on a VP schedule (eps, or v in 2.x at 768), one CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gdmd.config.model import DiffusersModel
from gdmd.models.families.base import PipelineText, network_dtype
from gdmd.models.families.unet import UnetFamily
from gdmd.types import Cond


class Sd15(UnetFamily):
    """The network reads the training step, 999 t, and the hidden states of one CLIP."""

    name = "sd15"
    pipeline = "StableDiffusionPipeline"
    needs = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    fixed_captions = True
    blocks = ("BasicTransformerBlock",)
    scaling = ("scaling_factor",)
    feature_cost = 0.33  # of the published UNet at 512, rank 64

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        super().__init__(pipe, cfg)
        self.encoder = Sd15Text(pipe, cfg)

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Any:
        dtype = network_dtype(net)
        steps, guidance = self.timesteps.network_step(t), self.guidance_input(t, dtype)
        return net(x_t.to(dtype), steps, cond["embeds"].to(dtype), timestep_cond=guidance, return_dict=False)[0]

    def blank_text(self, count: int) -> Cond:
        return {"embeds": self._blank(count, 77, int(self.pipe.unet.config.cross_attention_dim))}


class Sd15Text(PipelineText):
    """embeds [B, 77, D]: the last hidden states of CLIP."""

    def embed(self, texts: Sequence[str]) -> Cond:
        embeds, _ = self.pipe.encode_prompt(list(texts), self.device, 1, do_classifier_free_guidance=False)
        return {"embeds": embeds}
