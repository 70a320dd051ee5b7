"""Pairs of noise and the teacher's ODE sample, for the regression term of DMD (arXiv 2311.18828, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdmd.diffusion.device import to_device_async
from gdmd.diffusion.guidance import Guided
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.sampling import ode_sample, times
from gdmd.types import Cond, PromptBatch, Ranks, Roles


@dataclass(frozen=True)
class OdePairs:
    """One batch of pairs."""

    noise: Tensor  # [B, C, H, W]
    x0_ode: Tensor  # [B, C, H, W], the teacher's guided ODE sample from this noise
    cond: Cond

    def gathered(self, ranks: Ranks) -> OdePairs:
        """The pairs of the global batch."""
        cond = {name: ranks.all_gather(value) for name, value in self.cond.items()}
        return OdePairs(ranks.all_gather(self.noise), ranks.all_gather(self.x0_ode), cond)

    def shared(self, ranks: Ranks) -> OdePairs:
        """The pairs of this rank."""
        cond = {name: ranks.local_shard(value) for name, value in self.cond.items()}
        return OdePairs(ranks.local_shard(self.noise), ranks.local_shard(self.x0_ode), cond)


@dataclass
class TeacherPairs:
    """Solves the teacher's ODE for the step's prompts: in every step (batches = 0), or in the first ``batches`` steps.

    The pairs of the first steps are kept and used in turn. They are part of the method's state, so that a resumed run
    continues with the same ones, and hold the global batch, so that it may continue with another number of ranks.
    """

    roles: Roles
    latent_shape: tuple[int, int, int]
    guidance: float
    steps: int
    batches: int
    teacher_times: Callable[[int], Tensor] = times  # N -> the N + 1 times of the teacher's own sampler, 1 ... 0
    kept: dict[int, OdePairs] = field(default_factory=dict)

    def at(self, step: int, prompts: PromptBatch, rng: SampleRng) -> OdePairs:
        """The pairs of iteration ``step``."""
        if not self.batches:
            return self._solve(prompts, rng)
        slot = step % self.batches
        if slot not in self.kept:
            self.kept[slot] = self._solve(prompts, rng).gathered(prompts.ranks)
        return self.kept[slot].shared(prompts.ranks)

    @torch.no_grad()
    def _solve(self, prompts: PromptBatch, rng: SampleRng) -> OdePairs:
        noise = rng.normal("pair_noise", self.latent_shape)
        teacher = Guided(self.roles.teacher, self.guidance, prompts.uncond, self.roles.guide)
        t = to_device_async(self.teacher_times(self.steps), noise.device)
        return OdePairs(noise, ode_sample(teacher, noise, t, prompts.real_cond, self.roles.schedule), prompts.cond)

    def state(self) -> dict[str, Tensor]:
        """Kept pairs as "SLOT.noise", "SLOT.x0_ode" and "SLOT.cond.NAME"."""
        named: dict[str, Tensor] = {}
        for slot, pairs in self.kept.items():
            named |= {f"{slot}.noise": pairs.noise, f"{slot}.x0_ode": pairs.x0_ode}
            named |= {f"{slot}.cond.{name}": value for name, value in pairs.cond.items()}
        return named

    def load(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Restore ``state()`` exactly."""
        self.kept = {}
        for slot in sorted({int(name.partition(".")[0]) for name in state}):
            own = {k.removeprefix(f"{slot}."): v.to(device) for k, v in state.items() if k.startswith(f"{slot}.")}
            cond = {name.removeprefix("cond."): value for name, value in own.items() if name.startswith("cond.")}
            self.kept[slot] = OdePairs(own["noise"], own["x0_ode"], cond)
