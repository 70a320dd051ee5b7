"""What a model family is: one diffusers pipeline seen as denoiser, codec, text encoder and clock.

The quirks of a model (packing, micro-conditioning, shifts, its own time) live in its subclass only.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gdmd.config.model import DiffusersModel, FamilyName
from gdmd.diffusion.guidance import plain
from gdmd.diffusion.prompt_length import long_prompts
from gdmd.models.features import answering_before
from gdmd.models.tokens import readers_of
from gdmd.models.vae import check_scaling
from gdmd.types import Codec, Cond, Guide, Native, Prediction, Schedule


class Family(ABC):
    """One opened pipeline. ``pipe`` is diffusers' object: its components are used, its ``__call__`` never.

    Class facts: ``name``; ``pipeline``, the class named in model_index.json; ``needs`` and ``optional``, the
    components that must and may be there; ``native``, what the network predicts and its fake loss compares; ``targets``,
    the layers that take adapters; ``patch``, latent positions along the side of a token; ``blocks``, the classes of the
    repeated blocks; ``scaling``, the keys of the VAE that the pipeline reads; ``reading``, what a call for features costs,
    in whole calls; ``tiny_decoder``, whether there are AutoencoderTinys that take its latents as they are.
    """

    name: ClassVar[FamilyName]
    pipeline: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    native: Native
    targets: tuple[str, ...]
    patch: ClassVar[int] = 1
    blocks: ClassVar[tuple[str, ...]] = ()
    scaling: ClassVar[tuple[str, ...]] = ("scaling_factor", "shift_factor")
    reading: ClassVar[float] = 1.0
    tiny_decoder: ClassVar[bool] = True

    schedule: Schedule
    guide: Guide = staticmethod(plain)
    codec: Codec
    encoder: PipelineText
    net: nn.Module

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        self.pipe, self.cfg = pipe, cfg
        check_scaling(pipe.vae, self.scaling, f"model.path {cfg.path!r}", self.pipeline)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent of cfg.height x cfg.width pixels. ValueError when the size does not fit."""
        factor = self.pixels_per_latent
        unit = factor * self.patch
        for side, pixels in (("height", self.cfg.height), ("width", self.cfg.width)):
            if pixels % unit:
                raise ValueError(
                    f"model.{side} = {pixels}: {self.name} works on multiples of {unit} pixels; use "
                    f"{max(unit, round(pixels / unit) * unit)}"
                )
        self.check_positions(self.net, unit, self.cfg.height, self.cfg.width, "model.")
        return self.latent_channels, self.cfg.height // factor, self.cfg.width // factor

    @classmethod
    def most_tokens(cls, net: Any) -> tuple[int, int] | None:
        """Rows and columns of image tokens for which the network has positions; None = any number."""
        del net
        return None

    @classmethod
    def check_positions(cls, net: Any, unit: int, height: int | None, width: int | None, where: str) -> None:
        """ValueError for an image with more tokens, of ``unit`` pixels a side, than the network has positions.

        ``where`` begins the error's names of height and width; None is the network's own size.
        """
        most = cls.most_tokens(net) or (math.inf, math.inf)
        for side, pixels, limit in (("height", height, most[0]), ("width", width, most[1])):
            if pixels is not None and pixels > limit * unit:
                raise ValueError(
                    f"{where}{side} = {pixels}: the network has positions for {limit * unit} pixels only; use a smaller "
                    "size"
                )

    def blank_text(self, count: int) -> Cond:
        """What ``encoder`` gives for ``count`` captions of full length, all zeros and without its memory: for plans."""
        raise ValueError(f"{self.name} cannot be planned: its adapter does not say what its conditioning looks like")

    def _blank(self, count: int, *shape: int) -> Tensor:
        """Zeros [count, *shape] in the network's dtype that take the memory of one number."""
        return torch.zeros(1, dtype=network_dtype(self.net)).expand(count, *shape)

    @property
    def guidance_is_embedded(self) -> bool:
        """Whether the network reads model.embedded_guidance."""
        config: Any = self.net.config
        return bool(config.get("guidance_embeds")) or config.get("time_cond_proj_dim") is not None

    @property
    @abstractmethod
    def student_scheduler(self) -> str:
        """The class of diffusers' scheduler with which the stock pipeline samples a student as in training."""

    @abstractmethod
    def student_settings(self, steps: int) -> dict[str, Any]:
        """The config of that scheduler for a student of ``steps`` steps."""

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along a side of one latent position (8 for the published VAEs)."""
        return int(self.pipe.vae_scale_factor)

    @property
    def latent_channels(self) -> int:
        return int(self.pipe.vae.config.latent_channels)

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """One call of ``net`` (the trunk or a copy of it). x_t [B, C, H, W], t [B] in [0, 1]; answers in fp32."""
        return self.prediction(self.call(net, x_t, t, cond), x_t, t)

    @abstractmethod
    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Any:
        """The same call, answered as the network answers: the first thing that it returns."""

    @abstractmethod
    def prediction(self, answer: Any, x_t: Tensor, t: Tensor) -> Prediction:
        """What an answer of the network at x_t and t means."""

    def features(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Hidden states of the image tokens, which a GAN head reads. [B, N, D], N = rows columns of feature_shape"""
        with self.reads(net):
            hidden = self.call(net, x_t, t, cond)
        return self.image_tokens(hidden)

    def reads(self, net: Any) -> AbstractContextManager[None]:
        """Inside, ``net`` answers with its hidden states: of transformers, those after the last block."""
        return answering_before(net, net.norm_out)

    def image_tokens(self, hidden: Tensor) -> Tensor:
        """The image's part of these hidden states. [B, N, D]"""
        return hidden

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(D, rows, columns) of the features."""
        net: Any = self.net
        _, height, width = self.latent_shape
        return int(net.inner_dim), height // self.patch, width // self.patch

    @abstractmethod
    def student_times(self, uniform: Sequence[float]) -> tuple[float, ...]:
        """Uniform times in (0, 1], falling -> the family's own clock (its shift, or its discrete training steps)."""

    @abstractmethod
    def teacher_times(self, steps: int) -> Tensor:
        """steps + 1 times from 1 to 0: those of the pipeline's own sampler. [steps + 1], fp32"""


