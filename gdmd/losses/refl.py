"""ReFL (arXiv 2304.05977, algorithm 1) with the hinge of DMDR (arXiv 2511.13649v4): the reward as a loss."""

from __future__ import annotations

from torch import Tensor


def refl_loss(reward: Tensor, margin: float) -> Tensor:
    """relu(margin - R) per sample [B]: nothing is asked of a picture whose reward has reached the margin.

    reward [B] with gradient, in its own units; NaN ("not scored") stays NaN. Gradient: -1 below the margin, else 0.
    """
    return (margin - reward).relu()
