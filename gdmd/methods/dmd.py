"""DMD (arXiv 2311.18828) with DMD2's normalizer and two-time-scale updates (arXiv 2405.14867)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdmd.config.methods.dmd import DMDConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.sampling import times
from gdmd.losses.dmd import regression_loss
from gdmd.methods.base import ImageSize, StudentBatch
from gdmd.methods.baseline import Baseline
from gdmd.methods.ode_pairs import OdePairs, TeacherPairs
from gdmd.types import Loss, PromptBatch, Update


@dataclass(frozen=True)
class PairedBatch(StudentBatch):
    """The student's batch with pairs of noise and the teacher's ODE sample."""

    pairs: OdePairs


@dataclass
class Dmd(Baseline[DMDConfig]):
    """fake_updates of the fake score; after each of the last student_updates of them, a gradient for the student."""

    teacher_times: Callable[[int], Tensor] = times
    pairs: TeacherPairs = field(init=False)

    def __post_init__(self) -> None:
        cfg = self.cfg
        self.pairs = TeacherPairs(
            *(self.roles, self.latent_shape, cfg.guidance, cfg.regression_steps, cfg.regression_batches),
            teacher_times=self.teacher_times,
        )

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]:
        """One outer iteration: fake updates, then one student update per collected gradient."""
        r = self.rollout(prompts, rng)
        batches = yield from self.fake_updates(r, prompts, rng, self.cfg.student_updates)
        if self.cfg.regression_weight == 0:
            for batch in batches:
                yield Update("student", self.student_loss, batch)
            return
        pairs = self.pairs.at(step, prompts, rng)
        for batch in batches:
            yield Update("student", self.paired_loss, PairedBatch(**vars(batch), pairs=pairs))

    def resize(self, size: ImageSize) -> None:
        """New pairs have this size; those that are kept stay as they are."""
        super().resize(size)
        self.pairs.latent_shape, self.pairs.teacher_times = size.latent_shape, size.teacher_times

    def paired_loss(self, batch: PairedBatch) -> Loss:
        """L_DMD + regression_weight || G(z, c) - y ||^2, with the student's first step from the noise of a pair."""
        distill = self.student_loss(batch).per_sample
        first = torch.full_like(batch.tau, self.cfg.student_steps[0])
        x0 = self.roles.student(batch.pairs.noise, first, batch.pairs.cond).x0
        regress = regression_loss(x0, batch.pairs.x0_ode)
        loss = distill + self.cfg.regression_weight * regress
        return Loss(loss, {"loss/student": loss.detach(), "loss/regression": regress.detach()})

    def state(self) -> Mapping[str, Tensor]:
        """The kept pairs of noise and ODE sample; nothing without regression."""
        return {f"pairs.{name}": value for name, value in self.pairs.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load({name: value for name, value in state.items() if not name.startswith("pairs.")})
        own = {name.removeprefix("pairs."): value for name, value in state.items() if name.startswith("pairs.")}
        device = next(iter(self.roles.parameters("student").values())).device
        self.pairs.load(own, device)
