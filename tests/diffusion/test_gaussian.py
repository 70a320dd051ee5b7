"""Distributions with known scores: a DMD student reaches the teacher, and the samplers converge to the data."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gdmd.diffusion.guidance import Guided
from gdmd.diffusion.sampling import few_step_sample, ode_sample, times
from gdmd.diffusion.schedule import FlowSchedule, VpSchedule, from_x0, renoise
from gdmd.losses.dmd import dmd_gradient, dmd_loss
from gdmd.losses.gdmd import implicit_target, napo_loss
from gdmd.types import Cond, Prediction, Schedule

SCHEDULES: list[Schedule] = [FlowSchedule(), VpSchedule()]
SHAPE = (1, 2, 2)


@dataclass(frozen=True)
class Gaussian:
    """The exact denoiser of data N(mean, std^2), elementwise: x0 = E[x0 | x_t]."""

    mean: Tensor | float
    std: Tensor | float
    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        alpha, sigma = (f(t)[:, None, None, None] for f in (self.schedule.alpha, self.schedule.sigma))
        gain = self.std**2 * alpha / (alpha**2 * self.std**2 + sigma**2)
        return from_x0(self.mean + gain * (x_t - alpha * self.mean), x_t, t, self.schedule)


def distill(teacher: Gaussian, r: float | None, steps: int = 250) -> tuple[float, float]:
    """Train x0 = scale z + shift by DMD (or, with r, by DMD + NaPO); the fake is exact. Returns (mean, std)."""
    scale, shift = torch.tensor(0.3, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    optimizer = torch.optim.Adam([scale, shift], lr=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x0 = scale * torch.randn(512, *SHAPE) + shift
        t = 0.02 + 0.96 * torch.rand(len(x0))
        with torch.no_grad():
            x_t = renoise(x0, t, torch.randn_like(x0), teacher.schedule)
            x0_fake = Gaussian(shift, scale.abs(), teacher.schedule)(x_t, t, {}).x0
            x_tar = implicit_target(x0, dmd_gradient(x0, teacher(x_t, t, {}).x0, x0_fake))
        loss = dmd_loss(x0, x_tar)
        if r is not None:
            loss = loss + napo_loss(x0, x0.detach(), x_tar, torch.full((len(x0),), r))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        decay.step()
    return shift.item(), scale.abs().item()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_dmd_student_reaches_the_mean_and_std_of_its_teacher(schedule: Schedule) -> None:
    mean, std = distill(Gaussian(1.5, 0.7, schedule), None)
    assert mean == pytest.approx(1.5, abs=0.05) and std == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize("r", [0.3, 0.9])
def test_a_constant_positive_weight_keeps_the_fixed_point(r: float) -> None:
    mean, std = distill(Gaussian(1.5, 0.7, FlowSchedule()), r)
    assert mean == pytest.approx(1.5, abs=0.05) and std == pytest.approx(0.7, abs=0.05)


def test_r_zero_cancels_distillation_on_policy() -> None:
    """w = lambda + gamma beta (2r - 1) = 0; Adam would amplify fp32 rounding errors, so the gradient is checked."""
    x0, x_tar = torch.randn(8, *SHAPE, requires_grad=True), torch.randn(8, *SHAPE)
    loss = dmd_loss(x0, x_tar) + napo_loss(x0, x0.detach(), x_tar, torch.zeros(8))
    (grad,) = torch.autograd.grad(loss.sum(), x0)
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_many_ode_steps_reproduce_the_data(schedule: Schedule) -> None:
    teacher, noise = Gaussian(0.0, 0.5, schedule), torch.randn(4000, *SHAPE)
    wanted = 0.5 * noise.std()
    errors = [(ode_sample(teacher, noise, times(n), {}, schedule).std() - wanted).abs().item() for n in (4, 16, 200)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.005 * (1 if isinstance(schedule, FlowSchedule) else 2)


def test_the_ode_reaches_the_mean_and_keeps_the_order_of_the_noise() -> None:
    teacher, noise = Gaussian(2.0, 0.5, FlowSchedule()), torch.randn(500, *SHAPE)
    x0 = ode_sample(teacher, noise, times(200), {}, FlowSchedule())
    torch.testing.assert_close(x0, 2 + 0.5 * noise, rtol=0, atol=0.02)  # the flow of a Gaussian is affine


def test_one_ode_step_is_the_one_step_prediction() -> None:
    teacher, noise = Gaussian(2.0, 0.5, FlowSchedule()), torch.randn(3, *SHAPE)
    x0 = ode_sample(teacher, noise, times(1), {}, FlowSchedule())
    assert torch.equal(x0, teacher(noise, torch.ones(3), {}).x0)


def test_samplers_call_once_per_step_without_gradient() -> None:
    """The ODE and the few-step sampler."""
    calls: list[float] = []
    weight = torch.tensor(0.5, requires_grad=True)

    def net(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        calls.append(t[0].item())
        return from_x0(weight * x_t, x_t, t, FlowSchedule())

    noise = torch.randn(2, *SHAPE)
    assert not ode_sample(net, noise, times(4), {}, FlowSchedule()).requires_grad
    assert calls == [1.0, 0.75, 0.5, 0.25]
    x0 = few_step_sample(net, noise, (1.0, 0.5), {}, lambda i: torch.zeros_like(noise), FlowSchedule())
    assert not x0.requires_grad and calls[4:] == [1.0, 0.5]


def test_perfect_student_keeps_the_distribution() -> None:
    """A student that maps x_t to a sample of the data: one more step changes nothing."""

    def perfect(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        spread = ((1 - t) ** 2 * 0.25 + t**2).sqrt()[:, None, None, None]
        return from_x0(2 + 0.5 * (x_t - 2 * (1 - t)[:, None, None, None]) / spread, x_t, t, FlowSchedule())

    noise = torch.randn(4000, *SHAPE)
    steps, again = (1.0, 0.75, 0.5, 0.25), lambda i: torch.randn(4000, *SHAPE)
    x0 = few_step_sample(perfect, noise, steps, {}, again, FlowSchedule())
    assert x0.mean().item() == pytest.approx(2, abs=0.02) and x0.std().item() == pytest.approx(0.5, abs=0.01)


def test_guidance_moves_the_mean_of_a_gaussian() -> None:
    """Conditional N(1, s^2), unconditional N(0, s^2): guidance w is the exact denoiser of N(w, s^2)."""

    def either(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return Gaussian(cond["mean"][:, None, None, None], 0.5, FlowSchedule())(x_t, t, {})

    noise = torch.randn(400, *SHAPE)
    guided = Guided(either, 3.0, {"mean": torch.zeros(400)})
    x0 = ode_sample(guided, noise, times(200), {"mean": torch.ones(400)}, FlowSchedule())
    torch.testing.assert_close(x0, 3 + 0.5 * noise, rtol=0, atol=0.02)
