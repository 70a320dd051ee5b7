"""Krea 2: a single-stream flow transformer on packed latents, captions from twelve layers of one encoder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.config.model import DiffusersModel
from gdmd.diffusion.prompt_length import Reader
from gdmd.models.families.base import PipelineText, network_dtype
from gdmd.models.families.flow import FlowFamily
from gdmd.models.families.qwen_image import FrameCodec
from gdmd.models.features import capture_features
from gdmd.models.packing import pack
from gdmd.models.tokens import TEMPLATES, token_ids
from gdmd.types import Cond

LONGEST = 512
"""Caption tokens, unless model.max_tokens says otherwise; every caption is padded to them."""
DISTILLED_MU = 1.15
"""mu of the distilled checkpoint at every size; the base model's grows with the image."""


class Krea2(FlowFamily):
    """The network reads t itself. Latents and VAE are Qwen-Image's."""

    name = "krea2"
    pipeline = "Krea2Pipeline"
    needs = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate", "attn.to_out.0"),
        *("ff.gate", "ff.up", "ff.down"),
    )
    patch = 2
    scaling = ("latents_mean", "latents_std")
    tiny_decoder = False
    max_image_tokens = 6400
    blocks = ("Krea2TransformerBlock",)

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        super().__init__(pipe, cfg)
        self.codec = FrameCodec(pipe.vae, cfg.decode_chunk, tiled=cfg.decode_tiled)
        self.encoder = Krea2Text(pipe, cfg)

    def network_time(self, t: Tensor) -> Tensor:
        return t  # its pipeline divides by num_train_timesteps, whatever it is

    def mu(self, steps: int) -> float | None:
        del steps
        return DISTILLED_MU if self.pipe.config.get("is_distilled") else None

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Any:
        dtype = network_dtype(net)
        height, width = x_t.shape[-2:]
        embeds = cond["embeds"].to(dtype)
        return net(
            hidden_states=pack(x_t).to(dtype),
            encoder_hidden_states=embeds,
            timestep=self.rounded(self.network_time(t)),  # the network does not round it, its pipeline does
            position_ids=_positions(embeds.shape[1], height // 2, width // 2, x_t.device),
            encoder_attention_mask=cond["mask"],
            return_dict=False,
        )[0]

    def feature_mode(self, net: Any) -> AbstractContextManager[None]:
        return capture_features(net, net.final_layer)

    @property
    def feature_width(self) -> int:
        net: Any = self.net
        return int(net.hidden_size)

    def blank_text(self, count: int) -> Cond:
        longest, config = self.cfg.max_tokens or LONGEST, self.pipe.transformer.config
        embeds = self._blank(count, longest, config.num_text_layers, config.text_hidden_dim)
        return {"embeds": embeds, "mask": torch.ones(count, longest, dtype=torch.bool)}


def _positions(words: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """(0, 0, 0) for every caption token, then (0, row, column) of every image token. [words + rows columns, 3]"""
    places = torch.cartesian_prod(*(torch.arange(count, device=device) for count in (1, rows, columns)))
    return torch.cat([places.new_zeros(words, 3), places])


class Krea2Text(PipelineText):
    """embeds [B, T, L, D], L hidden layers of the encoder; mask [B, T], false for the padding between caption and end."""

    def embed(self, texts: Sequence[str]) -> Cond:
        longest = self.cfg.max_tokens or LONGEST
        embeds, mask = self.pipe.encode_prompt(list(texts), device=self.device, max_sequence_length=longest)
        return {"embeds": embeds, "mask": mask}


def _reader(pipe: Any, name: str, longest: int) -> Reader:
    """The first tokens of the template are dropped and do not count; its end is appended after the truncation."""
    limit = longest + pipe.prompt_template_encode_start_idx - pipe.prompt_template_encode_num_suffix_tokens

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        return token_ids(pipe.tokenizer, [pipe.prompt_template_encode_prefix + text for text in texts])

    return Reader(name, limit, tokens, plain=False)


TEMPLATES[Krea2.pipeline] = _reader
