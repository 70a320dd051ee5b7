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
    """Raw scores [R, K, B] of targets or finished rollouts; ``unscored``: bool, which of them have no advantage."""
    own = {f"reward/{reward.name}/target": scores[k].nanmean() for k, reward in enumerate(rewards)}
    stats = {"reward/target": scores.nanmean(), "reward/unscored": unscored.float().mean(), **own}
    return stats | (group_spread(rewards, scores) if scores.shape[1] > 1 else {})


def group_spread(rewards: Sequence[Reward], scores: Tensor) -> dict[str, Tensor]:
    """Std of the raw scores [R, K, B] inside a group of K, mean over groups: per reward in its own units, and as a share.

    The share is relative to the std of all scores of the reward, mean over rewards: about 1 if groups differ as little as
    samples of one group do, 0 if the reward cannot tell the members of a group apart.
    """
    inside, whole = nanstd(scores, 1).nanmean(1), nanstd(scores.flatten(1), 1)  # [R]
    own = {f"reward/{reward.name}/group_std": inside[k] for k, reward in enumerate(rewards)}
    return {"reward/group_share": (inside / torch.where(whole > 0, whole, torch.nan)).nanmean(), **own}


def nanstd(values: Tensor, dim: int) -> Tensor:
    """Standard deviation (n - 1) of the values that are not NaN; NaN with fewer than two."""
    square = (values - values.nanmean(dim, keepdim=True)).square()
    count = (~square.isnan()).sum(dim)
    return torch.where(count > 1, square.nansum(dim) / (count - 1).clamp_min(1), torch.nan).sqrt()


def optimality_stats(
    rewards: Sequence[Reward], scores: Tensor, sample: Tensor, r: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    """Scores [R, ..., B] of targets against those of their samples [R, B], and what follows: r and w, each [..., B]."""
    scored = ~r.isnan()
    count = scored.float().sum()
    gain = scores - sample.reshape(len(sample), *(1,) * (scores.ndim - 2), -1)
    stats = target_stats(rewards, scores, ~scored) | {
        "reward/sample": sample.nanmean(),
        "reward/gain": gain.nanmean(),
        "weight/mean": weight.nanmean(),
        "weight/r_mean": r.nanmean(),
        "weight/r_std": torch.where(scored, r, r.nanmean()).std(),
        "weight/share_below_half": (r < 0.5).float().sum() / count,
        "weight/share_clipped": ((r <= 0) | (r >= 1)).float().sum() / count,
    }
    stats |= {f"reward/{reward.name}/sample": sample[k].nanmean() for k, reward in enumerate(rewards)}
    for k in range(10):
        inside = (r >= k / 10) & ((r < (k + 1) / 10) | (k == 9))
        stats[f"histogram/r_{k}"] = inside.float().sum() / count
    return stats
