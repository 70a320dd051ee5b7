"""DMD2 (arXiv 2405.14867): DMD without regression, 5 fake updates per student update, a GAN on the fake's features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gdmd.config.methods.dmd2 import Dmd2Config
from gdmd.diffusion.gradients import frozen
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.schedule import renoise
from gdmd.losses.dmd import dmd_loss
from gdmd.losses.gan import discriminator_loss, generator_loss
from gdmd.methods.base import Distillation, FakeBatch, Rollout
from gdmd.methods.dmd import StudentBatch
from gdmd.types import Critic, Loss, PromptBatch, Update


@dataclass(frozen=True)
class Noised:
    """Latents as the critic sees them."""

    x_t: Tensor  # [B, C, H, W]
    t: Tensor  # [B]


@dataclass(frozen=True)
class JudgedFakeBatch(FakeBatch):
    real: Noised
    student: Noised


@dataclass(frozen=True)
class JudgedStudentBatch(StudentBatch):
    t: Tensor  # [B], of the critic's re-noising
    eps: Tensor  # [B, C, H, W]


class Dmd2(Distillation[Dmd2Config]):
    """fake_updates of fake score and GAN head on one student output, then one student update."""

    def attach(self, critic: Critic | None) -> Dmd2:
        """Give the method its GAN head (None only without a GAN); returns itself."""
        if self.cfg.adversarial and (critic is None or self.real_latents is None):
            raise ValueError(
                f"gan_weight {self.cfg.gan_weight} needs a GAN head and real latents, and these roles have "
                f"{'no head' if critic is None else 'no real latents'}; set gan_weight = 0 for DMD2 without its GAN"
            )
        self.critic = critic
        return self

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]:
        """One outer iteration of section 4.5: the fake and the head learn, the last fake gives the gradient."""
        r = self.rollout(prompts, rng)
        x0_data = self.real_latents(prompts, rng) if self.cfg.adversarial and self.real_latents else None
        for i in range(self.cfg.fake_updates):
            if x0_data is None:
                yield Update("fake", self.fake_loss, self.fake_batch(r, rng, i))
            else:
                yield Update("fake", self.judged_fake_loss, self.judged_fake_batch(r, x0_data, rng, i))
        scores = self.scores(r, rng, self.cfg.fake_updates - 1, both=self.cfg.guidance != 1)
        batch = StudentBatch(r.x_tau, r.tau, r.cond, self.target(r, scores, self.cfg.guidance))
        if x0_data is not None:
            t, eps = self._critic_time(rng, "gan_t", 0), rng.normal("gan_eps", self.latent_shape)
            yield Update("student", self.judged_student_loss, JudgedStudentBatch(**vars(batch), t=t, eps=eps))
        else:
            yield Update("student", self.student_loss, batch)

    @torch.no_grad()
    def judged_fake_batch(self, r: Rollout, x0_data: Tensor, rng: SampleRng, i: int) -> JudgedFakeBatch:
        """The fake's own draw, and real and student latents at independent re-noisings."""
        return JudgedFakeBatch(
            **vars(self.fake_batch(r, rng, i)),
            real=self._noised(x0_data, rng, "gan_real", i),
            student=self._noised(r.x0, rng, "gan_student", i),
        )

    def judged_fake_loss(self, batch: JudgedFakeBatch) -> Loss:
        """L_fake + head_weight L_D: the GAN's gradient reaches the head and the fake's trunk."""
        assert self.critic is not None
        denoise = self.fake_loss(batch)
        real = self.critic(batch.real.x_t, batch.real.t, batch.cond)
        student = self.critic(batch.student.x_t, batch.student.t, batch.cond)
        judge = discriminator_loss(real, student)
        loss = denoise.per_sample + self.cfg.head_weight * judge
        seen = {"loss/head": judge, "gan/real": torch.sigmoid(real), "gan/student": torch.sigmoid(student)}
        return Loss(loss, {**denoise.stats, **{name: value.detach() for name, value in seen.items()}})

    def student_loss(self, batch: StudentBatch) -> Loss:
        """L_DMD = || x0 - x_tar ||^2 with x0 by the current student."""
        loss = dmd_loss(self.roles.student(batch.x_tau, batch.tau, batch.cond).x0, batch.x_tar)
        return Loss(loss, {"loss/student": loss.detach()})

    def judged_student_loss(self, batch: JudgedStudentBatch) -> Loss:
        """L_DMD + gan_weight L_G, the critic frozen: only the student receives a gradient."""
        assert self.critic is not None
        x0 = self.roles.student(batch.x_tau, batch.tau, batch.cond).x0
        x_t = renoise(x0, batch.t, batch.eps, self.roles.schedule)
        with frozen(self.roles.parameters("fake").values()):
            adversary = generator_loss(self.critic(x_t, batch.t, batch.cond))
        loss = dmd_loss(x0, batch.x_tar) + self.cfg.gan_weight * adversary
        return Loss(loss, {"loss/student": loss.detach(), "loss/gan": adversary.detach()})

    def _noised(self, x0: Tensor, rng: SampleRng, purpose: str, i: int) -> Noised:
        t = self._critic_time(rng, f"{purpose}_t", i)
        eps = rng.normal(f"{purpose}_eps", self.latent_shape, i)
        return Noised(renoise(x0, t, eps, self.roles.schedule), t)

    def _critic_time(self, rng: SampleRng, purpose: str, i: int) -> Tensor:
        return rng.uniform(purpose, i, low=self.cfg.gan_low, high=self.cfg.gan_high)
