"""Base classes of the rewards. To add a pretrained one:

1. Describe its options in config/rewards.py.
2. Write gdmd/rewards/NAME.py: a subclass of ``PretrainedReward`` with ``_loader`` and ``_formula`` (see clip.py); export it
   in gdmd/rewards/__init__.py.
3. Name its weights in gdmd/rewards/weights.py (``PRETRAINED``); its authors' .pt file is converted once by convert.py.
4. List it in recipes/build_rewards.py (``CLASSES``) and its weights in reward_identity.py.
5. Add it to ``REWARDS`` in tests/support/tiny_rewards.py: tests/rewards/test_contract.py tests every reward.
A reward without a pretrained network needs no class: write a Python function (see callable.py).
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gdmd.config.load import validated
from gdmd.config.rewards import DeviceOptions, NetworkReward
from gdmd.diffusion.device import DTYPES, to_device_async
from gdmd.diffusion.offload import Offloaded
from gdmd.diffusion.prompt_length import long_prompts
from gdmd.rewards.preprocessing import ImageInput, Preprocess, check_finite, check_images, from_pil
from gdmd.rewards.weights import PaddedTokenizer
from gdmd.types import PromptBatch, Reward

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)
Tokenize = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Texts -> input_ids [B, L] and attention_mask [B, L] int64, padded to one length whatever the batch is."""


class RewardModel(ABC):
    """A reward that can be called with images and prompts. ``config`` describes it in a recipe."""

    name: str
    differentiable: bool
    config: Any
    in_memory: bool = False
    """Whether it was built ``from_modules``, which ``config`` does not name."""

    @abstractmethod
    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B], fp32; NaN = not scored."""

    def to(self, device: str) -> Self:
        """Move the weights, if there are any, to a device."""
        return self

    @torch.no_grad()
    def __call__(
        self, images: Tensor | Image | Sequence[Image], prompts: str | Sequence[str], **columns: Any
    ) -> list[float]:
        """One score per image; NaN = not scored.

        images: PIL images of any size (or one), or a tensor [B, 3, H, W] in [0, 1]. prompts: one per image, or one for all.
        columns: metadata of the prompts, each a list with one entry per image. ValueError unless the counts agree.
        """
        several = images if isinstance(images, Tensor | Sequence) else [images]
        texts = [prompts] * len(several) if isinstance(prompts, str) else list(prompts)
        lengths = {"prompts": len(texts)} | {name: len(values) for name, values in columns.items()}
        if wrong := [f"{count} {name}" for name, count in lengths.items() if count != len(several)]:
            raise ValueError(f"{self.name} got {len(several)} images and {', '.join(wrong)}; give one per image")
        rows = [{"prompt": text} for text in texts]
        meta = [row | {name: values[k] for name, values in columns.items()} for k, row in enumerate(rows)]
        if isinstance(several, Tensor):
            return self.score(several, _batch(texts, meta, several.device)).tolist()
        return score_images(self, several, texts, meta)


class JoinedReward(RewardModel):
    """A reward that is computed from the scores of others."""

    rewards: Sequence[Reward]

    @abstractmethod
    def joined(self, scores: Sequence[Tensor]) -> Tensor:
        """Raw scores [B] of each of ``rewards`` -> [B], fp32."""


@torch.no_grad()
def score_images(
    reward: Reward,
    images: Sequence[Image],
    texts: Sequence[str],
    meta: Sequence[Mapping[str, Any]],
    device: torch.device | str = "cpu",
    columns: frozenset[str] = frozenset(),
) -> list[float]:
    """One number per image, NaN = not scored. Published models get PIL images, as in their own code; others tensors.

    columns: names of the metadata of all prompts, which some prompts may lack.
    """
    if isinstance(reward, PretrainedReward):
        return [float(score) for score in reward.score_pil(images, texts, meta)]
    if isinstance(reward, JoinedReward):
        scores = [score_images(one, images, texts, meta, device, columns) for one in reward.rewards]
        return reward.joined([torch.tensor(one) for one in scores]).tolist()
    return score_by_size(reward, images, texts, meta, device, columns)


@torch.no_grad()
def score_by_size(
    reward: Reward,
    images: Sequence[Image],
    texts: Sequence[str],
    meta: Sequence[Mapping[str, Any]],
    device: torch.device | str = "cpu",
    columns: frozenset[str] = frozenset(),
) -> list[float]:
    """One number per image, NaN = not scored: those of a tensor for each size of the images. columns: see score_images."""
    scores = [math.nan] * len(images)
    for size in dict.fromkeys(image.size for image in images):
        own = [k for k, image in enumerate(images) if image.size == size]
        pixels = from_pil([images[k] for k in own]).to(device)
        prompts = _batch([texts[k] for k in own], [meta[k] for k in own] if meta else (), device, columns)
        for k, score in zip(own, reward.score(pixels, prompts).tolist(), strict=True):
            scores[k] = score
    return scores


def _batch(
    texts: Sequence[str],
    meta: Sequence[Mapping[str, Any]],
    device: torch.device | str,
    columns: frozenset[str] = frozenset(),
) -> PromptBatch:
    index = torch.arange(len(texts), device=device)
    return PromptBatch(index, tuple(texts), index, {}, {}, tuple(meta), columns=columns)


@dataclass(frozen=True)
class Loaded:
    """The network of a reward, its tokenizer (None if it reads no text) and its head, which stays in fp32."""

    net: nn.Module
    tokenize: Tokenize | None
    head: nn.Module | None = None


@dataclass(frozen=True)
class Placement:
    """Where and how a reward runs.

    dtype: of the weights and the towers; preprocessing, cosine and head are always fp32.
    offload: keep the weights on the CPU between calls. After a call with gradient the copies on the device stay until
        its backward pass is done.
    chunk: images per forward pass; 0 = the whole batch.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    offload: bool = False
    chunk: int = 0

    @classmethod
    def of(cls, config: DeviceOptions) -> Placement:
        """The options of a reward; without a device, a GPU if there is one."""
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        placement = cls(device, DTYPES[config.dtype])
        if isinstance(config, NetworkReward):
            return replace(placement, offload=config.offload, chunk=config.chunk)
        return placement


