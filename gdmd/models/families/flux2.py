"""FLUX.2: rectified flow on packed latents that are normalized patch by patch, captions from three layers of one encoder.

Two pipelines: dev has embedded guidance, klein uses classifier-free guidance (its distilled checkpoints: none).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gdmd.config.model import DiffusersModel, FamilyName
from gdmd.diffusion.prompt_length import Reader
from gdmd.models.families.base import PipelineText, network_dtype
from gdmd.models.families.flow import FlowFamily
from gdmd.models.packing import pack
from gdmd.models.tokens import TEMPLATES, chat_reader
from gdmd.models.vae import VaeCodec
from gdmd.types import Cond

LONGEST = 512
"""Caption tokens, unless model.max_tokens says otherwise; every caption is padded to them."""


class Flux2(FlowFamily):
    """The network reads t itself, four coordinates of every token, and (dev) model.embedded_guidance.

    All roles use the embedded guidance: set method.guidance = 1 to avoid an unconditional pass on top of it.
    Latents are the VAE's, normalized (``PatchCodec``); the pipeline's own are the same in patches of 2 x 2.
    """

    name: ClassVar[FamilyName] = "flux2"
    pipeline = "Flux2Pipeline"
    needs = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    targets: tuple[str, ...] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out", "attn.to_qkv_mlp_proj"),
    )
    patch = 2
    tiny_decoder = False
    blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        super().__init__(pipe, cfg)
        self.codec = PatchCodec(pipe.vae, cfg.decode_chunk, tiled=cfg.decode_tiled)
        self.encoder = Flux2Text(pipe, cfg)
        singles = range(pipe.transformer.config.num_single_layers)
        # "attn.to_out" alone would also name the double blocks' lists of layers
        self.targets = (*self.targets, *(f"single_transformer_blocks.{i}.attn.to_out" for i in singles))

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Any:
        dtype = network_dtype(net)
        height, width = x_t.shape[-2:]
        guided = self.guidance_is_embedded
        embeds = cond["embeds"].to(dtype)
        return net(
            hidden_states=pack(x_t).to(dtype),
            timestep=self._scaled(self.network_time(t), dtype),
            guidance=self._scaled(torch.full_like(t, self.cfg.embedded_guidance), dtype) if guided else None,
            encoder_hidden_states=embeds,
            txt_ids=_positions(1, 1, embeds.shape[1], x_t.device),
            img_ids=_positions(height // 2, width // 2, 1, x_t.device),
            return_dict=False,
        )[0]

    def _scaled(self, number: Tensor, dtype: torch.dtype) -> Tensor:
        """What the network reads, and multiplies by 1000 in its own dtype.

        A full copy, in fp32, gets a number whose product is that of the frozen weights' dtype, so that at step 0 it equals
        the frozen network.
        """
        narrow = self.rounded(number)
        return number if narrow.dtype == dtype else (narrow * 1000).float() / 1000

    def blank_text(self, count: int) -> Cond:
        width = self.pipe.transformer.config.joint_attention_dim
        return {"embeds": self._blank(count, self.cfg.max_tokens or LONGEST, width)}

    def mu(self, steps: int) -> float:
        return empirical_mu(self.tokens, steps)


class Flux2Klein(Flux2):
    """No embedded guidance. Its distilled checkpoints are used without guidance: set method.guidance = 1 for them."""

    name = "flux2_klein"
    pipeline = "Flux2KleinPipeline"


def empirical_mu(tokens: int, steps: int) -> float:
    """mu of FLUX.2's pipelines: linear in the tokens, at 10 and at 200 steps; linear in the steps between (and beyond).

    mu_10 = 8.73809524e-5 tokens + 1.89833333, mu_200 = 1.6927e-4 tokens + .45666666; above 4,300 tokens always mu_200.
    """
    few, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return many if tokens > 4300 else many + (many - few) * (steps - 200) / 190


def _positions(rows: int, columns: int, words: int, device: torch.device) -> Tensor:
    """(0, row, column, word) of every token: of an image words = 1, of a caption rows = columns = 1. [N, 4]"""
    return torch.cartesian_prod(*(torch.arange(count, device=device) for count in (1, rows, columns, words)))


class PatchCodec(VaeCodec):
    """AutoencoderKLFlux2: z = latent std + mean, with one pair per channel and position in a patch of 2 x 2.

    They are the running statistics of the VAE's batch norm, std^2 = its variance + batch_norm_eps.
    """

    def to_vae(self, latents: Tensor) -> Tensor:
        std, mean = self._statistics(latents)
        return latents.float() * std + mean

    def from_vae(self, z: Tensor) -> Tensor:
        std, mean = self._statistics(z)
        return (z - mean) / std

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(std, mean) at every position. [C, H, W] each"""
        norm, (height, width) = self.vae.bn, latents.shape[-2:]
        std, mean = (norm.running_var.float() + self.vae.config.batch_norm_eps).sqrt(), norm.running_mean.float()
        std, mean = (row.to(latents.device).reshape(-1, 2, 2).repeat(1, height // 2, width // 2) for row in (std, mean))
        return std, mean


class Flux2Text(PipelineText):
    """embeds [B, T, 3 D]: three hidden layers concatenated, padding included (nothing is masked)."""

    def embed(self, texts: Sequence[str]) -> Cond:
        longest = self.cfg.max_tokens or LONGEST
        embeds, _ = self.pipe.encode_prompt(list(texts), device=self.device, max_sequence_length=longest)
        return {"embeds": embeds}


def _dev_reader(pipe: Any, name: str, longest: int) -> Reader:
    """Captions after a long system message, which counts."""
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        messages = format_input(list(texts), pipe.system_message)
        options = {"add_generation_prompt": False, "tokenize": True, "return_dict": True, "truncation": False}
        ids: list[list[int]] = pipe.tokenizer.apply_chat_template(messages, padding=False, **options)["input_ids"]
        return ids

    return Reader(name, longest, tokens, plain=False)


TEMPLATES[Flux2.pipeline] = _dev_reader
TEMPLATES[Flux2Klein.pipeline] = partial(chat_reader, thinking=False)
