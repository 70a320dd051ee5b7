"""Qwen-Image-2.1: a single-stream flow transformer on unpatched latents, an unpadded caption, a VAE of RGBA frames.

Its caption tokens are modulated at t = 0 and see no image token. It was trained to be sampled without guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.config.model import DiffusersModel
from gdmd.diffusion.prompt_length import Reader
from gdmd.diffusion.schedule import from_velocity
from gdmd.models.families.base import PipelineText, network_dtype
from gdmd.models.families.flow import FlowFamily
from gdmd.models.families.qwen_image import FrameCodec
from gdmd.models.tokens import TEMPLATES, token_ids
from gdmd.models.vae import on_white
from gdmd.types import Cond, Prediction

LONGEST = 512
"""Caption tokens, unless model.max_tokens says otherwise. The pipeline itself has no limit."""
SLOT = 4
"""Latent positions of an image slot, in which the network counts."""


class QwenImage21(FlowFamily):
    """The network reads t itself.

    The position of the image follows the number of caption tokens, padding included. Each sample is therefore a call
    without padding, so that it does not depend on the other captions of its batch.
    """

    name = "qwen_image21"
    pipeline = "QwenImage21Pipeline"
    needs = ("transformer", "vae", "text_encoder", "processor", "scheduler")
    targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out"),
    )
    multiple = 2  # an image slot of the network holds 2 x 2 latents
    scaling = ("latents_mean", "latents_std")
    row_by_row = True
    tiny_decoder = False
    blocks = ("QwenImage21TransformerBlock",)

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        super().__init__(pipe, cfg)
        self.codec = RgbaCodec(pipe.vae, cfg.decode_chunk, tiled=cfg.decode_tiled)
        self.encoder = QwenImage21Text(pipe, cfg)

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Any:
        dtype = network_dtype(net)
        height, width = x_t.shape[-2:]
        slots, answers = [True] * (height * width // SLOT), []
        for latents, time, embeds, count in zip(
            x_t.to(dtype), self.network_time(t), cond["embeds"].to(dtype), cond["tokens"].tolist(), strict=True
        ):
            answers.append(
                net(
                    hidden_states=latents.flatten(1).T[None],
                    encoder_hidden_states=embeds[None, :count],
                    timestep=time[None],
                    img_shapes=[[(1, height, width)]],
                    img_mask=torch.tensor([[False] * count + slots], device=x_t.device),
                    return_dict=False,
                )[0][:, -height * width :]
            )
        return torch.cat(answers)

    def prediction(self, output: Any, x_t: Tensor, t: Tensor) -> Prediction:
        return from_velocity(output.transpose(1, 2).reshape(x_t.shape), x_t, t, self.schedule)

    def teacher_times(self, steps: int) -> Tensor:
        """The pipeline's own times, if it has some for this number of steps (Turbo)."""
        own = self.pipe.config.get("sample_sigmas") or ()
        return self.timesteps_for(steps).teacher(own) if len(own) == steps else super().teacher_times(steps)

    @classmethod
    def most_tokens(cls, net: Any) -> tuple[int, int]:
        """The network's table has 1024 negative positions, for half of a side."""
        del net
        return 2048, 2048

    def blank_text(self, count: int) -> Cond:
        longest = self.cfg.max_tokens or LONGEST
        embeds = self._blank(count, longest, self.pipe.transformer.config.context_in_dim)
        return {"embeds": embeds, "tokens": torch.full((count,), longest)}


class RgbaCodec(FrameCodec):
    """Images [B, 3, H, W]: decoded ones on white, as the text encoder saw transparent images in training."""

    def decode_chunk(self, z: Tensor) -> Tensor:
        return 2 * on_white((super().decode_chunk(z) + 1) / 2) - 1

    def encode_chunk(self, images: Tensor) -> Tensor:
        return super().encode_chunk(torch.cat([images, torch.ones_like(images[:, :1])], 1))


class QwenImage21Text(PipelineText):
    """embeds [B, T, D], zeros after the caption; tokens [B], the caption's length.

    One caption at a time: the encoder's positions depend on the padding on the left.
    """

    longest = LONGEST

    def embed(self, texts: Sequence[str]) -> Cond:
        longest = self.cfg.max_tokens or LONGEST
        rows = [self.pipe.encode_prompt([text], device=self.device)[0][0, :longest] for text in texts]
        embeds = torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
        return {"embeds": embeds, "tokens": torch.tensor([len(row) for row in rows], device=embeds.device)}


def _reader(pipe: Any, name: str, longest: int) -> Reader:
    """The system message of the template is dropped and does not count."""

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        return token_ids(pipe.processor.tokenizer, [pipe.prompt_template_t2i.format(text) for text in texts])

    return Reader(name, pipe._drop_idx + longest, tokens, plain=False)


TEMPLATES[QwenImage21.pipeline] = _reader
