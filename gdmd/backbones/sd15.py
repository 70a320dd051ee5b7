"""Stable Diffusion 1.x (arXiv 2112.10752): eps-prediction on a VP schedule, one CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.backbones.base import PipelineText, network_dtype
from gdmd.backbones.clocks import VpClock, uniform_times, vp_schedule
from gdmd.backbones.codec import VaeCodec
from gdmd.backbones.unet import UnetFamily
from gdmd.config.model import DiffusersModel
from gdmd.diffusion.schedule import from_eps
from gdmd.types import Cond, Prediction


class Sd15(UnetFamily):
    """The network reads t_1000 = 999 t and the hidden states of one CLIP."""

    name = "sd15"
    pipeline = "StableDiffusionPipeline"
    needs = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    native = "eps"
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    blocks = ("BasicTransformerBlock",)
    reading = 0.33  # of the published UNet at 512, rank 64

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        super().__init__(pipe, cfg)
        self.net: nn.Module = pipe.unet
        self.schedule = vp_schedule(pipe.scheduler.config)
        self.clock = VpClock(self.schedule.train_steps)
        self.codec = VaeCodec(pipe.vae, cfg.decode_chunk, tiled=cfg.decode_tiled)
        self.encoder = Sd15Text(pipe, cfg)

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Any:
        dtype = network_dtype(net)
        return net(x_t.to(dtype), self.clock.t_1000(t), cond["embeds"].to(dtype), return_dict=False)[0]

    def prediction(self, answer: Any, x_t: Tensor, t: Tensor) -> Prediction:
        return from_eps(answer, x_t, t, self.schedule)

    def blank_text(self, count: int) -> Cond:
        return {"embeds": self._blank(count, 77, int(self.pipe.unet.config.cross_attention_dim))}

    def student_times(self, uniform: Sequence[float]) -> tuple[float, ...]:
        return self.clock.times(uniform)

    def teacher_times(self, steps: int) -> Tensor:
        """DDIM with trailing spacing; it ends on the first training step."""
        return torch.tensor([*self.clock.times(uniform_times(steps)), 0.0])


class Sd15Text(PipelineText):
    """embeds [B, 77, D]: the last hidden states of CLIP."""

    def embed(self, texts: Sequence[str]) -> Cond:
        embeds, _ = self.pipe.encode_prompt(list(texts), self.device, 1, do_classifier_free_guidance=False)
        return {"embeds": embeds}
