"""The losses of the sample-based baselines and their gradients, against numbers by hand or in numpy float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gdmd.losses.advantages import group_advantage
from gdmd.losses.dpo import dpo_loss
from gdmd.losses.grpo import grpo_loss
from gdmd.losses.nft import nft_loss, nft_optimality
from gdmd.losses.refl import refl_loss

REWARD = [0.2, 0.9, 0.4, -0.3, 0.8, 0.1]
GROUP = [7, 7, 7, 2, 2, 2]
GLOBAL = [-0.7293968086, 0.9725290782, -0.2431322695, -1.2156613477, 1.4587936173, -0.2431322695]
OWN = [-1.0190493307, 1.3587324410, -0.3396831102, -1.0998533627, 1.3198240352, -0.2199706725]


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradient(value: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), of)[0]


@pytest.mark.parametrize(("spread", "wanted"), [("global", GLOBAL), ("group", OWN)])
def test_group_advantages_are_the_golden_numbers(spread: str, wanted: list[float]) -> None:
    advantage = group_advantage(double(REWARD), torch.tensor(GROUP), spread)  # type: ignore[arg-type]
    np.testing.assert_allclose(advantage.numpy(), wanted, atol=1e-9)
    whole = np.array(REWARD)
    mean = np.array([whole[np.array(GROUP) == g].mean() for g in GROUP])
    if spread == "global":  # and those of the authors' code, up to the 1e-4 that it adds to std
        np.testing.assert_allclose(advantage.numpy(), (whole - mean) / (whole.std() + 1e-4), rtol=3e-4)


@pytest.mark.parametrize("spread", ["global", "group"])
def test_permuting_the_samples_permutes_the_advantages(spread: str) -> None:
    order = [4, 0, 3, 5, 2, 1]
    plain = group_advantage(double(REWARD), torch.tensor(GROUP), spread)  # type: ignore[arg-type]
    mixed = group_advantage(double(REWARD)[order], torch.tensor(GROUP)[order], spread)  # type: ignore[arg-type]
    torch.testing.assert_close(mixed, plain[order])


@pytest.mark.parametrize("spread", ["global", "group"])
@pytest.mark.parametrize(("p", "q"), [(30.0, -2.0), (1e-5, 0.7), (1.0, 1e4)])
def test_advantage_ignores_affine_changes(spread: str, p: float, q: float) -> None:
    """R -> p R + q, p > 0."""
    plain = group_advantage(double(REWARD), torch.tensor(GROUP), spread)  # type: ignore[arg-type]
    moved = group_advantage(p * double(REWARD) + q, torch.tensor(GROUP), spread)  # type: ignore[arg-type]
    torch.testing.assert_close(moved, plain, rtol=0, atol=1e-9)


def test_unscored_samples_stay_unscored_and_count_nowhere() -> None:
    kept = [0, 2, 3, 4, 5]
    holed = double(REWARD)
    holed[1] = math.nan
    advantage = group_advantage(holed, torch.tensor(GROUP))
    assert advantage.isnan().tolist() == [False, True, False, False, False, False]
    torch.testing.assert_close(advantage[kept], group_advantage(holed[kept], torch.tensor(GROUP)[kept]))
    assert group_advantage(torch.full((4,), math.nan), torch.zeros(4)).isnan().all()


@pytest.mark.parametrize("spread", ["global", "group"])
def test_a_constant_reward_and_a_group_of_one_have_advantage_zero(spread: str) -> None:
    constant = torch.full((7,), 0.1)
    assert torch.equal(group_advantage(constant, torch.zeros(7), spread), torch.zeros(7))  # type: ignore[arg-type]
    alone = group_advantage(torch.randn(5), torch.arange(5), spread)  # type: ignore[arg-type]
    assert torch.equal(alone, torch.zeros(5))


def test_an_unknown_spread_is_an_error() -> None:
    with pytest.raises(ValueError, match="spread must be 'global' or 'group', got 'batch'"):
        group_advantage(torch.ones(2), torch.zeros(2), "batch")  # type: ignore[arg-type]


def test_the_r_of_nft_maps_the_clip_to_zero_and_one() -> None:
    r = nft_optimality(double([-9, -5, -2, 0, 1, 5, 6, math.nan]))
    assert r[:-1].tolist() == pytest.approx([0, 0, 0.3, 0.5, 0.6, 1, 1]) and r[-1].isnan()
    assert nft_optimality(double([1.0]), 2.0).item() == 0.75


def nft_numbers() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x0, x0_old = double([[1.0, -2.0], [0.5, 0.25]]), double([[0.5, 1.0], [0.0, -1.0]])
    target, r = double([[0.0, 3.0], [1.0, 1.0]]), double([0.8, 0.1])
    shape = (2, 2, 1, 1)
    return x0.reshape(shape), x0_old.reshape(shape), target.reshape(shape), r


def test_the_self_normalized_loss_of_nft_is_the_golden_number() -> None:
    # sample 0, beta 1/2: x+ = (.75, -.5), x- = (.25, 2.5); errors (.75, -3.5), (.25, -.5); means |e| 2.125, .375
    # (5 / .5) [.8 (.5625 + 12.25) / 2 / 2.125 + .2 (.0625 + .25) / 2 / .375] = 24.9509803922
    # sample 1: x+ = (.25, -.375), x- = (-.25, -1.625); errors (-.75, -1.375), (-1.25, -2.625); means 1.0625, 1.9375
    # 10 [.1 (.5625 + 1.890625) / 2 / 1.0625 + .9 (1.5625 + 6.890625) / 2 / 1.9375] = 20.7874762808
    x0, x0_old, target, r = nft_numbers()
    loss = nft_loss(x0, x0_old, target, r, 0.5)
    np.testing.assert_allclose(loss.numpy(), [24.9509803922, 20.7874762808], rtol=1e-10)


def test_the_normalizer_of_nft_carries_no_gradient() -> None:
    x0, x0_old, target, r = nft_numbers()
    x0 = x0.requires_grad_()
    beta, wide = 0.5, (2, 1, 1, 1)
    plus, minus = beta * x0 + (1 - beta) * x0_old - target, (1 + beta) * x0_old - beta * x0 - target
    m_plus, m_minus = (e.abs().flatten(1).mean(1).reshape(wide) for e in (plus, minus))
    by_hand = 5 / beta * (r.reshape(wide) * plus / m_plus - (1 - r).reshape(wide) * minus / m_minus) * beta
    torch.testing.assert_close(gradient(nft_loss(x0, x0_old, target, r, beta), x0), by_hand.detach())


def test_nft_on_policy() -> None:
    """On-policy, a neutral sample has no gradient and a good one attracts."""
    x0_old, target = torch.randn(2, 4, 3, 3, 3).double()
    x0 = x0_old.clone().requires_grad_()
    neutral = gradient(nft_loss(x0, x0_old, target, torch.full((4,), 0.5).double(), 0.7), x0)
    assert neutral.abs().max() < 1e-15
    r = torch.rand(4).double()
    plain = gradient(nft_loss(x0, x0_old, target, r, 0.7, normalize=False), x0)
    torch.testing.assert_close(plain, 5 * 2 / 27 * (2 * r - 1)[:, None, None, None] * (x0_old - target))


@pytest.mark.parametrize("beta", [0.1, 0.7, 1.0])
def test_nft_on_policy_gradient_ignores_beta(beta: float) -> None:
    """It is the advantage over the mean error."""
    x0_old, target = torch.randn(2, 4, 3, 3, 3).double()
    x0, advantage = x0_old.clone().requires_grad_(), double([2.0, -1.0, 0.5, -3.0])
    error = x0_old - target
    wanted = 2 / 27 * (advantage / error.abs().mean((1, 2, 3)))[:, None, None, None] * error
    found = gradient(nft_loss(x0, x0_old, target, nft_optimality(advantage), beta), x0)
    torch.testing.assert_close(found, wanted)


def test_mixing_velocities_is_mixing_x0() -> None:
    x_t, t, beta = torch.randn(4, 2, 3, 3).double(), torch.rand(4, 1, 1, 1).double(), 0.6
    v, v_old, target = torch.randn(3, 4, 2, 3, 3).double()
    r = torch.rand(4).double()
    plus, minus = beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v

    def branch(velocity: Tensor) -> Tensor:
        error = x_t - t * velocity - target
        return (error**2).flatten(1).mean(1) / error.abs().flatten(1).mean(1)

    wanted = 5 / beta * (r * branch(plus) + (1 - r) * branch(minus))
    torch.testing.assert_close(nft_loss(x_t - t * v, x_t - t * v_old, target, r, beta), wanted)


def test_an_error_of_zero_has_loss_zero_not_nan() -> None:
    x = torch.randn(2, 1, 2, 2)
    assert torch.equal(nft_loss(x, x, x, torch.ones(2), 1.0), torch.zeros(2))


def test_the_clipped_policy_loss_is_the_golden_number() -> None:
    old, new = double([0.0, 0.0, 0.0, 0.0]), double([0.3, 0.3, -0.3, -0.3])
    advantage = double([2.0, -2.0, 2.0, -2.0])
    loss = grpo_loss(new, old, advantage, 0.2)  # e^.3 = 1.3498588076, e^-.3 = .7408182207
    np.testing.assert_allclose(loss.numpy(), [-2.4, 2.6997176151, -1.4816364413, 1.6], rtol=1e-9)


def test_the_policy_loss_has_gradient_only_inside_the_clip() -> None:
    new = double([0.3, 0.3, -0.3, -0.3, 0.0, 0.0]).requires_grad_()
    advantage = double([2.0, -2.0, 2.0, -2.0, 3.0, -1.0])
    found = gradient(grpo_loss(new, torch.zeros(6).double(), advantage, 0.2), new)
    ratio = new.detach().exp()
    torch.testing.assert_close(found, -ratio * advantage * double([0, 1, 1, 0, 1, 1]))


def test_dpo_at_the_reference() -> None:
    """log 2, and the gradient prefers the better image."""
    win, lose = double([0.4, 0.1]).requires_grad_(), double([0.6, 0.3]).requires_grad_()
    loss = dpo_loss(win, lose, win.detach(), lose.detach(), 2000.0)
    torch.testing.assert_close(loss, torch.full((2,), math.log(2), dtype=torch.float64))
    torch.testing.assert_close(gradient(loss, win), torch.full((2,), 500.0, dtype=torch.float64))
    torch.testing.assert_close(gradient(dpo_loss(win, lose, win, lose, 2000.0), lose), double([-500.0, -500.0]))


def test_the_dpo_loss_is_the_golden_number() -> None:
    # beta 8: 4 [(.5 - .4) - (.7 - .3)] = -1.2, log(1 + e^-1.2) = .2633; the mirror pair log(1 + e^1.2) = 1.4633
    loss = dpo_loss(double([0.5, 0.7]), double([0.7, 0.5]), double([0.4, 0.3]), double([0.3, 0.4]), 8.0)
    np.testing.assert_allclose(loss.numpy(), [0.2632824673, 1.4632824673], rtol=1e-9)


def test_the_refl_gradient_stops_at_the_margin() -> None:
    reward = double([0.2, 0.7, 0.9, math.nan]).requires_grad_()
    loss = refl_loss(reward, 0.7)
    assert loss[:3].tolist() == pytest.approx([0.5, 0.0, 0.0]) and loss[3].isnan()
    assert gradient(loss[:3], reward)[:3].tolist() == [-1.0, 0.0, 0.0]
