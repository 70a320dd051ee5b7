"""Scored rollouts of the stochastic few-step student: what NFT and GRPO learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.stochastic_sampling import Trajectory, cps_log_prob, cps_mean, stochastic_rollout
from gdmd.losses.advantages import group_advantage
from gdmd.methods.base import StudentBatch
from gdmd.methods.score_stats import sample_stats
from gdmd.methods.scorer import Scorer
from gdmd.types import Cond, Denoiser, PromptBatch, Reward, Roles, Schedule


class PolicyOptions(Protocol):
    """What a configuration says about stochastic rollouts and their advantages (fields of the baselines' configs)."""

    @property
    def student_steps(self) -> tuple[float, ...]: ...

    @property
    def noise_level(self) -> float: ...

    @property
    def spread(self) -> Literal["global", "group"]: ...

    @property
    def advantage_clip(self) -> float: ...


@dataclass(frozen=True)
class Collected:
    """One finished sample per prompt of the batch, without gradient."""

    trajectory: Trajectory
    rewards: Tensor  # [R, B], raw, NaN = not scored
    advantage: Tensor  # [B], clipped to +-advantage_clip; NaN = not scored by some reward


@dataclass(frozen=True)
class PolicyBatch(StudentBatch):
    """L_DMD's batch and the stochastic rollouts of GRPO."""

    x: Tensor  # [B, N, C, H, W], states of the rollout
    log_prob_old: Tensor  # [B, N - 1]
    advantage: Tensor  # [B], NaN = not scored


def policy_batch(batch: StudentBatch, collected: Collected) -> PolicyBatch:
    """The student's batch for both parts of its loss, L_DMD and L_GRPO."""
    own = collected.trajectory
    return PolicyBatch(**vars(batch), x=own.x, log_prob_old=own.log_prob, advantage=collected.advantage)


@torch.no_grad()
def collect(
    policy: Denoiser,
    schedule: Schedule,
    scorer: Scorer,
    cfg: PolicyOptions,
    prompts: PromptBatch,
    rng: SampleRng,
    shape: tuple[int, ...],
) -> Collected:
    """Sample ``policy`` with CPS noise, score the finished images, compare each with its group by the sum of its rewards."""
    trajectory = stochastic_rollout(
        policy,
        rng.normal("policy_noise", shape),
        cfg.student_steps,
        prompts.cond,
        lambda i: rng.normal("policy_rollout", shape, i),
        schedule,
        cfg.noise_level,
    )
    rewards = scorer(trajectory.x0, prompts)
    ranks = prompts.ranks
    reward = ranks.all_gather(rewards, 1).sum(0)  # [B], NaN = not scored by some reward
    everyone = group_advantage(reward, ranks.all_gather(prompts.group), cfg.spread)
    advantage = ranks.local_shard(everyone)
    return Collected(trajectory, rewards, advantage.clamp(-cfg.advantage_clip, cfg.advantage_clip))


def step_log_prob(roles: Roles, x: Tensor, cond: Cond, cfg: PolicyOptions) -> Tensor:
    """log pi(x[i + 1] | x[i]) of every step of the rollouts x [B, N, C, H, W] under the current student. [B, N - 1]"""
    found = []
    for i, (here, there) in enumerate(zip(cfg.student_steps, cfg.student_steps[1:], strict=False)):
        t, t_next = (torch.full((len(x),), when, device=x.device) for when in (here, there))
        mean = cps_mean(roles.student(x[:, i], t, cond), t_next, cfg.noise_level, roles.schedule)
        found.append(cps_log_prob(x[:, i + 1], mean))
    return torch.stack(found, 1)


def collection_stats(collected: Collected, rewards: Sequence[Reward]) -> dict[str, Tensor]:
    """Statistics of what was scored, a value per sample; unscored ones (NaN) are left out of all but their own count."""
    return sample_stats(rewards, collected.rewards) | {
        "reward/sample": collected.rewards.flatten(),
        "advantage/size": collected.advantage.abs(),
        "advantage/share_zero": (collected.advantage == 0).float(),
    }