class PipelineText(ABC):
    """Captions -> conditioning through the pipeline's own encoders; all captions get the same number of tokens."""

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        self.pipe, self.cfg = pipe, cfg
        self.device: torch.device = torch.device("cpu")
        self._null: Cond | None = None

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Cond:
        """Named tensors [B, ...] of these captions."""

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Cond:
        return self.embed(texts)

    @torch.no_grad()
    def null(self, count: int) -> Cond:
        """The unconditional input, embedded once and shared."""
        if self._null is None:
            self._null = self.embed_null()
        return {name: value.expand(count, *value.shape[1:]) for name, value in self._null.items()}

    def embed_null(self) -> Cond:
        """One row: the empty caption, unless a family says otherwise. [1, ...]"""
        return self.embed([""])

    def long_prompts(self, texts: Sequence[str]) -> str | None:
        """A message about captions that are longer than the encoders read; only the tokenizers are needed."""
        given = f" (now {self.cfg.max_tokens})" if self.cfg.max_tokens else ""
        longer = "max_sequence_length" in inspect.signature(type(self.pipe).__call__).parameters
        remedy = f"shorten them, or raise model.max_tokens{given}" if longer else "shorten them"
        return long_prompts(readers_of(self.pipe, self.cfg.max_tokens), texts, remedy)

    def unload(self) -> None:
        """Forget the encoders (their memory is free once nobody else holds them); ``null`` stays."""
        self.null(1)
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if name in self.pipe.components:
                self.pipe.register_modules(**{name: None})


def network_dtype(net: nn.Module) -> torch.dtype:
    """The dtype of the weights that a network computes with (its first parameter)."""
    return next(net.parameters()).dtype
