"""What DMD and its descendants share: the rollout, the update of the fake score and the DMD gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from gdmd.config.methods.base import DistillationConfig
from gdmd.diffusion.device import to_device_async
from gdmd.diffusion.guidance import Guided
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.sampling import backward_simulation
from gdmd.diffusion.schedule import renoise, to_native
from gdmd.losses.denoising import denoising_loss, mean_square
from gdmd.losses.dmd import dmd_gradient, dmd_loss
from gdmd.losses.gdmd import implicit_target
from gdmd.types import SINGLE_PROCESS, Cond, Denoiser, Loss, Native, Prediction, PromptBatch, Roles


class RealLatents(Protocol):
    """Real latents [B, C, H, W] for the prompts of a step."""

    def __call__(self, prompts: PromptBatch, rng: SampleRng) -> Tensor: ...


@dataclass(frozen=True)
class ImageSize:
    """An image size in pixels, and what depends on it."""

    height: int
    width: int
    latent_shape: tuple[int, int, int]
    student_steps: tuple[float, ...]  # after the timestep shift of this size
    teacher_times: Callable[[int], Tensor]  # number of ODE steps -> their times
    real_latents: RealLatents | None = None


AnyConfig = TypeVar("AnyConfig", bound=DistillationConfig)


@dataclass(frozen=True)
class Rollout:
    """One student output per prompt, without gradient."""

    x_tau: Tensor  # [B, C, H, W]
    tau: Tensor  # [B]
    x0: Tensor  # [B, C, H, W], the student's prediction from x_tau: x_old of the snapshot policy
    cond: Cond
    uncond: Cond
    real_cond: Cond  # of the real score: ``cond`` unless there are teacher prompts
    stop: Tensor  # [B] int64, tau = student_steps[stop]; on the CPU: Python branches on it


@dataclass(frozen=True)
class FakeBatch:
    """A batch for the fake score's denoising loss."""

    x0: Tensor
    x_t: Tensor
    t: Tensor
    eps: Tensor
    cond: Cond


@dataclass(frozen=True)
class StudentBatch:
    """What L_DMD needs: the student predicts x0 from x_tau and regresses it to x_tar."""

    x_tau: Tensor  # [B, C, H, W]
    tau: Tensor  # [B]
    cond: Cond
    x_tar: Tensor  # [B, C, H, W]


@dataclass(frozen=True)
class DmdScores:
    """The real (guided) and the fake score at one re-noising of x0, as x0-predictions."""

    x0_real: Tensor  # [B, C, H, W]
    x0_fake: Tensor  # [B, C, H, W]


@dataclass(frozen=True)
class Constructed:
    """The target that an iteration has built for a rollout: x_tar, where the loss of its student updates is least."""

    rollout: Rollout
    x_tar: Tensor  # [B, C, H, W]
    prompts: PromptBatch


def last_stop(prompts: PromptBatch, stop: Tensor) -> int | None:
    """Largest of ``stop`` [b] in the global batch: all ranks call the student equally often. None for a single process."""
    if prompts.ranks is SINGLE_PROCESS:
        return None
    return int(prompts.ranks.all_gather(to_device_async(stop, prompts.index.device)).max())


