"""Sana (arXiv 2410.10629): linear attention on latents of a deep autoencoder, captions after a long instruction."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.config.model import DiffusersModel
from gdmd.diffusion.prompt_length import Reader
from gdmd.diffusion.schedule import from_velocity
from gdmd.models.families.base import PipelineText, network_dtype
from gdmd.models.families.flow import FlowFamily
from gdmd.models.tokens import TEMPLATES, token_ids
from gdmd.models.vae import VaeCodec
from gdmd.types import Cond, Prediction

LONGEST = 300
"""Caption tokens, unless model.max_tokens says otherwise."""


class Sana(FlowFamily):
    """The network reads 1000 t (timestep_scale) and predicts eps - x0.

    The published scheduler is a DPM-Solver; teacher and student here use Euler's method with the same shift, which the
    stock pipeline supports too.
    """

    name = "sana"
    pipeline = "SanaPipeline"
    needs = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    targets = (
        *(f"attn{k}.{layer}" for k in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")),
        *("ff.conv_inverted", "ff.conv_point"),  # not its depthwise convolution: grouped ones take no adapter
    )
    blocks = ("SanaTransformerBlock",)
    tiny_decoder = False
    scaling = ("scaling_factor",)

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        super().__init__(pipe, cfg)
        self.codec = DeepCodec(pipe.vae, cfg.decode_chunk, tiled=cfg.decode_tiled)
        self.encoder = SanaText(pipe, cfg)
        if self.settings.dynamic:
            raise ValueError(
                f"{cfg.what}: its scheduler has use_dynamic_shifting, which SanaPipeline does not support; "
                "save it with a constant shift"
            )

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Any:
        dtype = network_dtype(net)
        return net(
            x_t.to(dtype),
            encoder_hidden_states=cond["embeds"].to(dtype),
            encoder_attention_mask=cond["mask"],
            timestep=1000 * self.network_time(t) * self.pipe.transformer.config.timestep_scale,
            return_dict=False,
        )[0]

    def prediction(self, output: Any, x_t: Tensor, t: Tensor) -> Prediction:
        return from_velocity(output[:, : x_t.shape[1]], x_t, t, self.schedule)  # some networks add a variance

    @property
    def feature_width(self) -> int:
        config = self.pipe.transformer.config
        return int(config.num_attention_heads * config.attention_head_dim)

    def blank_text(self, count: int) -> Cond:
        longest = self.cfg.max_tokens or LONGEST
        embeds = self._blank(count, longest, self.pipe.transformer.config.caption_channels)
        return {"embeds": embeds, "mask": torch.ones(count, longest, dtype=torch.long)}

    def teacher_times(self, steps: int) -> Tensor:
        return self.evenly_to_the_last(steps)


class DeepCodec(VaeCodec):
    """An AutoencoderDC, which encodes to a latent instead of a distribution."""

    def encode_chunk(self, images: Tensor) -> Tensor:
        z: Tensor = self.vae.encode(images, return_dict=False)[0]
        return z


class SanaText(PipelineText):
    """embeds [B, T, D]: the first token and the last T - 1 after the pipeline's instruction; mask [B, T], 1 = caption."""

    def embed(self, texts: Sequence[str]) -> Cond:
        return self._embed(texts, inspect.signature(self.pipe.__call__).parameters["complex_human_instruction"].default)

    def embed_null(self) -> Cond:
        """The pipeline embeds its negative caption without the instruction."""
        return self._embed([""], None)

    def _embed(self, texts: Sequence[str], instruction: Sequence[str] | None) -> Cond:
        embeds, mask, _, _ = self.pipe.encode_prompt(
            list(texts),
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.cfg.max_tokens or LONGEST,
            complex_human_instruction=instruction,
        )
        return {"embeds": embeds, "mask": mask}


def _reader(pipe: Any, name: str, longest: int) -> Reader:
    """Captions after an instruction, of which only two tokens count."""
    lines = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    instruction = "\n".join(lines)

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        return token_ids(pipe.tokenizer, [instruction + text.lower().strip() for text in texts])

    return Reader(name, len(pipe.tokenizer.encode(instruction)) + longest - 2, tokens, plain=False)


TEMPLATES[Sana.pipeline] = _reader
