"""The stochastic few-step policy: coefficients-preserving steps, their log-probability and the rollout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gdmd.diffusion.sampling import few_step_sample, ode_sample
from gdmd.diffusion.schedule import FlowSchedule, VpSchedule, from_velocity, from_x0
from gdmd.diffusion.stochastic_sampling import cps_log_prob, cps_mean, cps_step, stochastic_rollout
from gdmd.types import Cond, Prediction

FLOW = FlowSchedule()


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(len(values), 1, 1, 1)


def student(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
    return from_velocity(torch.tanh(x_t + t[:, None, None, None]), x_t, t, FLOW)


def test_a_step_of_the_flow_is_the_golden_number() -> None:
    # x_t = .9, t = .8, v = .5: x0 = .5, eps = 1; s' = .4, noise level .8 (th = 72 degrees), n = -1.5
    # mean = .6 .5 + .4 cos(th) = .4236067977; x' = mean - .6 sin(th) = -.1470271121
    prediction = from_velocity(double(0.5), double(0.9), double(0.8).flatten(), FLOW)
    t_next = double(0.4).flatten()
    mean = cps_mean(prediction, t_next, 0.8, FLOW)
    assert mean.item() == pytest.approx(0.4236067977499790, rel=1e-12)
    x_next = cps_step(prediction, t_next, double(-1.5), 0.8, FLOW)
    assert x_next.item() == pytest.approx(-0.1470271120271131, rel=1e-12)
    assert cps_log_prob(x_next, mean).item() == pytest.approx(-0.3256230589874906, rel=1e-12)


@pytest.mark.parametrize("schedule", [FLOW, VpSchedule()])
@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.9, 1.0])
def test_a_step_keeps_the_signal_and_the_noise_of_its_time(schedule: FlowSchedule, noise_level: float) -> None:
    x0, eps = torch.full((1, 1, 300, 300), 2.0), torch.randn(1, 1, 300, 300, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(1, 1, 300, 300, generator=torch.Generator().manual_seed(2))
    t, t_next = torch.tensor([0.8]), torch.tensor([0.5])
    x_t = schedule.alpha(t) * x0 + schedule.sigma(t) * eps
    x_next = cps_step(from_x0(x0, x_t, t, schedule), t_next, noise, noise_level, schedule)
    assert x_next.mean().item() == pytest.approx(2 * schedule.alpha(t_next).item(), abs=0.01)
    assert x_next.std().item() == pytest.approx(schedule.sigma(t_next).item(), rel=0.01)


def test_the_log_probability_is_that_of_a_normal_up_to_constants() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = Prediction(*torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64))
    t, level = torch.tensor([0.25, 0.5, 0.75]).double(), 0.7
    x_next = cps_step(prediction, t, torch.randn(3, 2, 4, 4, generator=generator).double(), level, FLOW)
    mean, std = cps_mean(prediction, t, level, FLOW), t * math.sin(level * math.pi / 2)
    normal = torch.distributions.Normal(mean, std[:, None, None, None]).log_prob(x_next).mean((1, 2, 3))
    constant = -std.log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(cps_log_prob(x_next, mean) / (2 * std**2), normal - constant)


def test_log_prob_gradient() -> None:
    """It pulls the mean to what was drawn."""
    mean, x_next = torch.randn(2, 1, 2, 2).requires_grad_(), torch.randn(2, 1, 2, 2).requires_grad_()
    own, other = torch.autograd.grad(cps_log_prob(x_next, mean).sum(), (mean, x_next), allow_unused=True)
    torch.testing.assert_close(own, (2 * (x_next - mean) / 4).detach())
    assert other is None


def test_rollout_at_noise_zero_and_one() -> None:
    """0: the ODE; 1: the student's own sampler."""
    noise, steps = torch.randn(5, 2, 3, 3), (1.0, 0.75, 0.5, 0.25)
    fresh = {i: torch.randn(5, 2, 3, 3) for i in range(1, 4)}
    calm = stochastic_rollout(student, noise, steps, {}, fresh.__getitem__, FLOW, 0.0)
    ode = ode_sample(student, noise, torch.tensor([*steps, 0.0]), {}, FLOW)
    torch.testing.assert_close(calm.x0, ode)
    assert torch.equal(calm.log_prob, torch.zeros(5, 3))
    loud = stochastic_rollout(student, noise, steps, {}, fresh.__getitem__, FLOW, 1.0)
    torch.testing.assert_close(loud.x0, few_step_sample(student, noise, steps, {}, fresh.__getitem__, FLOW))
    torch.testing.assert_close(loud.x[:, 3] - 0.75 * student(loud.x[:, 2], torch.full((5,), 0.5), {}).x0, fresh[3] / 4)


def test_rollout_keeps_states_and_log_probs() -> None:
    noise, steps, level = torch.randn(4, 2, 3, 3), (1.0, 0.6, 0.2), 0.9
    fresh = {i: torch.randn(4, 2, 3, 3) for i in range(1, 3)}
    made = stochastic_rollout(student, noise, steps, {}, fresh.__getitem__, FLOW, level)
    assert made.x.shape == (4, 3, 2, 3, 3) and made.log_prob.shape == (4, 2) and torch.equal(made.x[:, 0], noise)
    for i in range(2):
        mean = cps_mean(
            student(made.x[:, i], torch.full((4,), steps[i]), {}), torch.tensor([steps[i + 1]]), level, FLOW
        )
        torch.testing.assert_close(cps_log_prob(made.x[:, i + 1], mean), made.log_prob[:, i])
        drawn = (steps[i + 1] * math.sin(level * math.pi / 2) * fresh[i + 1]).square().mean((1, 2, 3))
        torch.testing.assert_close(made.log_prob[:, i], -drawn, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(made.x0, student(made.x[:, 2], torch.full((4,), 0.2), {}).x0)


def test_one_step_is_one_prediction_and_has_no_log_probability() -> None:
    noise = torch.randn(3, 2, 3, 3)
    made = stochastic_rollout(student, noise, (1.0,), {}, {}.__getitem__, FLOW, 0.9)
    assert made.log_prob.shape == (3, 0) and torch.equal(made.x0, student(noise, torch.ones(3), {}).x0)
