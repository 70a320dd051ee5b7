"""ReFL (arXiv 2304.05977, algorithm 1) with the hinge of DMDR (arXiv 2511.13649v4): the reward as a loss."""

from __future__ import annotations

import torch
from torch import Tensor


def refl_loss(reward: Tensor, margin: float) -> Tensor:
    """relu(margin - R) per sample [B]: no gradient for an image whose reward has reached the margin.

    reward [B] with gradient, in its own units; NaN ("not scored") stays NaN. Gradient: -1 below the margin, else 0.
    """
    return (margin - reward).relu()


def mean_refl_loss(scores: Tensor, margin: float) -> Tensor:
    """mean over rewards k of relu(margin - R_k), 0 for a sample that any reward left unscored. [R, B] -> [B]"""
    scored = ~scores.isnan().any(0)
    return refl_loss(torch.where(scored, scores, margin), margin).mean(0)
