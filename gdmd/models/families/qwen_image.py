"""Qwen-Image (arXiv 2508.02324): rectified flow on packed latents, a masked vision-language encoder, a video VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.config.model import DiffusersModel
from gdmd.diffusion.guidance import KeepTokenNorm
from gdmd.diffusion.prompt_length import Reader
from gdmd.models.families.base import PipelineText, network_dtype
from gdmd.models.families.flow import FlowFamily
from gdmd.models.packing import pack
from gdmd.models.tokens import TEMPLATES, token_ids
from gdmd.models.vae import VaeCodec
from gdmd.types import Cond

LONGEST = 512
"""Caption tokens, unless model.max_tokens says otherwise."""


class QwenImage(FlowFamily):
    """The network reads t itself. Guidance restores the norm of every token."""

    name = "qwen_image"
    pipeline = "QwenImagePipeline"
    needs = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
    patch = 2
    caption_limit = 1024
    scaling = ("latents_mean", "latents_std")
    tiny_decoder = False
    blocks = ("QwenImageTransformerBlock",)
    guide = KeepTokenNorm(patch)

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        super().__init__(pipe, cfg)
        self.codec = FrameCodec(pipe.vae, cfg.decode_chunk, tiled=cfg.decode_tiled)
        self.encoder = QwenText(pipe, cfg)

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Any:
        dtype = network_dtype(net)
        height, width = x_t.shape[-2:]
        guided = self.guidance_is_embedded
        return net(
            hidden_states=pack(x_t).to(dtype),
            timestep=self.network_time(t),
            guidance=torch.full_like(t, self.cfg.embedded_guidance, dtype=torch.float32) if guided else None,
            encoder_hidden_states=cond["embeds"].to(dtype),
            encoder_hidden_states_mask=cond["mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
            return_dict=False,
        )[0]

    @classmethod
    def most_tokens(cls, net: Any) -> tuple[int, int]:
        """The network's table of 4096 positions covers half a side, then the caption (at most 1024 tokens)."""
        del net
        return (2 * (4096 - 1024),) * 2

    def blank_text(self, count: int) -> Cond:
        longest = self.cfg.max_tokens or LONGEST
        embeds = self._blank(count, longest, self.pipe.transformer.config.joint_attention_dim)
        return {"embeds": embeds, "mask": torch.ones(count, longest, dtype=torch.bool)}


class FrameCodec(VaeCodec):
    """A video VAE used on single frames."""

    def decode_chunk(self, z: Tensor) -> Tensor:
        return super().decode_chunk(z[:, :, None])[:, :, 0]

    def encode_chunk(self, images: Tensor) -> Tensor:
        return super().encode_chunk(images[:, :, None])[:, :, 0]


class QwenText(PipelineText):
    """embeds [B, T, D], zeros after the caption; mask [B, T], true for the caption."""

    no_caption = " "  # the negative prompt of the authors' examples (github.com/QwenLM/Qwen-Image), also of diffusers'

    def embed(self, texts: Sequence[str]) -> Cond:
        longest = self.cfg.max_tokens or LONGEST
        embeds, mask = self.pipe.encode_prompt(list(texts), device=self.device, max_sequence_length=longest)
        if mask is None:  # what the pipeline returns if no caption needed padding
            mask = embeds.new_ones(embeds.shape[:2])
        more = longest - embeds.shape[1]
        return {"embeds": nn.functional.pad(embeds, (0, 0, 0, more)), "mask": nn.functional.pad(mask, (0, more)).bool()}


def _reader(pipe: Any, name: str, longest: int) -> Reader:
    """The first tokens of the template are dropped and do not count; the pipeline truncates twice."""
    dropped, most = pipe.prompt_template_encode_start_idx, pipe.tokenizer_max_length

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        return token_ids(pipe.tokenizer, [pipe.prompt_template_encode.format(text) for text in texts])

    return Reader(name, dropped + min(longest, most), tokens, plain=False)


TEMPLATES[QwenImage.pipeline] = _reader
