"""DMD (arXiv 2311.18828) with DMD2's normaliser and two-time-scale updates (arXiv 2405.14867)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from gdmd.config.method import DmdConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.losses.dmd import dmd_loss
from gdmd.methods.distillation import Distillation
from gdmd.types import Cond, Loss, PromptBatch, Update


@dataclass(frozen=True)
class StudentBatch:
    x_tau: Tensor
    tau: Tensor
    cond: Cond
    x_tar: Tensor


class Dmd(Distillation[DmdConfig]):
    """fake_updates of the fake on one student output; the last student_updates of them give a gradient each."""

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]:
        """One outer iteration: fake updates, then one student update per collected gradient."""
        r = self.rollout(prompts, rng)
        first = self.cfg.fake_updates - self.cfg.student_updates
        targets = []
        for i in range(self.cfg.fake_updates):
            yield Update("fake", self.fake_loss, self.fake_batch(r, rng, i))
            if i >= first:
                scores = self.scores(r, rng, i, both=self.cfg.guidance != 1)
                targets.append(self.target(r, scores, self.cfg.guidance))
        for x_tar in targets:
            yield Update("student", self.student_loss, StudentBatch(r.x_tau, r.tau, r.cond, x_tar))

    def student_loss(self, batch: StudentBatch) -> Loss:
        """L_DMD = || x0 - x_tar ||^2 with x0 by the current student."""
        x0 = self.roles.student(batch.x_tau, batch.tau, batch.cond).x0
        loss = dmd_loss(x0, batch.x_tar)
        return Loss(loss, {"loss/student": loss.detach()})
