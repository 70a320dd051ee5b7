"""DMD2 (arXiv 2405.14867): 5 fake-score updates per student update, and a GAN head on the fake score's features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdmd.config.methods.dmd2 import DMD2Config
from gdmd.diffusion.gradients import frozen
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.schedule import renoise
from gdmd.losses.dmd import dmd_loss
from gdmd.losses.gan import discriminator_loss, generator_loss
from gdmd.methods.base import FakeBatch, Rollout, StudentBatch
from gdmd.methods.baseline import Baseline
from gdmd.types import Critic, Loss, PromptBatch, Update


@dataclass(frozen=True)
class NoisyLatents:
    """Latents as the GAN head sees them."""

    x_t: Tensor  # [B, C, H, W]
    t: Tensor  # [B]


@dataclass(frozen=True)
class GanFakeBatch(FakeBatch):
    """The fake score's batch with real and student latents for the GAN head."""

    real: NoisyLatents
    student: NoisyLatents


@dataclass(frozen=True)
class GanStudentBatch(StudentBatch):
    """The student's batch with the re-noising at which the GAN head sees it."""

    t: Tensor  # [B], of the re-noising for the GAN head
    eps: Tensor  # [B, C, H, W]


@dataclass
class Dmd2(Baseline[DMD2Config]):
    """fake_updates of fake score and GAN head, then one student update.

    critic: the GAN head, None without a GAN. ValueError for a GAN without a head or without real latents.
    """

    critic: Critic | None = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.cfg.adversarial and (self.critic is None or self.real_latents is None):
            raise ValueError(
                f"gan_weight {self.cfg.gan_weight} needs a GAN head and real latents, and these roles have "
                f"{'no head' if self.critic is None else 'no real latents'}; set gan_weight = 0 for DMD2 without its GAN"
            )

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]:
        """One outer iteration of section 4.5: fake score and head learn, the last fake score gives the gradient."""
        r = self.rollout(prompts, rng)
        if not self.cfg.adversarial or self.real_latents is None:
            (batch,) = yield from self.fake_updates(r, prompts, rng)
            yield Update("student", self.student_loss, batch)
            return
        x0_data = self.real_latents(prompts, rng)
        for i in range(self.cfg.fake_updates):
            own, own_data = r, x0_data
            if not self.reads_student_batch(i):
                drawn = self.draws(prompts, rng, i)
                own, own_data = self.rollout_again(*drawn), self.real_latents(*drawn)
            yield Update("fake", self.gan_fake_loss, self.gan_fake_batch(own, own_data, rng, i))
        x_tar = self.target(r, self.scores(r, rng, self.cfg.fake_updates - 1))
        t, eps = self._head_time(rng, "gan_t", 0), rng.normal("gan_eps", self.latent_shape)
        yield Update("student", self.gan_student_loss, GanStudentBatch(r.x_tau, r.tau, r.cond, x_tar, t, eps))

    @torch.no_grad()
    def gan_fake_batch(self, r: Rollout, x0_data: Tensor, rng: SampleRng, i: int) -> GanFakeBatch:
        """The fake score's draw, and real and student latents at independent re-noisings."""
        return GanFakeBatch(
            **vars(self.fake_batch(r, rng, i)),
            real=self._noisy(x0_data, rng, "gan_real", i),
            student=self._noisy(r.x0, rng, "gan_student", i),
        )

    def gan_fake_loss(self, batch: GanFakeBatch) -> Loss:
        """L_fake + head_weight L_D: the GAN's gradient reaches the head and the fake score's base model."""
        assert self.critic is not None
        denoise = self.fake_loss(batch)
        real = self.critic(batch.real.x_t, batch.real.t, batch.cond)
        student = self.critic(batch.student.x_t, batch.student.t, batch.cond)
        head = discriminator_loss(real, student)
        loss = denoise.per_sample + self.cfg.head_weight * head
        seen = {"loss/head": head, "gan/real": torch.sigmoid(real), "gan/student": torch.sigmoid(student)}
        return Loss(loss, {**denoise.stats, **{name: value.detach() for name, value in seen.items()}})

    def gan_student_loss(self, batch: GanStudentBatch) -> Loss:
        """L_DMD + gan_weight L_G, the head frozen: only the student receives a gradient."""
        assert self.critic is not None
        x0 = self.roles.student(batch.x_tau, batch.tau, batch.cond).x0
        x_t = renoise(x0, batch.t, batch.eps, self.roles.schedule)
        with frozen(self.roles.parameters("fake").values()):
            gan = generator_loss(self.critic(x_t, batch.t, batch.cond))
        loss = dmd_loss(x0, batch.x_tar) + self.cfg.gan_weight * gan
        return Loss(loss, {"loss/student": loss.detach(), "loss/gan": gan.detach()})

    def _noisy(self, x0: Tensor, rng: SampleRng, purpose: str, i: int) -> NoisyLatents:
        t = self._head_time(rng, f"{purpose}_t", i)
        eps = rng.normal(f"{purpose}_eps", self.latent_shape, i)
        return NoisyLatents(renoise(x0, t, eps, self.roles.schedule), t)

    def _head_time(self, rng: SampleRng, purpose: str, i: int) -> Tensor:
        return rng.uniform(purpose, i, low=self.cfg.gan_low, high=self.cfg.gan_high)