DEFAULT_PLACEMENT = Placement()


def set_dtype(net: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights. Buffers that are not weights keep their precision, as in ``from_pretrained(dtype=...)``.

    The frequencies of rotary embeddings are such buffers: in bf16, the angle at position 800 would be off by a radian.
    """
    kept = list(computed_buffers(net))
    net.to(dtype)
    for module, name, value in kept:
        setattr(module, name, value)


def computed_buffers(net: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(module, name, value) of every buffer that is not stored with the weights."""
    for module in net.modules():
        for name, value in module.named_buffers(recurse=False):
            if name not in module.state_dict():
                yield module, name, value


class PretrainedReward(RewardModel):
    """A frozen, differentiable image scorer, loaded on first use. A score never depends on the rest of the batch.

    ``score`` is the differentiable path, for training; ``score_pil`` preprocesses as the authors did, for reported numbers.
    """

    config_class: ClassVar[type[NetworkReward]]
    fit: ClassVar[Preprocess] = Preprocess()
    """The preprocessing; its size is replaced by that of the network."""
    differentiable = True

    def __init__(self, **options: Any) -> None:
        """options: the fields of ``config_class``. ConfigError lists all mistakes; ValueError for missing weights."""
        self._configure(options)
        self._load = self._loader()

    @classmethod
    def from_modules(
        cls, net: nn.Module, tokenize: Tokenize | None, head: nn.Module | None = None, **options: Any
    ) -> Self:
        """From a network, a tokenizer and a head that are already loaded."""
        reward = cls.__new__(cls)
        reward._configure(options)
        reward._load, reward.in_memory = lambda: Loaded(net, tokenize, head), True
        return reward

    def _configure(self, options: Mapping[str, Any]) -> None:
        self.config: Any = validated(self.config_class, dict(options), type(self).__name__)
        self.name, self.placement = str(self.config.kind), Placement.of(self.config)
        self._loaded: Loaded | None = None
        self._weights: AbstractContextManager[None] = nullcontext()  # of a network that is offloaded
        self._warned = False

    @abstractmethod
    def _loader(self) -> Callable[[], Loaded]:
        """Find the weights that ``config`` names, and return what loads them. ValueError if they are missing."""

    def to(self, device: str) -> Self:
        """Move to another device. Images may be on any device; scores are returned on the device of the images."""
        self.placement = replace(self.placement, device=device)
        if self._loaded is not None:
            self._place(self._loaded)
        return self

    @property
    def loaded(self) -> Loaded:
        """The network, loaded and frozen on first use."""
        if self._loaded is None:
            loaded = self._load()
            set_dtype(loaded.net, self.placement.dtype)
            loaded.net.eval().requires_grad_(False)
            if loaded.head is not None:
                loaded.head.float().eval().requires_grad_(False)
            self._place(loaded)
            self._loaded = loaded
        return self._loaded

    def _place(self, loaded: Loaded) -> None:
        device = self.placement.device
        if loaded.head is not None:
            loaded.head.to(device)
        if self.placement.offload:
            self._weights = Offloaded(loaded.net, device)
        else:
            loaded.net.to(device)

    @property
    def preprocess(self) -> ImageInput:
        """The preprocessing at the input size of this network."""
        return replace(self.fit, size=self._image_size(self.loaded.net))

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B], fp32, with gradient to the images (for training).

        ValueError for other shapes, and for a score that is not finite; the error names the sample.
        """
        check_images(self.name, images, len(prompts))
        asked, preprocess = self._asked(prompts.text, prompts.meta), self.preprocess
        return self._scored(images, prompts.text, asked, lambda part: preprocess.tensor(part.to(self.placement.device)))

    @torch.no_grad()
    def score_pil(
        self, images: Sequence[Image], texts: Sequence[str], meta: Sequence[Mapping[str, Any]] = ()
    ) -> Tensor:
        """PIL images -> [N], fp32, on the CPU, preprocessed as the model's authors did (for reported numbers).

        meta: the metadata of the prompts, for a reward that reads it. Images of one size after preprocessing are scored
        together.
        """
        if len(images) != len(texts):
            raise ValueError(
                f"{self.name} got {len(images)} images for {len(texts)} prompts; give one prompt per image"
            )
        asked = self._asked(texts, meta)
        pixels = [self.preprocess.pil([image]) for image in images]
        scores = torch.zeros(len(images))
        for shape in dict.fromkeys(one.shape for one in pixels):
            own = [k for k, one in enumerate(pixels) if one.shape == shape]
            together = torch.cat([pixels[k] for k in own])
            read = ([texts[k] for k in own], [asked[k] for k in own])
            scores[own] = self._scored(together, *read, lambda part: part.to(self.placement.device))
        return scores

    def _asked(self, texts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
        """What the formula reads next to each image: its prompt."""
        return texts

    @staticmethod
    def _image_size(net: Any) -> int:
        """Input size in pixels: 224, or 336 for some larger CLIPs."""
        return int(net.config.vision_config.image_size)

    @abstractmethod
    def _formula(self, pixels: Tensor, texts: Sequence[Any]) -> Tensor:
        """Normalized pixels [b, 3, H, W] fp32, and what ``_asked`` gave for them -> scores [b], fp32."""

    def _scored(
        self, images: Tensor, texts: Sequence[str], asked: Sequence[Any], prepare: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if not len(images):
            return images.new_zeros(0, dtype=torch.float32)
        step = self.placement.chunk or len(images)
        kind = torch.device(self.placement.device).type
        with self.on_device, torch.autocast(kind, enabled=False):
            parts = [
                self._formula(prepare(images[start : start + step]), asked[start : start + step])
                for start in range(0, len(images), step)
            ]
            scores = torch.cat(parts).float().to(images.device)
            check_finite(self.name, scores, texts)
        return scores

    @property
    def on_device(self) -> AbstractContextManager[None]:
        """Inside, the weights are on the device. After a call with gradient its graph keeps them there."""
        _ = self.loaded  # which sets them
        return self._weights

    def _head(self, x: Tensor) -> Tensor:
        head = self.loaded.head
        assert head is not None, f"{self.name} was built without a head"
        scores: Tensor = head.to(x.device)(x)
        return scores

    def long_prompts(self, texts: Sequence[str]) -> str | None:
        """A warning about prompts longer than this reward reads, or None; it is returned only once."""
        tokenize = self.loaded.tokenize
        if self._warned or not isinstance(tokenize, PaddedTokenizer):
            return None
        message = long_prompts([tokenize.reader(f"reward {self.name}")], texts, "its score ignores the rest")
        self._warned = message is not None
        return message

    def _tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        tokenize = self.loaded.tokenize
        assert tokenize is not None, f"{self.name} was built without a tokenizer"
        if message := self.long_prompts(texts):
            log.warning("%s", message)
        return {key: to_device_async(value, self.placement.device) for key, value in tokenize(texts).items()}
