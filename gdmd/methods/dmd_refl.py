"""DMD + ReFL: L_DMD and a reward that is back-propagated through the decoder into the one student step.

The baseline that arXiv 2604.19009 calls DMDR in its tables; ReFL is arXiv 2304.05977, its hinge DMDR's (2511.13649v4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from gdmd.config.methods.dmd_reward import DMDReFLConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.losses.dmd import dmd_loss
from gdmd.losses.refl import mean_refl_loss
from gdmd.methods.base import StudentBatch
from gdmd.methods.baseline import Baseline
from gdmd.methods.score_stats import sample_stats
from gdmd.methods.scorer import Scorer
from gdmd.types import Loss, PromptBatch, Update


@dataclass(frozen=True)
class RewardedBatch(StudentBatch):
    """The student's batch with the prompts that its reward reads."""

    prompts: PromptBatch


@dataclass
class DmdRefl(Baseline[DMDReFLConfig]):
    """DMD's iteration; the student also follows the reward gradient at its x0.

    ValueError for rewards that are not differentiable.
    """

    scorer: Scorer = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.cfg.rewarded:
            self.scorer.require_differentiable("dmd_refl")

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]:
        """One outer iteration: fake updates, then one student update per collected gradient."""
        r = self.rollout(prompts, rng)
        batches = yield from self.fake_updates(r, prompts, rng, self.cfg.student_updates)
        for batch in batches:
            if self.cfg.rewarded:
                yield Update("student", self.rewarded_loss, RewardedBatch(**vars(batch), prompts=prompts))
            else:
                yield Update("student", self.student_loss, batch)

    def rewarded_loss(self, batch: RewardedBatch) -> Loss:
        """L_DMD + rl_weight mean_k relu(m - R_k(D(x0))); a sample that is not scored by all rewards has L_DMD only."""
        x0 = self.roles.student(batch.x_tau, batch.tau, batch.cond).x0
        hinge = partial(mean_refl_loss, margin=self.cfg.margin)
        refl, scores = self.scorer.with_gradient(x0, batch.prompts, hinge)
        loss = dmd_loss(x0, batch.x_tar) + self.cfg.rl_weight * refl
        seen = {"loss/student": loss, "loss/refl": refl, **sample_stats(self.scorer.rewards, scores)}
        return Loss(loss, {name: value.detach() for name, value in seen.items()})
