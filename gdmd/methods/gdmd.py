"""GDMD, Algorithm 1 of arXiv 2604.19009: DaGC collects DMD gradients, IGS scores their targets, NaPO weights them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdmd.config.methods.gdmd import GDMDConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.losses.advantages import RunningScale
from gdmd.losses.dmd import dmd_loss
from gdmd.losses.gdmd import first_order_gain, napo_loss, napo_minimizer, optimality, step_weight
from gdmd.methods.base import Constructed, Distillation, Rollout, StudentBatch
from gdmd.methods.old_policy import EmaPolicy
from gdmd.methods.score_stats import optimality_stats
from gdmd.methods.scorer import Scorer, mean_advantage
from gdmd.types import Loss, PromptBatch, Update

OLD_DECAY = 0.5
"""Largest decay of the EMA old policy."""


@dataclass
class Group:
    """What DaGC has collected."""

    x_tar: list[Tensor] = field(default_factory=list)  # eta x [B, C, H, W]
    scores: list[Tensor] = field(default_factory=list)  # eta x [R, B], raw rewards; none at scored_step 0


@dataclass(frozen=True)
class NapoBatch(StudentBatch):
    """The student's batch with the old prediction and the optimality r of the target."""

    x_old: Tensor  # [B, C, H, W]
    r: Tensor  # [B] in [0, 1], NaN = not scored


