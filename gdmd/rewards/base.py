"""What the published reward models have in common: frozen weights loaded on first use, fp32 scores, one per image.

A subclass says how it looks at pixels (``fit``) and gives its formula in ``_formula``. ``score`` is the
differentiable path of training, ``score_pil`` the path of reported numbers. A score never depends on the other samples
of its batch. Weights are safetensors: a local folder never touches the network, a hub id is pinned by its revision.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gdmd.diffusion.device import to_device_async
from gdmd.diffusion.prompt_length import long_prompts
from gdmd.rewards.preprocessing import Preprocess, check_finite, check_images
from gdmd.rewards.weights import PaddedTokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

    from gdmd.types import PromptBatch

log = logging.getLogger(__name__)
Tokenize = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Texts -> input_ids [B, L] and attention_mask [B, L] int64, padded to one length whatever the batch is."""


@dataclass(frozen=True)
class Loaded:
    """The network of a reward, its tokenizer (None where it reads no text) and its head, which stays fp32."""

    net: nn.Module
    tokenize: Tokenize | None
    head: nn.Module | None = None


@dataclass(frozen=True)
class Placement:
    """Where and how a reward runs.

    dtype: of the weights and the towers; preprocessing, cosine and head are fp32.
    offload: the weights wait on the CPU between calls. After a call with gradient they stay until the next one without.
    chunk: images per forward; 0 = the whole batch at once.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    offload: bool = False
    chunk: int = 0


HERE = Placement()


class PretrainedReward(ABC):
    """A frozen, differentiable scorer of images as a ``Reward``."""

    fit: ClassVar[Preprocess] = Preprocess()
    """The preprocessing but for its size, which is that of the network."""
    differentiable = True

    def __init__(self, name: str, load: Callable[[], Loaded], placement: Placement = HERE) -> None:
        self.name, self.placement = name, placement
        self._load = load
        self._loaded: Loaded | None = None
        self._warned = False

    def to(self, device: str) -> Self:
        """Run on another device. Images may come from anywhere; scores go back to where they came from."""
        self.placement = replace(self.placement, device=device)
        return self

    @property
    def loaded(self) -> Loaded:
        """The network, loaded and frozen on first use."""
        if self._loaded is None:
            found = self._load()
            found.net.to(self.placement.dtype).eval().requires_grad_(False)
            if found.head is not None:
                found.head.float().eval().requires_grad_(False).to(self.placement.device)
            self._loaded = found
        return self._loaded

    @property
    def preprocess(self) -> Preprocess:
        """How images are made ready for this network."""
        return replace(self.fit, size=self._image_size(self.loaded.net))

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B], fp32, with gradient to the images (the path of training).

        ValueError for other shapes and for a score that is not finite; the error names the sample.
        """
        check_images(self.name, images, len(prompts))
        how = self.preprocess
        return self._scored(images, prompts.text, lambda part: how.tensor(part.to(self.placement.device)))

    @torch.no_grad()
    def score_pil(self, images: Sequence[Image], texts: Sequence[str]) -> Tensor:
        """PIL images -> [N], fp32, on the CPU, preprocessed as the model's authors did (the path of reports)."""
        if len(images) != len(texts):
            raise ValueError(
                f"{self.name} got {len(images)} images for {len(texts)} prompts; give one prompt per image"
            )
        pixels = self.preprocess.pil(images)
        return self._scored(pixels, texts, lambda part: part.to(self.placement.device))

    @staticmethod
    def _image_size(net: Any) -> int:
        """The side of the network's input: 224, or 336 for some larger CLIPs."""
        return int(net.config.vision_config.image_size)

    @abstractmethod
    def _formula(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """Normalized pixels [b, 3, S, S] fp32 -> scores [b], fp32."""

    def _scored(self, images: Tensor, texts: Sequence[str], prepare: Callable[[Tensor], Tensor]) -> Tensor:
        if not len(images):
            return images.new_zeros(0, dtype=torch.float32)
        step = self.placement.chunk or len(images)
        kind = torch.device(self.placement.device).type
        with self._at_work(), torch.autocast(kind, enabled=False):
            parts = [
                self._formula(prepare(images[start : start + step]), texts[start : start + step])
                for start in range(0, len(images), step)
            ]
            scores = torch.cat(parts).float().to(images.device)
            check_finite(self.name, scores, texts)
        return scores

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """The network on its device; back on the CPU where it offloads and no backward pass will need it.

        After an error none will.
        """
        needed = False
        try:
            self.loaded.net.to(self.placement.device)
            yield
            needed = torch.is_grad_enabled()
        finally:
            if self.placement.offload and not needed:
                self.loaded.net.to("cpu")

    def _head(self, x: Tensor) -> Tensor:
        head = self.loaded.head
        assert head is not None, f"{self.name} was built without a head"
        scores: Tensor = head.to(x.device)(x)
        return scores

    def long_prompts(self, texts: Sequence[str]) -> str | None:
        """A message about prompts that are longer than this reward reads, for the first texts that have any."""
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


def already(net: nn.Module, tokenize: Tokenize | None, head: nn.Module | None = None) -> Callable[[], Loaded]:
    """The loader of modules that exist already (tests, and rewards that share a network)."""
    return lambda: Loaded(net, tokenize, head)