@dataclass
class Distillation(Generic[AnyConfig]):
    """Base of the DMD family. Draws take ``rng`` and no gradient; losses are deterministic and differentiable."""

    cfg: AnyConfig
    roles: Roles
    latent_shape: tuple[int, int, int]
    native: Native  # what the fake score's network predicts
    real_latents: RealLatents | None = None
    constructed: Constructed | None = field(default=None, init=False)
    """The target of the last iteration, for ``methods.gains``; None for methods that do not keep it."""
    _stats: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def rollout(self, prompts: PromptBatch, rng: SampleRng) -> Rollout:
        """x_tau by backward simulation or from real data, then x0 = G(x_tau, tau, c)."""
        stop = self._draw_steps(rng.on_host(), len(self.cfg.student_steps))
        tau = to_device_async(torch.tensor(self.cfg.student_steps)[stop], rng.index.device)
        noise = rng.normal("noise", self.latent_shape)
        if self.cfg.student_input == "data":
            assert self.real_latents is not None
            x_tau = renoise(self.real_latents(prompts, rng), tau, noise, self.roles.schedule)
        else:
            again = lambda i: rng.normal("rollout", self.latent_shape, i)  # noqa: E731
            schedule, last = self.roles.schedule, last_stop(prompts, stop)
            x_tau = backward_simulation(
                *(self.roles.student, noise, self.cfg.student_steps, stop, prompts.cond, again, schedule, last),
                sampler=self.cfg.student_sampler,
            )
        x0 = self.roles.student(x_tau, tau, prompts.cond).x0
        self._stats = {"latent/mean": x0.mean(), "latent/std": x0.std()}
        return Rollout(x_tau, tau, x0, prompts.cond, prompts.uncond, prompts.real_cond, stop)

    def resize(self, size: ImageSize) -> None:
        """The next iterations have images of this size; see ``methods.sizes``."""
        self.latent_shape, self.real_latents = size.latent_shape, size.real_latents
        self.cfg = self.cfg.model_copy(update={"student_steps": size.student_steps})

    def _draw_steps(self, rng: SampleRng, steps: int) -> Tensor:
        """Step indices [B] int64: drawn per sample, or once, as the draw of sample 0, which every rank can repeat."""
        if self.cfg.step_draw == "sample":
            return rng.integer("tau", steps)
        return replace(rng, index=torch.zeros_like(rng.index)).integer("tau", steps)

    @torch.no_grad()
    def fake_batch(self, r: Rollout, rng: SampleRng, i: int) -> FakeBatch:
        """Draw i of the fake score's training: fresh t and eps on sg(x0)."""
        t = self.fake_time(rng, i)
        eps = rng.normal("fake_eps", self.latent_shape, i)
        return FakeBatch(r.x0, renoise(r.x0, t, eps, self.roles.schedule), t, eps, r.cond)

    def fake_loss(self, batch: FakeBatch) -> Loss:
        """Denoising loss of the fake score on the student's samples, native or in x0 (eq. 2)."""
        prediction = self.roles.fake(batch.x_t, batch.t, batch.cond)
        kind = "x0" if self.cfg.fake_loss == "x0" else self.native
        if kind == "v":
            both = (prediction, Prediction(batch.x0, batch.eps))
            v, v_target = (to_native(one, kind, batch.t, self.roles.schedule) for one in both)
            loss = mean_square(v - v_target)
        else:
            loss = denoising_loss(prediction, batch.x0, batch.eps, kind)
        seen = loss.detach()
        thirds = {f"fake_loss/t{k}": torch.where((batch.t * 3).long() == k, seen, torch.nan) for k in range(3)}
        return Loss(loss, {"loss/fake": seen, **thirds})

    @torch.no_grad()
    def scores(self, r: Rollout, rng: SampleRng, i: int) -> DmdScores:
        """Both scores at draw i of (t, eps)."""
        t = self.renoise_time(rng, i)
        x_t = renoise(r.x0, t, rng.normal("renoise_eps", self.latent_shape, i), self.roles.schedule)
        real_score = Guided(self.real_score(), self.cfg.guidance, r.uncond, self.roles.guide)
        return DmdScores(real_score(x_t, t, r.real_cond).x0, self.roles.fake(x_t, t, r.cond).x0)

    def fake_time(self, rng: SampleRng, i: int) -> Tensor:
        """t of draw i of the fake score's training, U(0, 1). [B]"""
        return rng.uniform("fake_t", i)

    def renoise_time(self, rng: SampleRng, i: int) -> Tensor:
        """t of the DMD gradient's draw i, U(renoise_low, renoise_high). [B]"""
        return rng.uniform("renoise_t", i, low=self.cfg.renoise_low, high=self.cfg.renoise_high)

    def real_score(self) -> Denoiser:
        """The network of the real score: the teacher."""
        return self.roles.teacher

    def target(self, r: Rollout, scores: DmdScores) -> Tensor:
        """x_tar = x0 - grad, with or without the normalizer n. [B, C, H, W]"""
        x0_real, x0_fake = scores.x0_real, scores.x0_fake
        self._stats["gap/real"] = (r.x0 - x0_real).abs().mean()
        self._stats["gap/grad"] = mean_square(x0_fake - x0_real).sqrt().mean()
        return implicit_target(r.x0, dmd_gradient(r.x0, x0_real, x0_fake, normalize=self.cfg.normalize))

    def student_loss(self, batch: StudentBatch) -> Loss:
        """L_DMD = || x0 - x_tar ||^2 with x0 by the current student."""
        loss = dmd_loss(self.roles.student(batch.x_tau, batch.tau, batch.cond).x0, batch.x_tar)
        return Loss(loss, {"loss/student": loss.detach()})

    def stats(self) -> Mapping[str, Tensor]:
        return self._stats

    def state(self) -> Mapping[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise ValueError(f"the checkpoint holds method state {sorted(state)}, but this method has none")
