"""DMD + GRPO: L_DMD and clipped policy gradients on the steps of the stochastic few-step student.

The policy is the student's sampler with coefficients-preserving steps (arXiv 2509.05952); the loss is Flow-GRPO's
(arXiv 2505.05470) without its KL term: L_DMD holds the student near its teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gdmd.config.methods.dmd_reward import DmdGrpoConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.losses.dmd import dmd_loss
from gdmd.losses.grpo import grpo_loss
from gdmd.methods.base import Distillation
from gdmd.methods.dmd import StudentBatch
from gdmd.methods.rollouts import collect, collection_stats, moves_log_prob
from gdmd.methods.scorer import Scorer
from gdmd.types import Loss, PromptBatch, Update


@dataclass(frozen=True)
class PolicyBatch(StudentBatch):
    x: Tensor  # [B, N, C, H, W], states of the roll-out
    log_prob_old: Tensor  # [B, N - 1]
    advantage: Tensor  # [B], NaN = not scored


class DmdGrpo(Distillation[DmdGrpoConfig]):
    """DMD's iteration; each student update also follows the advantages of K samples per prompt."""

    def attach(self, scorer: Scorer) -> DmdGrpo:
        """Give the method its rewards; returns itself."""
        self.scorer = scorer
        return self

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]:
        """One outer iteration: fake updates, scored roll-outs, then one student update per collected gradient."""
        r = self.rollout(prompts, rng)
        first = self.cfg.fake_updates - self.cfg.student_updates
        targets = []
        for i in range(self.cfg.fake_updates):
            yield Update("fake", self.fake_loss, self.fake_batch(r, rng, i))
            if i >= first:
                targets.append(self.target(r, self.scores(r, rng, i, both=self.cfg.guidance != 1), self.cfg.guidance))
        batches = [StudentBatch(r.x_tau, r.tau, r.cond, x_tar) for x_tar in targets]
        if self.cfg.rl_weight == 0:
            for batch in batches:
                yield Update("student", self.student_loss, batch)
            return
        collected = collect(self.roles, self.scorer, self.cfg, prompts, rng, self.latent_shape)
        self._stats |= collection_stats(collected, self.scorer.rewards)
        made = collected.trajectory
        for batch in batches:
            own = PolicyBatch(**vars(batch), x=made.x, log_prob_old=made.log_prob, advantage=collected.advantage)
            yield Update("student", self.policy_loss, own)

    def student_loss(self, batch: StudentBatch) -> Loss:
        """L_DMD = || x0 - x_tar ||^2 with x0 by the current student."""
        loss = dmd_loss(self.roles.student(batch.x_tau, batch.tau, batch.cond).x0, batch.x_tar)
        return Loss(loss, {"loss/student": loss.detach()})

    def policy_loss(self, batch: PolicyBatch) -> Loss:
        """L_DMD + rl_weight mean_i L_GRPO(move i); an unscored sample has L_DMD only."""
        distill = self.student_loss(batch).per_sample
        log_prob = self.log_prob(batch)  # [B, N - 1]
        scored = ~batch.advantage.isnan()
        advantage = torch.where(scored, batch.advantage, 0.0)[:, None]
        steer = grpo_loss(log_prob, batch.log_prob_old, advantage, self.cfg.ratio_clip).mean(1)
        steer = torch.where(scored, steer, 0.0)
        loss = distill + self.cfg.rl_weight * steer
        moved = (log_prob - batch.log_prob_old).abs()
        clipped = (moved > self.cfg.ratio_clip).float().mean(1)
        seen = {"loss/student": loss, "loss/grpo": steer, "policy/moved": moved.mean(1), "policy/clipped": clipped}
        return Loss(loss, {name: value.detach() for name, value in seen.items()})

    def log_prob(self, batch: PolicyBatch) -> Tensor:
        """log pi(x[i + 1] | x[i]) of every move under the current student. [B, N - 1]"""
        return moves_log_prob(self.roles, batch.x, batch.cond, self.cfg)
