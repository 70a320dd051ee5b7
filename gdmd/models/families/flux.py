"""FLUX.1: rectified flow on packed latents, an embedded guidance, times shifted by the number of image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.config.model import DiffusersModel
from gdmd.models.families.base import PipelineText, network_dtype
from gdmd.models.families.flow import FlowFamily
from gdmd.models.packing import pack
from gdmd.models.vae import VaeCodec
from gdmd.types import Cond

LONGEST = 512
"""Caption tokens, unless model.max_tokens says otherwise."""


class Flux(FlowFamily):
    """The network reads t itself, the positions of its tokens, and (dev, not schnell) model.embedded_guidance.

    All roles use the embedded guidance: set method.guidance = 1 to avoid an unconditional pass on top of it.
    """

    name = "flux"
    pipeline = "FluxPipeline"
    needs = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    targets: tuple[str, ...] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    )
    patch = 2
    caption_limit = 512
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        super().__init__(pipe, cfg)
        self.codec = VaeCodec(pipe.vae, cfg.decode_chunk, tiled=cfg.decode_tiled)
        self.encoder = FluxText(pipe, cfg)
        singles = range(pipe.transformer.config.num_single_layers)
        # "proj_out" alone would also name the network's last layer
        self.targets = (*self.targets, *(f"single_transformer_blocks.{i}.proj_out" for i in singles))

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Any:
        dtype = network_dtype(net)
        height, width = x_t.shape[-2:]
        guided = self.guidance_is_embedded
        embeds = cond["embeds"].to(dtype)
        return net(
            hidden_states=pack(x_t).to(dtype),
            timestep=self.network_time(t),
            guidance=torch.full_like(t, self.cfg.embedded_guidance, dtype=torch.float32) if guided else None,
            pooled_projections=cond["pooled"].to(dtype),
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=_positions(height // 2, width // 2, x_t.device).to(dtype),
            return_dict=False,
        )[0]

    def blank_text(self, count: int) -> Cond:
        config = self.pipe.transformer.config
        embeds = self._blank(count, self.cfg.max_tokens or LONGEST, config.joint_attention_dim)
        return {"embeds": embeds, "pooled": self._blank(count, config.pooled_projection_dim)}


def _positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """(0, row, column) of every image token. [rows columns, 3]"""
    each = [torch.arange(count, device=device) for count in (rows, columns)]
    row, column = torch.meshgrid(*each, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).reshape(-1, 3)


class FluxText(PipelineText):
    """embeds [B, T, D] of T5; pooled [B, P] of CLIP."""

    def embed(self, texts: Sequence[str]) -> Cond:
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompt=list(texts), prompt_2=None, device=self.device, max_sequence_length=self.cfg.max_tokens or LONGEST
        )
        return {"embeds": embeds, "pooled": pooled}
