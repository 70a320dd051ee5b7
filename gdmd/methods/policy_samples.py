"""Scored roll-outs of the stochastic few-step student: what NFT and GRPO learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdmd.config.rivals_rl import GroupedDmdConfig
from gdmd.diffusion.policy import Trajectory, stochastic_rollout
from gdmd.diffusion.rng import SampleRng
from gdmd.losses.groups import mean_group_advantage
from gdmd.methods.scoring import Scorer
from gdmd.types import PromptBatch, Reward, Roles


@dataclass(frozen=True)
class Collected:
    """One complete sample per place of the batch; nothing holds a gradient."""

    trajectory: Trajectory
    rewards: Tensor  # [R, B], raw, NaN = not scored
    advantage: Tensor  # [B], clipped to +-advantage_clip; NaN = not scored by some reward


@torch.no_grad()
def collect(
    roles: Roles, scorer: Scorer, cfg: GroupedDmdConfig, prompts: PromptBatch, rng: SampleRng, shape: tuple[int, ...]
) -> Collected:
    """Roll the student out with CPS noise, score the finished pictures, compare each with its group."""
    trajectory = stochastic_rollout(
        roles.student,
        rng.normal("policy_noise", shape),
        cfg.student_steps,
        prompts.cond,
        lambda i: rng.normal("policy_rollout", shape, i),
        roles.schedule,
        cfg.noise_level,
    )
    rewards = scorer(trajectory.x0, prompts)
    advantage = mean_group_advantage(rewards, prompts.group, cfg.spread)
    return Collected(trajectory, rewards, advantage.clamp(-cfg.advantage_clip, cfg.advantage_clip))


def collection_stats(collected: Collected, rewards: Sequence[Reward]) -> dict[str, Tensor]:
    """Statistics of what was scored; unscored samples are left out of all but their own count."""
    scored = ~collected.advantage.isnan()
    own = {f"reward/{reward.name}/sample": collected.rewards[k].nanmean() for k, reward in enumerate(rewards)}
    return {
        "reward/sample": collected.rewards.nanmean(),
        "reward/unscored": (~scored).float().mean(),
        "advantage/size": collected.advantage.abs().nanmean(),
        "advantage/share_zero": (collected.advantage == 0).float().mean(),
        **own,
    }
