"""Preference pairs of a student's own images: best and worst of a prompt's group, for Diffusion-DPO.

DMDR (arXiv 2511.13649v4) names DPO as a strategy of its second stage without the construction of the pairs; best and
worst of a group, the student's own steps as times and errors in x0-space (the space of all student losses) are [I].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.schedule import renoise
from gdmd.losses.denoising import mean_square
from gdmd.losses.dpo import dpo_loss
from gdmd.types import Cond, Denoiser, PromptBatch, Roles


@dataclass(frozen=True)
class PreferencePairs:
    """The pair of each sample's group, re-noised by the sample's own time and noise, with the reference's errors."""

    x0_win: Tensor  # [B, C, H, W]
    x0_lose: Tensor  # [B, C, H, W]
    win_t: Tensor  # [B, C, H, W], x0_win re-noised to t
    lose_t: Tensor  # [B, C, H, W]
    t: Tensor  # [B]
    ref_win: Tensor  # [B]
    ref_lose: Tensor  # [B]
    known: Tensor  # [B] bool, false where no two images of the group were told apart


@torch.no_grad()
def preference_pairs(
    x0: Tensor, advantage: Tensor, prompts: PromptBatch, rng: SampleRng, steps: Sequence[float], roles: Roles
) -> PreferencePairs:
    """Pairs among complete samples x0 [b, C, H, W] by the global batch's advantage [B] (NaN = not scored).

    The reference is ``roles.old``. The samples of a group share its pair, with separate draws of (t, eps); t is one of
    ``steps``.
    """
    ranks = prompts.ranks
    best, worst, known = (ranks.local_shard(found) for found in extremes(advantage, ranks.all_gather(prompts.group)))
    everyone = ranks.all_gather(x0)  # [B, C, H, W]: a prompt's group may lie on several ranks
    x0_win, x0_lose = everyone[best], everyone[worst]
    t = torch.tensor(steps, device=x0.device)[rng.integer("preference_t", len(steps))]
    eps = rng.normal("preference_eps", tuple(x0.shape[1:]))
    win_t, lose_t = (renoise(x, t, eps, roles.schedule) for x in (x0_win, x0_lose))
    ref_win = mean_square(roles.old(win_t, t, prompts.cond).x0 - x0_win)
    ref_lose = mean_square(roles.old(lose_t, t, prompts.cond).x0 - x0_lose)
    return PreferencePairs(x0_win, x0_lose, win_t, lose_t, t, ref_win, ref_lose, known)


def extremes(advantage: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the best and of the worst scored sample of each sample's group, [B] int64; and whether they differ.

    advantage, group [B]. A sample that was not scored (NaN) is never a part of a pair that differs.
    """
    members = (group[:, None] == group[None]) & ~advantage.isnan()[None]  # [B, B], a row per sample
    best = torch.where(members, advantage[None], -torch.inf).max(1)
    worst = torch.where(members, advantage[None], torch.inf).min(1)
    return best.indices, worst.indices, best.values > worst.values


def preference_loss(student: Denoiser, pairs: PreferencePairs, cond: Cond, beta: float) -> Tensor:
    """L_DPO [B], 0 where there is no pair. The student's errors carry the gradient."""
    error_win = mean_square(student(pairs.win_t, pairs.t, cond).x0 - pairs.x0_win)
    error_lose = mean_square(student(pairs.lose_t, pairs.t, cond).x0 - pairs.x0_lose)
    loss = dpo_loss(error_win, error_lose, pairs.ref_win, pairs.ref_lose, beta)
    return torch.where(pairs.known, loss, 0.0)
