"""Details of the schedules: shapes, dtypes, end points, and where a conversion is undefined."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gdmd.diffusion.schedule import FlowSchedule, VpSchedule, expand, from_eps, from_x0, renoise, shift_time
from gdmd.types import Schedule

SCHEDULES: list[Schedule] = [FlowSchedule(), VpSchedule()]


def test_expand_adds_as_many_dimensions_as_the_other_tensor_has() -> None:
    t = torch.arange(3.0)
    assert expand(t, torch.zeros(3, 8, 4, 4)).shape == (3, 1, 1, 1)
    assert expand(t, torch.zeros(3, 16)).shape == (3, 1)
    assert expand(t, t).shape == (3,)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_schedule_keeps_shape_and_dtype(schedule: Schedule, dtype: torch.dtype) -> None:
    t = torch.rand(4, 2, dtype=dtype)
    for value in (schedule.alpha(t), schedule.sigma(t)):
        assert value.shape == t.shape and value.dtype is dtype


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_runs_from_data_to_noise(schedule: Schedule) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    alpha, sigma = schedule.alpha(ends), schedule.sigma(ends)
    assert alpha[0] > 0.999 and sigma[0] < 0.03 and alpha[1] < 0.07 and sigma[1] > 0.997


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "trained"])
def test_other_betas_are_their_cumulative_product(betas: str, zero_snr: bool) -> None:
    steps, low, high = 50, 0.001, 0.2
    given = {"linear": np.linspace(low, high, steps), "scaled_linear": np.linspace(low**0.5, high**0.5, steps) ** 2}
    given["trained"] = np.linspace(0.01, 0.1, steps) ** 1.5
    trained = tuple(given["trained"]) if betas == "trained" else ()
    schedule = VpSchedule(low, high, steps, betas, trained, zero_snr)
    root = np.cumprod(1 - given[betas]) ** 0.5
    wanted = (root - root[-1]) * root[0] / (root[0] - root[-1]) if zero_snr else root
    t = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    np.testing.assert_allclose(schedule.alpha(t).numpy(), wanted, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(schedule.sigma(t).numpy(), np.sqrt(1 - wanted**2), rtol=1e-9)


def test_zero_terminal_snr() -> None:
    """The last step is pure noise and is reached continuously."""
    schedule, t = VpSchedule(zero_snr=True), torch.linspace(997 / 999, 1, 2001, dtype=torch.float64)
    alpha = schedule.alpha(t)
    assert alpha[-1] == 0 and schedule.sigma(t)[-1] == 1 and alpha.isfinite().all()
    assert (alpha.diff() < 0).all() and alpha.diff().abs().max() < 1e-3 * alpha[0]


def test_before_the_first_step_there_is_no_noise() -> None:
    before = torch.tensor([-1 / 999])
    assert VpSchedule().alpha(before) == 1 and VpSchedule().sigma(before) == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_time_belongs_to_the_sample(schedule: Schedule) -> None:
    x0, eps = torch.randn(2, 3, 2, 2, 2)
    t = torch.tensor([0.1, 0.5, 0.9])
    whole = renoise(x0, t, eps, schedule)
    for k in range(3):
        torch.testing.assert_close(whole[k : k + 1], renoise(x0[k : k + 1], t[k : k + 1], eps[k : k + 1], schedule))


def test_an_undefined_conversion_is_not_finite() -> None:
    """eps at t = 0 and x0 at the flow's t = 1 are undefined; a clamped number would go unnoticed in training."""
    x = torch.ones(1, 1, 1, 1)
    assert not from_x0(2 * x, x, torch.zeros(1), FlowSchedule()).eps.isfinite().any()
    assert not from_eps(2 * x, x, torch.ones(1), FlowSchedule()).x0.isfinite().any()


def test_time_shift() -> None:
    """A shift of 1 is the identity, a larger one moves toward noise."""
    t = torch.linspace(0, 1, 9)
    assert torch.equal(shift_time(t, 1.0), t)
    assert (shift_time(t, 3.0)[1:-1] > t[1:-1]).all()
