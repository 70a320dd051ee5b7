"""Any Python function as a reward: ``module:function``.

    def function(images: Tensor[B, 3, H, W] in [0, 1], prompts: Sequence[str]) -> Tensor[B] | Sequence[float]

The function runs in this process with all its rights: name only code you trust. NaN means "not scored".
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdmd.diffusion.device import refuse_where, sent
from gdmd.rewards.images import check_images

if TYPE_CHECKING:
    from gdmd.types import PromptBatch

Scoring = Callable[[Tensor, Sequence[str]], "Tensor | Sequence[float]"]


class CallableReward:
    """A function as a ``Reward``. Without ``differentiable`` it runs without gradient."""

    def __init__(self, function: Scoring, name: str, differentiable: bool = False) -> None:
        self.function, self.name, self.differentiable = function, name, differentiable

    @classmethod
    def from_target(cls, target: str, differentiable: bool = False) -> CallableReward:
        """From "package.module:function". ValueError when it cannot be imported or is no function."""
        return cls(imported(target), target, differentiable)

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B], fp32. ValueError unless the function gives one number per image."""
        check_images(self.name, images, len(prompts))
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            answer = self.function(images, prompts.text)
        scores = torch.as_tensor(answer, dtype=torch.float32)
        if scores.shape != (len(images),):
            raise ValueError(
                f"reward {self.name} returned shape {list(scores.shape)} for {len(images)} images; "
                "return one number per image"
            )
        refuse_where(
            scores.isinf(),
            lambda places: ValueError(
                f"reward {self.name} is infinite at samples {places}; return NaN for an image without a score"
            ),
        )
        return sent(scores, images.device)


def imported(target: str) -> Any:
    """The function "package.module:function". ValueError when it cannot be imported or is no function."""
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise ValueError(f"reward function {target!r}: write it as module:function, for example my_rewards:brightness")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"reward function {target!r} cannot be imported ({error}); check the name, and that its folder is on PYTHONPATH"
        ) from error
    if not callable(found):
        raise ValueError(f"reward {target!r} is a {type(found).__name__}, not a function; name a function")
    return found
