"""RT-DM: the reward-tilted weight of a DMD gradient (DMDR, arXiv 2511.13649v4, stage 1)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def reward_tilt(reward: Tensor, strength: float = 1.0) -> Tensor:
    """w = mean over rewards k of exp(strength r_k / ||r_k||), the factor of each sample's DMD gradient.

    reward [R, B] in each reward's own units, NaN = not scored -> [B], no gradient. ||r_k|| is the L2 norm over the
    scored samples of the global batch [I], so that the weight does not depend on a reward's scale. strength 0, a
    reward that is 0 everywhere, and a sample that any reward left unscored give the weight 1 (plain DMD).
    """
    scored = ~reward.isnan()
    known = torch.where(scored, reward, 0)
    norm = torch.linalg.vector_norm(known, dim=1, keepdim=True)  # [R, 1]
    share = known / torch.where(norm > 0, norm, 1)
    return torch.where(scored.all(0), torch.exp(strength * share).mean(0), 1)
