"""What the GDMD loss does (arXiv 2604.19009, section 3.3), derived by hand and checked in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gdmd.losses.dmd import dmd_loss
from gdmd.losses.gdmd import first_order_gain, implicit_target, napo_loss, napo_minimizer, optimality, step_weight

B, SHAPE = 5, (5, 2, 3, 3)
SIZE = 18
R = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)

weights = st.floats(0.1, 3.0)
shares = st.floats(0.0, 1.0)


def three() -> tuple[Tensor, Tensor, Tensor]:
    """x0, x_old, x_tar: [5, 2, 3, 3] in float64."""
    x0, x_old, x_tar = torch.randn(3, *SHAPE, dtype=torch.float64)
    return x0, x_old, x_tar


def wide(r: Tensor) -> Tensor:
    return r[:, None, None, None]


def gradient(
    x0: Tensor, x_old: Tensor, x_tar: Tensor, r: Tensor, dmd_weight: float, gamma: float, beta: float
) -> Tensor:
    """d (lambda L_DMD + gamma L_RL) / d x0 per sample, by autograd."""
    x = x0.clone().requires_grad_()
    loss = dmd_weight * dmd_loss(x, x_tar) + gamma * napo_loss(x, x_old, x_tar, r, beta)
    (found,) = torch.autograd.grad(loss.sum(), x)
    return found


def test_napo_is_the_formula_of_the_paper_in_numpy() -> None:
    x0, x_old, x_tar = three()
    beta, a, b, c = 0.3, x0.numpy(), x_old.numpy(), x_tar.numpy()
    positive = ((1 - beta) * b + beta * a - c) ** 2
    negative = ((1 + beta) * b - beta * a - c) ** 2
    r = R.numpy()
    wanted = r * positive.reshape(B, -1).mean(1) + (1 - r) * negative.reshape(B, -1).mean(1)
    np.testing.assert_allclose(napo_loss(x0, x_old, x_tar, R, beta).numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_the_autograd_gradient_of_napo_is_the_closed_form(beta: float) -> None:
    x0, x_old, x_tar = three()
    wanted = (2 * beta / SIZE) * ((2 * wide(R) - 1) * (x_old - x_tar) + beta * (x0 - x_old))
    torch.testing.assert_close(gradient(x0, x_old, x_tar, R, 0.0, 1.0, beta), wanted, rtol=1e-10, atol=1e-12)


def test_napo_sends_gradient_to_x0_only() -> None:
    x0, x_old, x_tar, r = (x.clone().requires_grad_() for x in (*three(), R))
    napo_loss(x0, x_old, x_tar, r, 0.7).sum().backward()
    assert x0.grad is not None and x_old.grad is None and x_tar.grad is None and r.grad is None


@pytest.mark.parametrize(("dmd_weight", "gamma", "beta"), [(1.0, 1.0, 1.0), (0.5, 2.0, 0.3), (2.0, 0.25, 4.0)])
def test_on_policy_the_total_gradient_is_w_times_the_dmd_gradient(dmd_weight: float, gamma: float, beta: float) -> None:
    _, x_old, x_tar = three()
    total = gradient(x_old, x_old, x_tar, R, dmd_weight, gamma, beta)
    plain = gradient(x_old, x_old, x_tar, R, 1.0, 0.0, beta)
    w = dmd_weight + gamma * beta * (2 * R - 1)
    torch.testing.assert_close(total, wide(w) * plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(step_weight(R, dmd_weight, gamma, beta), w)


def test_r_half_is_zero_on_policy() -> None:
    """On-policy the gradient is zero, off-policy it points to the old policy."""
    x0, x_old, x_tar = three()
    half = torch.full((B,), 0.5, dtype=torch.float64)
    assert gradient(x_old, x_old, x_tar, half, 0.0, 1.0, 1.0).abs().max() < 1e-15
    pull = gradient(x0, x_old, x_tar, half, 0.0, 1.0, 1.0)
    torch.testing.assert_close(pull, 2 / SIZE * (x0 - x_old))


def test_cosine_is_the_sign_of_2r_minus_1() -> None:
    """The cosine of the RL and the DMD gradient of each sample."""
    _, x_old, x_tar = three()
    keep = R != 0.5
    reinforced = gradient(x_old, x_old, x_tar, R, 0.0, 1.0, 0.4).flatten(1)[keep]
    plain = gradient(x_old, x_old, x_tar, R, 1.0, 0.0, 0.4).flatten(1)[keep]
    cosine = torch.cosine_similarity(reinforced, plain)
    torch.testing.assert_close(cosine, (2 * R[keep] - 1).sign(), rtol=0, atol=1e-12)


@given(dmd_weight=weights, gamma=weights, beta=weights, r=shares)
def test_minimizer(dmd_weight: float, gamma: float, beta: float, r: float) -> None:
    """The loss is convex with Hessian 2 (lambda + gamma beta^2) / N, so its only stationary point is the minimum."""
    _, x_old, x_tar = three()
    shared = torch.full((B,), r, dtype=torch.float64)
    least = napo_minimizer(x_old, x_tar, shared, dmd_weight, gamma, beta)
    assert gradient(least, x_old, x_tar, shared, dmd_weight, gamma, beta).abs().max() < 1e-12


def test_minimizer_is_r() -> None:
    """lambda = gamma, beta = 1: W = r."""
    _, x_old, x_tar = three()
    least = x_old + wide(R) * (x_tar - x_old)
    assert gradient(least, x_old, x_tar, R, 0.8, 0.8, 1.0).abs().max() < 1e-12
    torch.testing.assert_close(napo_minimizer(x_old, x_tar, R, 0.8, 0.8, 1.0), least)


def test_minimizer_of_an_unscored_sample() -> None:
    """L_DMD alone: the target."""
    _, x_old, x_tar = three()
    least = napo_minimizer(x_old, x_tar, torch.full_like(R, torch.nan), 0.5, 2.0, 1.0)
    torch.testing.assert_close(least, x_tar)


@given(dmd_weight=weights, share=st.floats(0.0, 1.0), beta=weights)
def test_gamma_beta_up_to_lambda_never_points_against_dmd(dmd_weight: float, share: float, beta: float) -> None:
    gamma = share * dmd_weight / beta
    assert step_weight(R, dmd_weight, gamma, beta).min() >= -1e-12
    _, x_old, x_tar = three()
    total = gradient(x_old, x_old, x_tar, R, dmd_weight, gamma, beta)
    assert (total * (x_old - x_tar)).flatten(1).sum(1).min() >= -1e-12


def test_gamma_beta_above_lambda_does_point_against_dmd() -> None:
    assert step_weight(R, 1.0, 1.5, 1.0).min() < 0


def test_rl_gradient_is_in_the_span_of_the_group() -> None:
    """Identical targets leave one common factor."""
    _, x_old, x_tar = three()
    sum_of = sum(gradient(x_old, x_old, x_tar, R.roll(k), 1.0, 1.0, 1.0) for k in range(3))
    factor = sum(step_weight(R.roll(k)) for k in range(3))
    torch.testing.assert_close(sum_of, wide(factor) * gradient(x_old, x_old, x_tar, R, 1.0, 0.0, 1.0))


def test_first_order_gain_is_the_limit_of_small_steps() -> None:
    """In float64 the difference quotient approaches it as s falls."""
    x0, step = torch.randn(SHAPE, dtype=torch.float64), torch.randn(3, *SHAPE, dtype=torch.float64)
    rewards = (lambda x: x.sigmoid().flatten(1).mean(1), lambda x: (x[:, 0] * x[:, 1]).sin().flatten(1).sum(1))
    own = x0.clone().requires_grad_()
    gradients = torch.stack([torch.autograd.grad(reward(own).sum(), own)[0] for reward in rewards])
    found = first_order_gain(gradients, step)
    assert found.shape == (2, 3, B)
    errors = []
    for s in (1e-3, 1e-6):
        quotient = [[(reward(x0 + s * one) - reward(x0)) / s for one in step] for reward in rewards]
        errors.append(float((torch.stack([torch.stack(row) for row in quotient]) - found).abs().max()))
    assert errors[0] < 0.05 and errors[1] < 1e-2 * errors[0]
    unscored = gradients.clone()
    unscored[0, 2] = math.nan
    assert first_order_gain(unscored, step).isnan().any((0, 1)).tolist() == [False, False, True, False, False]


def test_the_optimality_score_is_the_clipped_gain_in_units_of_z() -> None:
    target, sample = torch.tensor([1.0, 2.0, 2.5, 9.0, -9.0]), torch.full((5,), 2.0)
    assert optimality(target, sample, 2.0).tolist() == [0.25, 0.5, 0.625, 1.0, 0.0]
    assert optimality(target[None].expand(3, -1), sample, torch.tensor(2.0))[1].tolist()[0] == 0.25


@given(p=st.floats(0.01, 100), q=st.floats(-50, 50))
def test_another_unit_of_the_reward_changes_no_score(p: float, q: float) -> None:
    target, sample = torch.randn(2, 7, dtype=torch.float64)
    moved = optimality(p * target + q, p * sample + q, p * 0.8)
    torch.testing.assert_close(moved, optimality(target, sample, 0.8), rtol=1e-7, atol=1e-7)


def test_constant_reward_scores_half() -> None:
    """Unscored samples stay unscored."""
    assert optimality(torch.ones(3), torch.ones(3), 0.0).tolist() == [0.5] * 3
    assert optimality(torch.tensor([5.0]), torch.tensor([1.0]), torch.tensor(0.0)).tolist() == [0.5]
    for z in (0.0, 1.0):
        r = optimality(torch.tensor([math.nan, 1.0]), torch.tensor([1.0, math.nan]), z)
        assert r.isnan().all()


def test_a_negative_scale_is_an_error() -> None:
    with pytest.raises(ValueError, match="Z of a reward must be >= 0, got -1"):
        optimality(torch.ones(1), torch.ones(1), -1.0)


def test_the_score_and_the_target_carry_no_gradient() -> None:
    x = torch.randn(3, requires_grad=True)
    assert not optimality(x, x.detach(), 1.0).requires_grad and not implicit_target(x, x).requires_grad
    assert torch.equal(implicit_target(torch.ones(2), torch.full((2,), 0.25)), torch.full((2,), 0.75))
