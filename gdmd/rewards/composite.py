"""Several rewards as one number: a weighted mean of scores standardized by fixed constants.

    Composite([Part(CLIPScore(), mean=0.26, std=0.03), Part(my_reward, weight=0.5, std=0.2)])

    R = sum_k w_k (R_k - mean_k) / std_k / sum_k w_k

mean_k and std_k are constants of the recipe (measure them once on images of the teacher), never batch statistics: the
reward of an image must not depend on the rest of the batch. Without them, a PickScore near 20 would dominate a cosine
near 0.3. An image that any part does not score (NaN) is not scored. Each part is logged in its own units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdmd.config.rewards import CompositeConfig
from gdmd.rewards.base import JoinedReward, RewardModel
from gdmd.rewards.callable import as_reward
from gdmd.types import Reward, score_all

if TYPE_CHECKING:
    from gdmd.types import PromptBatch


class Part:
    """One reward of a composite, which may also be a function; weight and std are positive."""

    def __init__(
        self, reward: Reward | Callable[..., Any], weight: float = 1.0, mean: float = 0.0, std: float = 1.0
    ) -> None:
        self.reward: Reward = as_reward(reward)
        self.weight, self.mean, self.std = weight, mean, std


class Composite(JoinedReward):
    """The weighted mean of standardized rewards; differentiable if all of them are."""

    def __init__(self, parts: Sequence[Part], name: str = "composite") -> None:
        names = [part.reward.name for part in parts]
        if not parts or len(set(names)) < len(names):
            raise ValueError(f"a composite reward needs parts with different names, got {names}")
        if not all(part.weight > 0 and part.std > 0 for part in parts):
            raise ValueError(
                f"a composite reward needs weights and stds above 0; got {[(p.weight, p.std) for p in parts]}"
            )
        if nested := [part.reward.name for part in parts if isinstance(part.reward, Composite)]:
            raise ValueError(
                f"a composite reward cannot be a part of another, got {', '.join(nested)}; give its own parts instead"
            )
        self.name, self.parts = name, tuple(parts)
        self.rewards = [part.reward for part in self.parts]
        self.differentiable = all(part.reward.differentiable for part in parts)
        self._totals: dict[str, Tensor] = {}  # sum and number of the scores since the last stats()

    @property
    def config(self) -> CompositeConfig:
        """The parts with the configs of their rewards."""
        scales = [{"weight": part.weight, "mean": part.mean, "std": part.std} for part in self.parts]
        rewards = [part.reward.config for part in self.parts]  # type: ignore[attr-defined]
        parts = [{"reward": one.model_dump(), **scale} for one, scale in zip(rewards, scales, strict=True)]
        return CompositeConfig.model_validate({"parts": parts})

    def to(self, device: str) -> Composite:
        """Move the weights of all parts to a device."""
        for part in self.parts:
            if isinstance(part.reward, RewardModel):
                part.reward.to(device)
        return self

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B], fp32; ``stats`` has the raw scores of the parts."""
        scores = [one.float() for one in score_all(self.rewards, images, prompts)]
        for part, raw in zip(self.parts, scores, strict=True):
            key, own = f"reward/{self.name}/{part.reward.name}", raw.detach()
            self._totals[key] = self._totals.get(key, 0) + torch.stack([own.nansum(), (~own.isnan()).sum()])
        return self.joined(scores)

    def joined(self, scores: Sequence[Tensor]) -> Tensor:
        """Raw scores [B] of the parts -> [B], the weighted mean of the standardized scores."""
        total = torch.zeros_like(scores[0])
        for part, raw in zip(self.parts, scores, strict=True):
            total = total + part.weight * (raw - part.mean) / part.std
        return total / sum(part.weight for part in self.parts)

    def stats(self) -> Mapping[str, Tensor]:
        """Mean raw score of each part since the last reading, under reward/COMPOSITE/PART; NaN if none was scored."""
        means = {key: total / count for key, (total, count) in self._totals.items()}
        self._totals = {}
        return means
