"""RT-DM: the reward-tilted weight of a DMD gradient (DMDR, arXiv 2511.13649v4, stage 1)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gdmd.losses.advantages import group_advantage


@torch.no_grad()
def reward_tilt(reward: Tensor, strength: float = 1.0, unit: Literal["std", "norm"] = "std") -> Tensor:
    """w = mean over rewards k of exp(strength z_k), the factor of each sample's DMD gradient.

    reward [R, B] of the global batch in each reward's own units, NaN = not scored -> [B], no gradient. Of the scored
    samples, unit std [I]: z = (r - mean r) / std r, the population value; norm: z = r / ||r||_2, as the paper prints it.
    strength 0, a reward that is equal (norm: 0) everywhere, and a sample that any reward left unscored give the
    weight 1 (plain DMD).
    """
    scored = ~reward.isnan()
    if unit == "std":
        z = torch.stack([group_advantage(own, torch.zeros_like(own)) for own in reward])
    else:
        norm = torch.linalg.vector_norm(torch.where(scored, reward, 0), dim=1, keepdim=True)  # [R, 1]
        z = reward / torch.where(norm > 0, norm, 1)
    return torch.where(scored.all(0), torch.exp(strength * z).mean(0), 1)
