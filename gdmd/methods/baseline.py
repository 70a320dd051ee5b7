"""The fake score's updates of DMD and the baselines around it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from gdmd.config.methods.baseline import BaselineConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.methods.base import Distillation, Rollout, StudentBatch
from gdmd.types import PromptBatch, Update

AnyBaseline = TypeVar("AnyBaseline", bound=BaselineConfig)


@dataclass
class Baseline(Distillation[AnyBaseline], Generic[AnyBaseline]):
    """fake_updates of the fake score, on the student's batch first and then on new prompts, noise and rollouts."""

    def fake_updates(
        self, r: Rollout, prompts: PromptBatch, rng: SampleRng, students: int = 1, trained: Rollout | None = None
    ) -> Generator[Update, None, list[StudentBatch]]:
        """Yield the fake score's updates of one iteration, and return the student's batches.

        Each of the last ``students`` updates is followed by a DMD gradient, which makes one batch. trained: the rollout
        on which the student is trained, if it is not ``r``.
        """
        batches, at = [], r if trained is None else trained
        for i in range(self.cfg.fake_updates):
            own = r if self.reads_student_batch(i) else self.rollout_again(*self.draws(prompts, rng, i))
            yield Update("fake", self.fake_loss, self.fake_batch(own, rng, i))
            if i >= self.cfg.fake_updates - students:
                batches.append(StudentBatch(at.x_tau, at.tau, at.cond, self.target(at, self.scores(at, rng, i))))
        return batches

    def reads_student_batch(self, i: int) -> bool:
        """Whether fake update i learns from the student's own batch. DMD2's code updates the student and then the fake
        score on one batch, and the fake score alone on the next ones."""
        return i == 0 or self.cfg.fake_samples == "shared"

    def draws(self, prompts: PromptBatch, rng: SampleRng, i: int) -> tuple[PromptBatch, SampleRng]:
        """New prompts and independent noise for fake update i."""
        return prompts.another(i), rng.scoped(f"fake_samples/{i}")

    @torch.no_grad()
    def rollout_again(self, prompts: PromptBatch, rng: SampleRng) -> Rollout:
        """A rollout that leaves the statistics of the student's batch as they are."""
        stats = self._stats
        found = self.rollout(prompts, rng)
        self._stats = stats
        return found
