"""Statistics over groups of scores: running scale Z, softmax weights and advantages of a group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor


class RunningScale:
    """Z_k: bias-corrected EMA of the standard deviation of each reward, current batch included.

    about_zero: EMA of the root mean square instead, for numbers that are differences already.
    State: ``mean`` [R], the raw EMA, and ``weight`` [R], its total weight 1 - decay^n after n updates; both are saved.
    """

    def __init__(self, rewards: int, decay: float = 0.99, *, about_zero: bool = False) -> None:
        self.decay, self.about_zero = decay, about_zero
        self.mean = torch.zeros(rewards, dtype=torch.float64)
        self.weight = torch.zeros(rewards, dtype=torch.float64)

    @torch.no_grad()
    def update(self, scores: Tensor) -> Tensor:
        """scores [R, ...] of the global batch and group, NaN = not scored. Returns Z [R], fp32.

        A reward with fewer than two scored values (none about zero) leaves its Z as it was (0 if it never had one).
        """
        flat = scores.double().flatten(1)
        self.mean = self.mean.to(flat.device, non_blocking=True)  # on the device of the scores: no synchronization
        self.weight = self.weight.to(flat.device, non_blocking=True)
        seen = ~flat.isnan()
        count = seen.sum(1)
        free = count if self.about_zero else count - 1  # degrees of freedom
        mean = torch.where(seen, flat, 0).sum(1) / count.clamp_min(1) * (not self.about_zero)
        square = torch.where(seen, (flat - mean[:, None]) ** 2, 0).sum(1) / free.clamp_min(1)
        enough = free >= 1
        self.mean = torch.where(enough, self.decay * self.mean + (1 - self.decay) * square.sqrt(), self.mean)
        self.weight = torch.where(enough, self.decay * self.weight + (1 - self.decay), self.weight)
        return self.value()

    def value(self) -> Tensor:
        """Z [R], fp32; 0 where nothing was seen."""
        known = self.weight > 0
        return torch.where(known, self.mean / torch.where(known, self.weight, 1), 0).float()

    def state(self) -> dict[str, Tensor]:
        return {"scale.mean": self.mean, "scale.weight": self.weight}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.mean, self.weight = state["scale.mean"].clone(), state["scale.weight"].clone()


def softmax_weights(advantage: Tensor, sharpness: float) -> Tensor:
    """w = E softmax(sharpness x advantage) over the group, mean 1. advantage [E, B] -> [E, B].

    A target without a score (NaN) has weight 1, the plain DMD step; the others share the rest.
    """
    scored = ~advantage.isnan()
    logits = torch.where(scored, sharpness * advantage, -torch.inf)
    count = scored.sum(0, keepdim=True)
    safe = torch.where(count > 0, logits, 0)
    return torch.where(scored, count * torch.softmax(safe, 0), 1.0)


@torch.no_grad()
def group_advantage(reward: Tensor, group: Tensor, spread: Literal["global", "group"] = "global") -> Tensor:
    """A = (R - mean_group) / std, the advantage of a sample over the others of its prompt. [B], [B] int64 -> [B]

    Several rewards are added before they come here, R = sum_k R_k, as in both codes named below. The mean is over the
    scored samples of the group. std: "global" over the scored samples of the whole batch (DiffusionNFT, arXiv
    2509.16117, and Flow-GRPO's code), "group" over those of the group (GRPO, arXiv 2402.03300, section 4.1.2). Both are
    population values, as in those codes; the 1e-4 that they add to std is left out, so that R -> p R + q with p > 0
    changes nothing, and std = 0 gives A = 0. NaN reward ("not scored"): A = NaN, and left out of all statistics.
    Computed in float64, returned in the reward's dtype. No gradient.
    """
    if spread not in ("global", "group"):
        raise ValueError(f"spread must be 'global' or 'group', got {spread!r}")
    scored = ~reward.isnan()
    together = group[:, None] == group[None]  # [B, B]
    mean = _mean(reward, together & scored)
    own = together if spread == "group" else torch.ones_like(together)
    center = _mean(reward, own & scored)
    variance = _mean((reward.double()[None] - center[:, None]).square(), own & scored)
    std = variance.sqrt()
    seen = std > 1e-12 * center.abs()  # below: the rounding of a constant reward
    advantage = (reward.double() - mean) / torch.where(seen, std, 1)
    return torch.where(scored, torch.where(seen, advantage, 0), torch.nan).to(reward.dtype)


def _mean(values: Tensor, members: Tensor) -> Tensor:
    """Mean of values [B] (or [B, B], a row per sample) over the members [B, B] of each row; 0 of none. [B], float64"""
    kept = torch.where(members, values.double(), 0)
    return kept.sum(1) / members.sum(1).clamp_min(1)
