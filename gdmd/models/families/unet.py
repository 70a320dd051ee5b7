"""What UNet families share: a VP schedule, what the UNet predicts, and where a GAN head reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.config.model import DiffusersModel
from gdmd.diffusion.guidance import Rescaled
from gdmd.diffusion.schedule import from_native
from gdmd.models.families.base import Family
from gdmd.models.features import stop_after_mid_block
from gdmd.models.schedulers import read_vp
from gdmd.models.vae import VaeCodec
from gdmd.types import Prediction, StudentSampler


class UnetFamily(Family):
    """A UNet that predicts eps, v or x0 on a VP schedule, as its scheduler says.

    A GAN head reads it after its mid block, as in DMD2 (arXiv 2405.14867, section 4.3). The rest is not computed.
    """

    # the layers of LCM-LoRA (arXiv 2311.05556). DMD students of the SDXL miniature have ShapesEval 0.72 with these and
    # with full weights, and less with adapters on the attention layers only (docs/LOG.md, entries 34 and 35)
    targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    )

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        super().__init__(pipe, cfg)
        self.net: nn.Module = pipe.unet
        self.settings = read_vp(pipe.scheduler, cfg.what)
        self.schedule, self.native, self.timesteps = (
            self.settings.schedule,
            self.settings.predicts,
            self.settings.timesteps,
        )
        if cfg.guidance_rescale:
            self.guide = Rescaled(cfg.guidance_rescale, self.native, self.schedule)
        self.codec = VaeCodec(pipe.vae, cfg.decode_chunk, tiled=cfg.decode_tiled)
        channels = (pipe.unet.config.in_channels, pipe.unet.config.out_channels)
        if channels != (self.latent_channels,) * 2:
            raise ValueError(
                f"{cfg.what}: its UNet has {channels[0]} input and {channels[1]} output channels, but latents "
                f"have {self.latent_channels}; inpainting, editing and variance-predicting models are not supported"
            )

    def prediction(self, output: Any, x_t: Tensor, t: Tensor) -> Prediction:
        return from_native(output, self.native, x_t, t, self.schedule)

    def guidance_input(self, t: Tensor, dtype: torch.dtype) -> Tensor | None:
        """An LCM's embedded guidance (arXiv 2310.04378): sines and cosines of 1000 (guidance - 1). [B, D], or None

        Computed in fp32; dtype: the network's.
        """
        width = self.pipe.unet.config.time_cond_proj_dim
        if width is None:
            return None
        half = width // 2
        rates = torch.exp(torch.arange(half, device=t.device) * -(math.log(10000.0) / (half - 1)))
        angles = 1000 * (self.cfg.embedded_guidance - 1) * rates
        row = nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2))
        return row.to(dtype).expand(len(t), -1)

    def student_scheduler(self, sampler: StudentSampler) -> str:
        return "LCMScheduler" if sampler == "renoise" else "DPMSolverMultistepScheduler"

    def student_settings(self, steps: int, sampler: StudentSampler) -> dict[str, Any]:
        return self.settings.few_steps(steps, sampler)

    def student_times(self, uniform: Sequence[float]) -> tuple[float, ...]:
        return self.timesteps.student(uniform)

    def uniform_times(self, times: Sequence[float]) -> tuple[float, ...]:
        return self.timesteps.uniform(times)

    def teacher_times(self, steps: int) -> Tensor:
        """DDIM's times with the pipeline's spacing."""
        return self.timesteps.teacher(steps)

    def feature_mode(self, net: Any) -> AbstractContextManager[None]:
        return stop_after_mid_block(net)

    def image_tokens(self, hidden: Tensor, x_t: Tensor) -> Tensor:
        del x_t
        return hidden.flatten(2).transpose(1, 2)  # [B, C, h, w] -> [B, h w, C]

    @property
    def feature_width(self) -> int:
        net: Any = self.net
        return int(net.config.block_out_channels[-1])

    def feature_grid(self, x_t: Tensor) -> tuple[int, int]:
        """Every level of the UNet except the last halves the latent, rounding up."""
        net: Any = self.net
        unit = 2 ** (len(net.config.block_out_channels) - 1)
        return -(-x_t.shape[-2] // unit), -(-x_t.shape[-1] // unit)
