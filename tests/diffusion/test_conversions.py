"""x0, eps, velocity and the VP v: every conversion against its inverse, and the schedules against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gdmd.diffusion.guidance import Guided, plain
from gdmd.diffusion.sampling import times
from gdmd.diffusion.schedule import (
    FlowSchedule,
    VpSchedule,
    expand,
    from_eps,
    from_v_vp,
    from_velocity,
    from_x0,
    renoise,
    shift_time,
    to_v_vp,
    widen,
)
from gdmd.types import Cond, Prediction, Schedule

SCHEDULES: list[Schedule] = [FlowSchedule(), VpSchedule()]
T = torch.tensor([0.02, 0.25, 0.4995, 0.75, 0.98], dtype=torch.float64)


def truth(schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """x0, eps and x_t = alpha x0 + sigma eps, each [5, 2, 3, 3] in float64."""
    x0, eps = torch.randn(2, len(T), 2, 3, 3, dtype=torch.float64)
    alpha, sigma = schedule.alpha(T)[:, None, None, None], schedule.sigma(T)[:, None, None, None]
    return x0, eps, alpha * x0 + sigma * eps


def close(prediction: Prediction, x0: Tensor, eps: Tensor) -> None:
    for got, wanted in ((prediction.x0, x0), (prediction.eps, eps), (prediction.velocity, eps - x0)):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_x0_eps_and_velocity_recover_each_other(schedule: Schedule) -> None:
    x0, eps, x_t = truth(schedule)
    close(from_x0(x0, x_t, T, schedule), x0, eps)
    close(from_eps(eps, x_t, T, schedule), x0, eps)
    close(from_velocity(eps - x0, x_t, T, schedule), x0, eps)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_wrong_network_answer_survives_every_round_trip(schedule: Schedule) -> None:
    _, _, x_t = truth(schedule)
    first = from_x0(torch.randn_like(x_t), x_t, T, schedule)  # does not know the true x0
    close(from_eps(first.eps, x_t, T, schedule), first.x0, first.eps)
    close(from_velocity(first.velocity, x_t, T, schedule), first.x0, first.eps)
    torch.testing.assert_close(renoise(first.x0, T, first.eps, schedule), x_t)


def test_vp_v_round_trip() -> None:
    """The VP v converts back exactly and differs from the velocity."""
    schedule = VpSchedule()
    x0, eps, x_t = truth(schedule)
    alpha, sigma = expand(schedule.alpha(T), x_t), expand(schedule.sigma(T), x_t)
    v_vp = alpha * eps - sigma * x0
    prediction = from_v_vp(v_vp, x_t, T, schedule)
    close(prediction, x0, eps)
    torch.testing.assert_close(to_v_vp(prediction, T, schedule), v_vp, rtol=1e-9, atol=1e-9)
    assert (prediction.velocity - v_vp).abs().mean() > 0.1


def test_velocity_is_eps_minus_x0_at_pure_noise_of_the_flow() -> None:
    noise, velocity = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    prediction = from_velocity(velocity, noise, torch.ones(3, dtype=torch.float64), FlowSchedule())
    close(prediction, noise - velocity, noise)


def test_renoise_ends_at_the_data_and_at_the_noise() -> None:
    x0, eps = torch.randn(2, 4, 1, 2, 2)
    assert torch.equal(renoise(x0, torch.zeros(4), eps, FlowSchedule()), x0)
    assert torch.equal(renoise(x0, torch.ones(4), eps, FlowSchedule()), eps)


def test_half_precision_is_raised_to_fp32_and_float64_stays() -> None:
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        assert widen(torch.ones(1, dtype=dtype)).dtype is wanted
    half = torch.randn(5, 1, 2, 2).bfloat16()
    for convert in (from_x0, from_eps, from_velocity, from_v_vp):
        prediction = convert(half, half, T.float(), VpSchedule())
        assert prediction.x0.dtype is prediction.eps.dtype is torch.float32
    assert renoise(half, T.float(), half, FlowSchedule()).dtype is torch.float32


def test_vp_variance_is_preserved_at_every_time() -> None:
    schedule, t = VpSchedule(), torch.linspace(0, 1, 3001, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-12)
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()


def test_flow_is_the_straight_line() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(FlowSchedule().alpha(t) + FlowSchedule().sigma(t), torch.ones_like(t))
    assert torch.equal(FlowSchedule().sigma(t), t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sdxl_alphas_are_the_cumulative_product_of_its_betas(dtype: torch.dtype) -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    alpha_bar = np.cumprod(1 - betas)
    t_1000 = np.array([999, 749, 499, 249, 0, 1])
    t = torch.tensor(t_1000 / 999, dtype=dtype)
    tolerance = 1e-10 if dtype is torch.float64 else 2e-6
    np.testing.assert_allclose(VpSchedule().alpha(t).numpy(), np.sqrt(alpha_bar[t_1000]), rtol=tolerance)
    np.testing.assert_allclose(VpSchedule().sigma(t).numpy(), np.sqrt(1 - alpha_bar[t_1000]), rtol=tolerance)
    assert VpSchedule().alpha(t[:1]).item() == pytest.approx(0.0682, abs=2e-4)  # SDXL keeps signal at t = 1


def test_between_two_training_steps_the_log_snr_is_the_mean() -> None:
    schedule = VpSchedule()

    def log_snr(t_1000: float) -> float:
        t = torch.tensor([t_1000 / 999], dtype=torch.float64)
        return 2 * (schedule.alpha(t).log() - schedule.sigma(t).log()).item()

    assert log_snr(500.5) == pytest.approx((log_snr(500) + log_snr(501)) / 2, abs=1e-9)


def test_shift_three_gives_the_sd3_steps_and_keeps_the_ends() -> None:
    t = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
    wanted = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(shift_time(t, 3.0), wanted)
    torch.testing.assert_close(times(4, shift=3.0), wanted.float())
    torch.testing.assert_close(shift_time(shift_time(t, 3.0), 1 / 3), t)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_guidance_is_linear_and_the_same_in_every_parameterization(schedule: Schedule) -> None:
    _, _, x_t = truth(schedule)
    cond, uncond = (from_x0(torch.randn_like(x_t), x_t, T, schedule) for _ in range(2))
    one, none, five, seven = (plain(cond, uncond, g, T).x0 for g in (1.0, 0.0, 5.0, 7.0))
    torch.testing.assert_close(one, cond.x0)
    assert torch.equal(none, uncond.x0)
    torch.testing.assert_close(seven - five, 2 * (cond.x0 - uncond.x0))

    def both(x: Tensor, t: Tensor, condition: Cond) -> Prediction:
        return Prediction(torch.cat([cond.x0, uncond.x0]), torch.cat([cond.eps, uncond.eps]))

    tokens = {"tokens": torch.zeros(len(T), 8)}
    guided = Guided(both, 7.0, tokens)(x_t, T, tokens)
    torch.testing.assert_close(guided.x0, seven)
    eps = uncond.eps + 7 * (cond.eps - uncond.eps)
    torch.testing.assert_close(from_eps(eps, x_t, T, schedule).x0, guided.x0, rtol=1e-8, atol=1e-8)
    velocity = uncond.velocity + 7 * (cond.velocity - uncond.velocity)
    torch.testing.assert_close(from_velocity(velocity, x_t, T, schedule).x0, guided.x0, rtol=1e-8, atol=1e-8)
