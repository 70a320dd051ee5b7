"""Training at several image sizes: every outer iteration has one of them, the same on all ranks.

The size is a function of (seed, step), so a resumed run draws the same sizes, and checkpoints need not store them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gdmd.diffusion.rng import SampleRng
from gdmd.methods.base import ImageSize
from gdmd.methods.scorer import Scorer
from gdmd.types import Method, PromptBatch, Update


class ResizableMethod(Method, Protocol):
    """A Method whose image size can change between iterations."""

    def resize(self, size: ImageSize) -> None:
        """The next iterations have images of this size."""
        ...


def drawn_size(seed: int, step: int, count: int) -> int:
    """Which of ``count`` sizes a step has, uniform on 0 ... count - 1."""
    return int(SampleRng(seed, step, torch.zeros(1, dtype=torch.int64)).integer("size", count))


@dataclass
class SeveralSizes:
    """A Method on images of several sizes: ``method``, which gets the size of each iteration before it starts."""

    method: ResizableMethod
    sizes: tuple[ImageSize, ...]

    @property
    def scorer(self) -> Scorer | None:
        """The method's, if it reads rewards."""
        return getattr(self.method, "scorer", None)

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]:
        """An iteration of the method at the size of this step."""
        self.method.resize(self.sizes[drawn_size(rng.seed, step, len(self.sizes))])
        yield from self.method.iteration(step, prompts, rng)

    def stats(self) -> Mapping[str, Tensor]:
        return self.method.stats()

    def state(self) -> Mapping[str, Tensor]:
        return self.method.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.method.load(state)
