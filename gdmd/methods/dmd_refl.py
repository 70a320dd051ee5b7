"""DMD + ReFL: L_DMD and a reward that is back-propagated through the decoder into the one student step.

The rival that arXiv 2604.19009 calls DMDR in its tables; ReFL is arXiv 2304.05977, its hinge DMDR's (2511.13649v4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gdmd.config.methods.dmd_reward import DmdReflConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.losses.dmd import dmd_loss
from gdmd.losses.refl import refl_loss
from gdmd.methods.base import Distillation
from gdmd.methods.dmd import StudentBatch
from gdmd.methods.scorer import Scorer
from gdmd.types import Loss, PromptBatch, Update


@dataclass(frozen=True)
class RewardedBatch(StudentBatch):
    prompts: PromptBatch


class DmdRefl(Distillation[DmdReflConfig]):
    """DMD's iteration; the student's x0 goes to DMD's target and up the rewards."""

    def attach(self, scorer: Scorer) -> DmdRefl:
        """Give the method its rewards, which must be differentiable (ValueError); returns itself."""
        if self.cfg.rl_weight > 0:
            scorer.require_differentiable("dmd_refl")
        self.scorer = scorer
        return self

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]:
        """One outer iteration: fake updates, then one student update per collected gradient."""
        r = self.rollout(prompts, rng)
        first = self.cfg.fake_updates - self.cfg.student_updates
        targets = []
        for i in range(self.cfg.fake_updates):
            yield Update("fake", self.fake_loss, self.fake_batch(r, rng, i))
            if i >= first:
                targets.append(self.target(r, self.scores(r, rng, i, both=self.cfg.guidance != 1), self.cfg.guidance))
        for x_tar in targets:
            if self.cfg.rl_weight > 0:
                yield Update("student", self.rewarded_loss, RewardedBatch(r.x_tau, r.tau, r.cond, x_tar, prompts))
            else:
                yield Update("student", self.student_loss, StudentBatch(r.x_tau, r.tau, r.cond, x_tar))

    def student_loss(self, batch: StudentBatch) -> Loss:
        """L_DMD = || x0 - x_tar ||^2 with x0 by the current student."""
        loss = dmd_loss(self.roles.student(batch.x_tau, batch.tau, batch.cond).x0, batch.x_tar)
        return Loss(loss, {"loss/student": loss.detach()})

    def rewarded_loss(self, batch: RewardedBatch) -> Loss:
        """L_DMD + rl_weight mean_k relu(m - R_k(D(x0))); a sample that is not scored by all rewards has L_DMD only."""
        x0 = self.roles.student(batch.x_tau, batch.tau, batch.cond).x0
        steer, scores = self.scorer.through_scored(x0, batch.prompts, self.hinge)
        loss = dmd_loss(x0, batch.x_tar) + self.cfg.rl_weight * steer
        seen = {"loss/student": loss, "loss/refl": steer, "reward/sample": scores.nanmean(0)}
        own = {f"reward/{reward.name}/sample": scores[k] for k, reward in enumerate(self.scorer.rewards)}
        unscored = {"reward/unscored": scores.isnan().any(0).float()}
        return Loss(loss, {name: value.detach() for name, value in (seen | own | unscored).items()})

    def hinge(self, scores: Tensor) -> Tensor:
        """mean over rewards of relu(m - R), 0 for an unscored sample. [R, B] -> [B]"""
        scored = ~scores.isnan().any(0)
        return refl_loss(torch.where(scored, scores, self.cfg.margin), self.cfg.margin).mean(0)
