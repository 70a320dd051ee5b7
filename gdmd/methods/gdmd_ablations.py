"""Controls: GDMD with r permuted, constant or reduced to r > 1/2; tilted GDMD with other samples' scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gdmd.diffusion.device import to_device_async
from gdmd.diffusion.rng import SampleRng
from gdmd.losses.gdmd import optimality, step_weight
from gdmd.methods.base import Rollout
from gdmd.methods.gdmd import Gdmd, Group, NapoBatch
from gdmd.methods.gdmd_tilted import Finished, GdmdTilted
from gdmd.methods.score_stats import optimality_stats
from gdmd.methods.scorer import mean_advantage
from gdmd.types import Loss, PromptBatch

MEAN_DECAY = 0.99
"""EMA decay of mean r for the constant control: the horizon of Z."""


class GdmdShuffled(Gdmd):
    """r permuted over the group and the global batch."""

    @torch.no_grad()
    def weigh(self, group: Group, rollout: Rollout, prompts: PromptBatch, rng: SampleRng) -> Tensor:
        """[eta, b]"""
        r = prompts.ranks.all_gather(super().weigh(group, rollout, prompts, rng), 1)
        return prompts.ranks.local_shard(shuffled(r, global_rng(prompts, rng)), 1)


@dataclass
class GdmdConstant(Gdmd):
    """r = its running mean, so that the term toward x_old is kept."""

    mean_r: Tensor = field(init=False)  # [2] float64: raw EMA of mean r, and its total weight

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mean_r = torch.zeros(2, dtype=torch.float64)

    @torch.no_grad()
    def weigh(self, group: Group, rollout: Rollout, prompts: PromptBatch, rng: SampleRng) -> Tensor:
        """[eta, b]; unscored targets stay unscored."""
        own = super().weigh(group, rollout, prompts, rng)
        return torch.where(own.isnan(), own, self.running_mean(prompts.ranks.all_gather(own, 1)))

    def running_mean(self, r: Tensor) -> Tensor:
        """EMA of mean r, 0-d; a step in which nothing was scored changes nothing."""
        mean, before = r.nanmean().double(), to_device_async(self.mean_r, r.device)
        fresh = torch.stack([mean, torch.ones_like(mean)])
        self.mean_r = torch.where(mean.isnan(), before, MEAN_DECAY * before + (1 - MEAN_DECAY) * fresh)
        return (self.mean_r[0] / self.mean_r[1]).to(r.dtype)

    def state(self) -> Mapping[str, Tensor]:
        """GDMD's state, and the running mean."""
        return {**super().state(), "mean_r": self.mean_r}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self.mean_r = state["mean_r"].clone()


class GdmdIndicator(Gdmd):
    """Weight lambda 1[r > 1/2] of L_DMD, without the term toward x_old."""

    def weight_of(self, r: Tensor) -> Tensor:
        """lambda 1[r > 1/2]; lambda for an unscored target."""
        return self.cfg.dmd_weight * torch.where(r.isnan(), 1.0, (r > 0.5).float())

    def least(self, x_old: Tensor, group: Group, weights: Tensor) -> Tensor:
        """The mean of the targets that a sample follows; x_old if it follows none. r [eta, B] -> [B, C, H, W]"""
        w = self.weight_of(weights)[..., None, None, None]
        total = w.sum(0)
        mean = (w * torch.stack(group.x_tar)).sum(0) / torch.where(total > 0, total, 1)
        return torch.where(total > 0, mean, x_old)

    def napo_student_loss(self, batch: NapoBatch) -> Loss:
        """lambda 1[r > 1/2] L_DMD; an unscored sample has lambda L_DMD."""
        loss = self.weight_of(batch.r) * self.student_loss(batch).per_sample
        return Loss(loss, {"loss/student": loss.detach()})


class GdmdTiltedShuffled(GdmdTilted):
    """Scores permuted over the global batch; each sample gets the reward gradient of another."""

    @torch.no_grad()
    def finish(self, rollout: Rollout, prompts: PromptBatch, rng: SampleRng) -> Finished:
        """The rollouts of ``GdmdTilted.finish``, each with the reward gradient v of another sample."""
        finished = super().finish(rollout, prompts, rng)
        return (
            finished
            if finished.gradient is None
            else replace(finished, gradient=exchanged(finished.gradient, prompts, rng))
        )

    @torch.no_grad()
    def weigh(self, finished: Finished, rollout: Rollout, prompts: PromptBatch, rng: SampleRng) -> Tensor:
        """Softmax weights of permuted advantages over the score of x0, which differs from sample to sample. [eta, K, b]"""
        ranks = prompts.ranks
        scores = ranks.all_gather(finished.scores, 2)  # [R, K, B]
        sample = ranks.all_gather(self.scorer(rollout.x0, prompts), 1)  # [R, B]
        advantage = mean_advantage(scores, sample, self.scale.update(scores)).expand(self.cfg.group_size, -1, -1)
        r = optimality(advantage, torch.zeros_like(advantage), 1.0)
        w = step_weight(r, self.cfg.dmd_weight, self.cfg.gamma)
        self._stats |= optimality_stats(self.scorer.rewards, scores, sample, r, w)
        return ranks.local_shard(self.softmax(shuffled(advantage, global_rng(prompts, rng))), 2)


CONTROLS: Mapping[str, type[Gdmd]] = {
    "constant": GdmdConstant,
    "shuffled": GdmdShuffled,
    "indicator": GdmdIndicator,
}


def shuffled(values: Tensor, rng: SampleRng) -> Tensor:
    """One random permutation of all elements. values [..., B] of the global batch; ``rng``: of its B samples."""
    per_sample = values[..., 0].numel()
    keys = rng.uniform("shuffle", count=max(2, per_sample))[:, :per_sample]
    return values.flatten()[keys.T.flatten().argsort()].reshape(values.shape)


def exchanged(own: Tensor, prompts: PromptBatch, rng: SampleRng) -> Tensor:
    """A random cycle of ``own`` [b, ...] over the global batch, so that no sample keeps its own."""
    whole = prompts.ranks.all_gather(own)
    order = global_rng(prompts, rng).uniform("shuffle/gradient").argsort()
    mixed = torch.empty_like(whole)
    mixed[order.roll(1)] = whole[order]
    return prompts.ranks.local_shard(mixed)


def global_rng(prompts: PromptBatch, rng: SampleRng) -> SampleRng:
    """Draws for the whole batch, the same on all ranks."""
    return replace(rng, index=prompts.ranks.all_gather(rng.index), host=None)
