"""The policy loss of GRPO on denoising steps (Flow-GRPO, arXiv 2505.05470, eq. 4; PPO's clip, arXiv 1707.06347, eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor


def grpo_loss(log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-min(rho A, clamp(rho, 1 - clip, 1 + clip) A) per sample [B], rho = exp(log_prob - log_prob_old).

    log_prob [B] of the current policy carries the gradient; log_prob_old [B] (of the policy that sampled) and
    advantage [B] are constants. The log-probabilities are means over C, H, W, so ``clip`` is small (1e-5 ... 1e-4).
    Gradient: -rho A d log_prob, and 0 where the ratio has already left the clip on the side that A favors.
    """
    ratio = torch.exp(log_prob - log_prob_old.detach())
    advantage = advantage.detach()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
