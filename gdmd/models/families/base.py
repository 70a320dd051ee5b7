"""A model family: one diffusers pipeline as denoiser, codec, text encoder and timestep mapping.

The quirks of a model (packing, micro-conditioning, shifts, its time scale) live in its subclass only.
"""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gdmd.config.model import DiffusersModel, FamilyName
from gdmd.diffusion.guidance import plain
from gdmd.diffusion.offload import Offloaded, called_children, offload_parts
from gdmd.diffusion.prompt_length import long_prompts
from gdmd.models.features import capture_features
from gdmd.models.lora_files import Factors
from gdmd.models.tokens import readers_of
from gdmd.models.vae import check_scaling
from gdmd.types import Codec, Cond, Guide, Native, Prediction, Schedule, StudentSampler

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Names of a pipeline's text encoders."""


class Family(ABC):
    """One opened pipeline. ``pipe`` is diffusers' object: its components are used, its ``__call__`` never."""

    name: ClassVar[FamilyName]
    pipeline: ClassVar[str]  # the class named in model_index.json
    needs: ClassVar[tuple[str, ...]]  # required components
    optional: ClassVar[tuple[str, ...]] = ()
    native: Native  # what the network predicts; the fake score's loss compares it
    targets: tuple[str, ...]  # the layers that get adapters by default, where the network has them
    patch: ClassVar[int] = 1  # latent positions along the side of a token
    multiple: ClassVar[int] = 1  # the sides of a latent are multiples of it (and of patch)
    blocks: ClassVar[tuple[str, ...]] = ()  # classes of the repeated blocks
    scaling: ClassVar[tuple[str, ...]] = ("scaling_factor", "shift_factor")  # VAE keys that the pipeline reads
    feature_cost: ClassVar[float] = 1.0  # of a call for features, in whole calls
    row_by_row: ClassVar[bool] = False  # whether a prediction calls the network once per sample
    tiny_decoder: ClassVar[bool] = True  # whether an AutoencoderTiny decodes its latents as they are
    caption_limit: ClassVar[int | None] = None  # largest max_sequence_length that the pipeline accepts
    fixed_captions: ClassVar[bool] = False  # its CLIP encoders always read all of their positions

    schedule: Schedule
    guide: Guide = staticmethod(plain)
    codec: Codec
    encoder: PipelineText
    net: nn.Module

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        self.pipe, self.cfg = pipe, cfg
        check_scaling(pipe.vae, self.scaling, cfg.what, self.pipeline)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent of cfg.height x cfg.width pixels. ValueError when the size does not fit."""
        _raise(self._size_mistakes())
        factor = self.pixels_per_latent
        return self.latent_channels, self.cfg.height // factor, self.cfg.width // factor

    def _size_mistakes(self) -> Iterator[str]:
        unit = self.pixels_per_latent * max(self.patch, self.multiple)
        for side, pixels in (("height", self.cfg.height), ("width", self.cfg.width)):
            if pixels % unit:
                yield (
                    f"model.{side} = {pixels}: {self.name} works on multiples of {unit} pixels; use "
                    f"{max(unit, round(pixels / unit) * unit)}"
                )
        token = self.pixels_per_latent * self.patch
        yield from self._position_mistakes(self.net, token, self.cfg.height, self.cfg.width, "model.")

    def at_size(self, height: int, width: int) -> Self:
        """The same networks for images of height x width pixels: latents of another shape, times of another shift."""
        other = copy.copy(self)
        other.cfg = self.cfg.at_size(height, width)
        return other

    def check_sizes(self) -> None:
        """ValueError for image sizes of cfg that do not fit, a line each."""
        wrong = list(self._size_mistakes())
        for height, width in sorted(set(self.cfg.sizes) - {(self.cfg.height, self.cfg.width)}):
            found = self.at_size(height, width)._size_mistakes()
            wrong += [f"model.sizes has {height} x {width}, and {mistake}" for mistake in found]
        _raise(wrong)

    def place(self, device: str, shared: Collection[str] = ()) -> None:
        """Move the networks to ``device``, or where cfg.offload says; components in ``shared`` are already there."""
        self.encoder.device, offload = torch.device(device), self.cfg.offload
        networks = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        for name in networks.keys() - set(shared):
            part: Any = networks[name]
            if part is self.net and offload == "base":
                blocks = [block for block in part.modules() if type(block).__name__ in self.blocks]
                offload_parts(part, blocks, device)
            elif name == "vae" and offload != "none":
                offload_parts(part, [*called_children(part.decoder), *called_children(part.encoder)], device)
            elif not (name in ENCODERS and offload != "none"):
                part.to(device)
        if offload != "none" and "text_encoder" not in shared:
            self.encoder.offload()

    @property
    def adapter_device(self) -> torch.device | None:
        """Where adapters are while the layers that they modify are on the CPU; None = with their layers."""
        return self.encoder.device if self.cfg.offload == "base" else None

    @classmethod
    def most_tokens(cls, net: Any) -> tuple[int, int] | None:
        """Rows and columns of image tokens for which the network has position embeddings; None = any number."""
        del net
        return None

    @classmethod
    def check_positions(cls, net: Any, unit: int, height: int | None, width: int | None, where: str) -> None:
        """ValueError for an image with more tokens, of ``unit`` pixels a side, than the network has positions.

        ``where``: prefix of height and width in the error. None is the network's native size.
        """
        _raise(cls._position_mistakes(net, unit, height, width, where))

    @classmethod
    def _position_mistakes(
        cls, net: Any, unit: int, height: int | None, width: int | None, where: str
    ) -> Iterator[str]:
        most = cls.most_tokens(net) or (math.inf, math.inf)
        for side, pixels, limit in (("height", height, most[0]), ("width", width, most[1])):
            if pixels is not None and pixels > limit * unit:
                yield (
                    f"{where}{side} = {pixels}: the network has positions for {limit * unit} pixels only; use a smaller "
                    "size"
                )

    def blank_text(self, count: int) -> Cond:
        """What ``encoder`` returns for ``count`` captions of full length, as zeros that take no memory: for plans."""
        raise ValueError(f"{self.name} cannot be planned: its adapter does not say what its conditioning looks like")

    def _blank(self, count: int, *shape: int) -> Tensor:
        """Zeros [count, *shape] in the network's dtype, expanded from one number."""
        return torch.zeros(1, dtype=network_dtype(self.net)).expand(count, *shape)

    @property
    def guidance_is_embedded(self) -> bool:
        """Whether the network reads model.embedded_guidance."""
        config: Any = self.net.config
        return bool(config.get("guidance_embeds")) or config.get("time_cond_proj_dim") is not None

    @abstractmethod
    def student_scheduler(self, sampler: StudentSampler) -> str:
        """The diffusers scheduler with which the stock pipeline samples a student as in training."""

    @abstractmethod
    def student_settings(self, steps: int, sampler: StudentSampler) -> dict[str, Any]:
        """The config of that scheduler for a student of ``steps`` steps."""

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along a side of one latent position (8 for the published VAEs)."""
        return int(self.pipe.vae_scale_factor)

    @property
    def latent_channels(self) -> int:
        config = self.pipe.vae.config
        return int(config.z_dim if "z_dim" in config else config.latent_channels)  # video VAEs call it z_dim

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """One call of ``net`` (the backbone or a copy of it). x_t [B, C, H, W], t [B] in [0, 1]; returns fp32."""
        return self.prediction(self.call(net, x_t, t, cond), x_t, t)

    @abstractmethod
    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Any:
        """The same call, returning the network's raw output (its first return value)."""

    @abstractmethod
    def prediction(self, output: Any, x_t: Tensor, t: Tensor) -> Prediction:
        """Convert the network's raw output at x_t and t to x0 and eps."""

    def features(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Hidden states of the image tokens, for a GAN head. [B, N, D], N = rows * columns of feature_grid"""
        with self.feature_mode(net):
            hidden = self.call(net, x_t, t, cond)
        return self.image_tokens(hidden, x_t)

    def feature_mode(self, net: Any) -> AbstractContextManager[None]:
        """Inside, ``net`` returns hidden states: for transformers, those after the last block."""
        return capture_features(net, net.norm_out)

    def image_tokens(self, hidden: Tensor, x_t: Tensor) -> Tensor:
        """The image tokens of these hidden states at latents x_t [B, C, H, W]. [B, N, D]"""
        del x_t
        return hidden

    @property
    def feature_width(self) -> int:
        """D of the features."""
        net: Any = self.net
        return int(net.inner_dim)

    def feature_grid(self, x_t: Tensor) -> tuple[int, int]:
        """Rows and columns of the features at latents x_t [B, C, H, W]."""
        return x_t.shape[-2] // self.patch, x_t.shape[-1] // self.patch

    @abstractmethod
    def student_times(self, uniform: Sequence[float]) -> tuple[float, ...]:
        """Uniform times in (0, 1], descending -> the family's times (its shift, or its discrete training steps)."""

    @abstractmethod
    def uniform_times(self, times: Sequence[float]) -> tuple[float, ...]:
        """The inverse of ``student_times``: method.student_steps of these times."""

    @abstractmethod
    def teacher_times(self, steps: int) -> Tensor:
        """The times of the pipeline's own sampler, from 1 to 0. [steps + 1], fp32"""


def _raise(mistakes: Iterable[str]) -> None:
    """ValueError with a line for each mistake, if there is one."""
    if found := "\n".join(mistakes):
        raise ValueError(found)


class PipelineText(ABC):
    """Captions -> conditioning through the pipeline's own encoders; all captions get the same number of tokens."""

    longest: ClassVar[int] = 0  # caption tokens by default, if the pipeline's call has no max_sequence_length
    no_caption: ClassVar[str] = ""  # the caption of the unconditional input
    loras: tuple[Factors, ...] = ()  # what each of model.teacher_loras changes in the encoders

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        self.pipe, self.cfg = pipe, cfg
        self.device: torch.device = torch.device("cpu")
        self._null: Cond | None = None
        self._offloaded: tuple[Offloaded, ...] = ()

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Cond:
        """Named tensors [B, ...] of these captions."""

    def offload(self) -> None:
        """Keep the encoders on the CPU, and on the device while they embed captions."""
        names = (name for name in ENCODERS if self.pipe.components.get(name) is not None)
        self._offloaded = tuple(Offloaded(self.pipe.components[name], self.device) for name in names)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        with ExitStack() as stack:
            for encoder in self._offloaded:
                stack.enter_context(encoder)
            yield

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Cond:
        with self._on_device():
            return self.embed(texts)

    @torch.no_grad()
    def null(self, count: int) -> Cond:
        """The unconditional input, embedded once and expanded."""
        if self._null is None:
            with self._on_device():
                self._null = self.embed_null()
        return {name: value.expand(count, *value.shape[1:]) for name, value in self._null.items()}

    def embed_null(self) -> Cond:
        """One row: ``no_caption``, unless a family overrides it. [1, ...]"""
        return self.embed([self.no_caption])

    def long_prompts(self, texts: Sequence[str]) -> str | None:
        """A message about captions longer than the encoders read; needs only the tokenizers."""
        given = f" (now {self.cfg.max_tokens})" if self.cfg.max_tokens else ""
        longer = self.longest or "max_sequence_length" in inspect.signature(type(self.pipe).__call__).parameters
        remedy = f"shorten them, or raise model.max_tokens{given}" if longer else "shorten them"
        return long_prompts(readers_of(self.pipe, self.cfg.max_tokens or self.longest), texts, remedy)

    def unload(self) -> None:
        """Drop the encoders (their memory is freed with the last reference); ``null`` is kept."""
        self.null(1)
        self._offloaded = ()
        for name in ENCODERS:
            if name in self.pipe.components:
                self.pipe.register_modules(**{name: None})


def stored_dtype(net: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a weight of a denoiser that is loaded in ``dtype``: diffusers keeps some in fp32 (Krea 2's norms)."""
    kept = any(part in (net._keep_in_fp32_modules or ()) for part in name.split("."))
    return torch.float32 if kept else dtype


def network_dtype(net: nn.Module) -> torch.dtype:
    """The dtype of a network's weights: of the first that is not a packed 4-bit one or an adapter's, which is fp32."""
    named = net.named_parameters()
    return next(p.dtype for name, p in named if p.is_floating_point() and ".lora_" not in name)
