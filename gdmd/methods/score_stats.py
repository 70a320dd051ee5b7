"""What rewarded methods log about their scores: the keys of ``config.metric_keys``, NaN = not scored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gdmd.types import Reward


def sample_stats(rewards: Sequence[Reward], scores: Tensor) -> dict[str, Tensor]:
    """Raw scores [R, B] of samples, a value per sample."""
    own = {f"reward/{reward.name}/sample": scores[k] for k, reward in enumerate(rewards)}
    return {"reward/sample": scores.nanmean(0), "reward/unscored": scores.isnan().any(0).float(), **own}


def target_stats(rewards: Sequence[Reward], scores: Tensor, unscored: Tensor) -> dict[str, Tensor]:
    """Raw scores [R, ...] of targets or finished rollouts; ``unscored``: bool, which of them have no advantage."""
    own = {f"reward/{reward.name}/target": scores[k].nanmean() for k, reward in enumerate(rewards)}
    return {"reward/target": scores.nanmean(), "reward/unscored": unscored.float().mean(), **own}


def optimality_stats(
    rewards: Sequence[Reward], scores: Tensor, sample: Tensor, r: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    """Scores [R, ..., B] of targets against those of their samples [R, B], and what follows: r and w, each [..., B]."""
    scored = ~r.isnan()
    gain = scores - sample.reshape(len(sample), *(1,) * (scores.ndim - 2), -1)
    stats = target_stats(rewards, scores, ~scored) | {
        "reward/sample": sample.nanmean(),
        "reward/gain": gain.nanmean(),
        "weight/mean": weight.nanmean(),
        "weight/r_mean": r.nanmean(),
        "weight/r_std": torch.where(scored, r, r.nanmean()).std(),
        "weight/share_below_half": ((r < 0.5) & scored).float().sum() / scored.float().sum(),
        "weight/share_clipped": ((r <= 0) | (r >= 1)).float().mean(),
    }
    stats |= {f"reward/{reward.name}/sample": sample[k].nanmean() for k, reward in enumerate(rewards)}
    for k in range(10):
        inside = (r >= k / 10) & ((r < (k + 1) / 10) | (k == 9))
        stats[f"histogram/r_{k}"] = inside.float().mean()
    return stats
