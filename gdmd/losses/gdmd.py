"""The pure functions of GDMD (arXiv 2604.19009): implicit target, gain, optimality score, NaPO loss."""

from __future__ import annotations

import torch
from torch import Tensor

from gdmd.losses.denoising import mean_square


@torch.no_grad()
def implicit_target(x0: Tensor, grad: Tensor) -> Tensor:
    """x_tar = sg(x0 - grad): the DMD gradient as a regression target. [B, C, H, W] -> [B, C, H, W], no gradient."""
    return x0 - grad


@torch.no_grad()
def first_order_gain(reward_gradient: Tensor, step: Tensor) -> Tensor:
    """<grad R, step> per sample: the limit of (R(x0 + s step) - R(x0)) / s as s -> 0, without evaluating R again.

    reward_gradient [R, B, C, H, W], of R rewards at x0; step [E, B, C, H, W], for DMD -grad -> [R, E, B]. NaN gradient
    ("not scored") stays NaN. No gradient.
    """
    return torch.stack(
        [(reward_gradient * one).flatten(2).sum(-1) for one in step], 1
    )  # no matmul: autocast keeps fp32


@torch.no_grad()
def optimality(reward_target: Tensor, reward_sample: Tensor, scale: Tensor | float) -> Tensor:
    """r = 1/2 + 1/2 clip((R(D(x_tar)) - R(D(x0))) / Z, -1, 1), in [0, 1] (IGS, arXiv 2604.19009, section 3.3).

    reward_target, reward_sample: any equal (or broadcastable) shapes, the units of the reward; scale: Z >= 0 in the
    same units. Z = 0 (a constant reward) gives 1/2. NaN ("not scored") stays NaN. No gradient.
    """
    if isinstance(scale, float | int) and scale < 0:
        raise ValueError(f"the scale Z of a reward must be >= 0, got {scale}")
    difference = reward_target - reward_sample
    z = difference.new_full((), scale) if isinstance(scale, float | int) else scale.to(difference)
    ratio = torch.where(z > 0, difference / torch.where(z > 0, z, 1), 0 * difference)
    return 0.5 + 0.5 * ratio.clamp(-1, 1)


def napo_loss(x0: Tensor, x0_old: Tensor, x_tar: Tensor, r: Tensor, beta: float = 1.0) -> Tensor:
    """L_RL = r ||x+ - x_tar||^2 + (1 - r) ||x- - x_tar||^2 per sample [B], mean over C, H, W (NaPO, section 3.3).

    x+ = (1 - beta) x_old + beta x0,   x- = (1 + beta) x_old - beta x0.
    x0 [B, C, H, W] carries the gradient; x0_old, x_tar [B, C, H, W] and r [B] in [0, 1] are constants.
    Gradient with respect to x0: (2 beta / (C H W)) [(2r - 1)(x_old - x_tar) + beta (x0 - x_old)].
    """
    x0_old, x_tar, r = x0_old.detach(), x_tar.detach(), r.detach()
    x_plus = (1 - beta) * x0_old + beta * x0
    x_minus = (1 + beta) * x0_old - beta * x0
    return r * mean_square(x_plus - x_tar) + (1 - r) * mean_square(x_minus - x_tar)


def step_weight(r: Tensor, dmd_weight: float = 1.0, gamma: float = 1.0, beta: float = 1.0) -> Tensor:
    """w = lambda + gamma beta (2r - 1): the factor of the DMD gradient in the on-policy gradient of L. [B] -> [B]"""
    return dmd_weight + gamma * beta * (2 * r - 1)


@torch.no_grad()
def napo_minimizer(
    x0_old: Tensor, x_tar: Tensor, r: Tensor, dmd_weight: float = 1.0, gamma: float = 1.0, beta: float = 1.0
) -> Tensor:
    """x_old + W (x_tar - x_old), W = (lambda + gamma beta (2r - 1)) / (lambda + gamma beta^2): where L is least.

    L = lambda L_DMD + gamma L_RL is convex in x0; lambda = gamma, beta = 1: W = r. An unscored sample (NaN) has L_DMD alone:
    x_tar. All [B, C, H, W], r [B].
    """
    w = step_weight(r, dmd_weight, gamma, beta) / (dmd_weight + gamma * beta**2)
    return x0_old + torch.where(w.isnan(), 1.0, w)[:, None, None, None] * (x_tar - x0_old)
