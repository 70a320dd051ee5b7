"""DMD + GRPO: L_DMD and clipped policy gradients on the steps of the stochastic few-step student.

The policy is the student's sampler with coefficients-preserving steps (arXiv 2509.05952); the loss is Flow-GRPO's
(arXiv 2505.05470) without its KL term: L_DMD keeps the student near its teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from gdmd.config.methods.dmd_reward import DMDGRPOConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.losses.grpo import grpo_loss
from gdmd.methods.baseline import Baseline
from gdmd.methods.rollouts import PolicyBatch, collect, collection_stats, policy_batch, step_log_prob
from gdmd.methods.scorer import Scorer
from gdmd.types import Loss, PromptBatch, Update


@dataclass
class DmdGrpo(Baseline[DMDGRPOConfig]):
    """DMD's iteration; each student update also follows the advantages of K samples per prompt."""

    scorer: Scorer = field(kw_only=True)

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]:
        """One outer iteration: fake updates, scored rollouts, then one student update per collected gradient."""
        r = self.rollout(prompts, rng)
        batches = yield from self.fake_updates(r, prompts, rng, self.cfg.student_updates)
        if not self.cfg.rewarded:
            for batch in batches:
                yield Update("student", self.student_loss, batch)
            return
        policy = (self.roles.student, self.roles.schedule)
        collected = collect(*policy, self.scorer, self.cfg, prompts, rng, self.latent_shape)
        self._stats |= collection_stats(collected, self.scorer.rewards)
        for batch in batches:
            yield Update("student", self.policy_loss, policy_batch(batch, collected))

    def policy_loss(self, batch: PolicyBatch) -> Loss:
        """L_DMD + rl_weight mean_i L_GRPO(move i); an unscored sample has L_DMD only."""
        distill = self.student_loss(batch).per_sample
        log_prob = step_log_prob(self.roles, batch.x, batch.cond, self.cfg)  # [B, N - 1]
        scored = ~batch.advantage.isnan()
        advantage = torch.where(scored, batch.advantage, 0.0)[:, None]
        grpo = grpo_loss(log_prob, batch.log_prob_old, advantage, self.cfg.ratio_clip).mean(1)
        grpo = torch.where(scored, grpo, 0.0)
        loss = distill + self.cfg.rl_weight * grpo
        moved = (log_prob - batch.log_prob_old).abs()
        clipped = (moved > self.cfg.ratio_clip).float().mean(1)
        seen = {"loss/student": loss, "loss/grpo": grpo, "policy/moved": moved.mean(1), "policy/clipped": clipped}
        return Loss(loss, {name: value.detach() for name, value in seen.items()})