@dataclass
class Gdmd(Distillation[GDMDConfig]):
    """eta fake score updates, each followed by a DMD gradient; then eta student updates, one per gradient."""

    scorer: Scorer = field(kw_only=True)
    scale: RunningScale = field(init=False)  # Z
    old: EmaPolicy = field(init=False)

    def __post_init__(self) -> None:
        if self.cfg.rewarded and self.cfg.scored_step == 0:
            self.scorer.require_differentiable("gdmd with scored_step 0")
        self.scale = RunningScale(len(self.scorer.rewards), about_zero=True)
        self.old = EmaPolicy(self.roles, OLD_DECAY)

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]:
        """One outer iteration of Algorithm 1."""
        rollout, group, eta = self.rollout(prompts, rng), Group(), self.cfg.group_size
        x_old = self.old_prediction(rollout)
        for i in range(eta):
            yield Update("fake", self.fake_loss, self.fake_batch(rollout, rng, i))
            if self.cfg.collection != "t":  # all: another t for each fake score; fake: the same t for all
                self.collect(group, rollout, prompts, rng, i if self.cfg.collection == "all" else 0)
        if self.cfg.collection == "t":  # the last fake score at eta times
            for i in range(eta):
                self.collect(group, rollout, prompts, rng, i)
        weights = self.weigh(group, rollout, prompts, rng)
        self.constructed = Constructed(rollout, self.least(x_old, group, weights), prompts)
        for x_tar, r in zip(group.x_tar, weights, strict=True):
            batch = NapoBatch(rollout.x_tau, rollout.tau, rollout.cond, x_tar, x_old, r)
            yield Update("student", self.napo_student_loss, batch)
            if self.cfg.old_policy == "ema":
                self.old.follow()

    @torch.no_grad()
    def old_prediction(self, rollout: Rollout) -> Tensor:
        """x_old: the student's x0 of this iteration, or the prediction of its EMA. [B, C, H, W]"""
        if self.cfg.old_policy == "snapshot":
            return rollout.x0
        self.old.start()
        return self.roles.old(rollout.x_tau, rollout.tau, rollout.cond).x0

    @torch.no_grad()
    def collect(self, group: Group, rollout: Rollout, prompts: PromptBatch, rng: SampleRng, i: int) -> None:
        """DaGC: x_tar = x0 - grad at draw i of (t, eps); IGS: the raw rewards of x0 - s grad."""
        x_tar = self.target(rollout, self.scores(rollout, rng, i))
        group.x_tar.append(x_tar)
        if self.cfg.gamma > 0 and self.cfg.scored_step > 0:
            scored = torch.lerp(rollout.x0, x_tar, self.cfg.scored_step)
            self._stats["latent/scored_std"] = scored.std()
            group.scores.append(self.scorer(scored, prompts))

    @torch.no_grad()
    def gains(self, group: Group, rollout: Rollout, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        """Raw rewards of x0 [R, b], and what the scored steps add to them, R(D(x0 - s grad)) - R(D(x0)) [R, eta, b].

        At s = 0 the derivative along -grad: the limit of the difference, divided by s.
        """
        if self.cfg.scored_step > 0:
            sample = self.scorer(rollout.x0, prompts)
            return sample, torch.stack(group.scores, 1) - sample[:, None]
        self._stats["latent/scored_std"] = rollout.x0.std()
        sample, reward_gradient = self.scorer.gradients(rollout.x0, prompts)
        return sample, first_order_gain(reward_gradient, torch.stack(group.x_tar) - rollout.x0)

    @torch.no_grad()
    def weigh(self, group: Group, rollout: Rollout, prompts: PromptBatch, rng: SampleRng) -> Tensor:
        """IGS: r = 1/2 + 1/2 clip(mean_k gain_k / Z_k, -1, 1). [eta, b], NaN = not scored

        Z: running root mean square of the gains, so r depends on s only through the curvature of the reward. Z and the
        statistics are those of the global batch B; the result is this rank's part b. ``rng``: for controls.
        """
        eta, ranks = self.cfg.group_size, prompts.ranks
        if self.cfg.gamma == 0:
            return torch.full((eta, len(prompts)), 0.5, device=rollout.x0.device)
        own_sample, own_gain = self.gains(group, rollout, prompts)
        sample, gain = ranks.all_gather(own_sample, 1), ranks.all_gather(own_gain, 2)  # [R, B], [R, eta, B]
        advantage = mean_advantage(gain, torch.zeros_like(sample), self.scale.update(gain))  # [eta, B]
        r = optimality(advantage, torch.zeros_like(advantage), 1.0)
        w = self.weight_of(r)
        target = gain + sample[:, None]  # at s = 0 the rewards of x_tar to first order
        self._stats |= optimality_stats(self.scorer.rewards, target, sample, r, w)
        return ranks.local_shard(r, 1)

    def weight_of(self, r: Tensor) -> Tensor:
        """w of each target, for statistics: the factor of the DMD gradient in the gradient of its loss. Any shape."""
        return step_weight(r, self.cfg.dmd_weight, self.cfg.gamma, self.cfg.beta)

    def least(self, x_old: Tensor, group: Group, weights: Tensor) -> Tensor:
        """Where the sum of the eta losses is least: the mean of their minimizers. r [eta, B] -> [B, C, H, W]"""
        own = (self.cfg.dmd_weight, self.cfg.gamma, self.cfg.beta)
        each = [napo_minimizer(x_old, x_tar, r, *own) for x_tar, r in zip(group.x_tar, weights, strict=True)]
        return torch.stack(each).mean(0)

    def napo_student_loss(self, batch: NapoBatch) -> Loss:
        """NaPO: L = lambda L_DMD + gamma L_RL, x0 by the current student; an unscored sample has lambda L_DMD only."""
        x0 = self.roles.student(batch.x_tau, batch.tau, batch.cond).x0
        loss = self.cfg.dmd_weight * dmd_loss(x0, batch.x_tar)
        if self.cfg.gamma > 0:
            scored = ~batch.r.isnan()
            r = torch.where(scored, batch.r, 0.5)
            rl = napo_loss(x0, batch.x_old, batch.x_tar, r, self.cfg.beta)
            loss = loss + self.cfg.gamma * torch.where(scored, rl, 0.0)
        return Loss(loss, {"loss/student": loss.detach()})

    def state(self) -> Mapping[str, Tensor]:
        """Z, and the number of student updates, on which the EMA decay of the old policy depends."""
        return {**self.scale.state(), **self.old.state()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.scale.load(state)
        self.old.load(state)
