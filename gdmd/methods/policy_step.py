"""One move of the stochastic few-step policy per sample, for GRPO inside a distillation step.

Flow-GRPO (arXiv 2505.05470) trains every move of a trajectory; here a sample trains one that is drawn uniformly, which
has the same mean gradient at one student pass, as DMD itself trains one of the student's steps per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gdmd.diffusion.policy import cps_log_prob, cps_mean, stochastic_rollout
from gdmd.diffusion.rng import SampleRng
from gdmd.losses.grpo import grpo_loss
from gdmd.methods.preference import mean_merit
from gdmd.methods.scoring import Scorer
from gdmd.types import Cond, PromptBatch, Roles


class PolicyOptions(Protocol):
    """What a configuration says about the policy."""

    @property
    def student_steps(self) -> Sequence[float]: ...

    @property
    def cps_noise(self) -> float: ...

    @property
    def grpo_clip(self) -> float: ...


@dataclass(frozen=True)
class PolicyMove:
    """A move of each sample, with the advantage of the picture that its roll-out ended in."""

    x_t: Tensor  # [B, C, H, W], before
    x_next: Tensor  # [B, C, H, W], after
    t: Tensor  # [B]
    t_next: Tensor  # [B]
    log_prob_old: Tensor  # [B]
    advantage: Tensor  # [B], NaN = not scored


@torch.no_grad()
def policy_moves(
    roles: Roles,
    scorer: Scorer,
    latent_shape: tuple[int, int, int],
    cfg: PolicyOptions,
    prompts: PromptBatch,
    rng: SampleRng,
) -> tuple[PolicyMove, dict[str, Tensor]]:
    """A stochastic roll-out per sample of the (grouped) prompts, its score, and the move that is trained."""
    noise = rng.normal("policy_start", latent_shape)
    again = lambda i: rng.normal("policy_noise", latent_shape, i)  # noqa: E731
    steps, student = cfg.student_steps, roles.student
    made = stochastic_rollout(student, noise, steps, prompts.cond, again, roles.schedule, cfg.cps_noise)
    rewards = scorer(made.x0, prompts)
    advantage = mean_merit(rewards, prompts.group)
    place, here = rng.integer("policy_move", len(steps) - 1), torch.arange(len(noise), device=noise.device)
    clock = torch.tensor(steps, device=noise.device)
    move = PolicyMove(
        made.x[here, place],
        made.x[here, place + 1],
        clock[place],
        clock[place + 1],
        made.log_prob[here, place],
        advantage,
    )
    return move, {"reward/complete": rewards.mean(0), "policy/advantage": advantage.abs()}


def policy_loss(roles: Roles, move: PolicyMove, cond: Cond, cfg: PolicyOptions) -> Tensor:
    """L_GRPO per sample [B]; 0 for a sample without a score. The current student's log-probability has the gradient."""
    prediction = roles.student(move.x_t, move.t, cond)
    log_prob = cps_log_prob(move.x_next, cps_mean(prediction, move.t_next, cfg.cps_noise, roles.schedule))
    scored = ~move.advantage.isnan()
    loss = grpo_loss(log_prob, move.log_prob_old, torch.where(scored, move.advantage, 0), cfg.grpo_clip)
    return torch.where(scored, loss, 0)
