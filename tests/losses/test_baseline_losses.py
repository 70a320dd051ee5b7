"""DMD2's GAN, DMD1's regression, DMDR's tilt and schedules against numbers computed by other means in float64."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from gdmd.diffusion.dmdr_schedules import annealed_shape, beta_quantile, cosine_anneal
from gdmd.losses.dmd import regression_loss
from gdmd.losses.gan import discriminator_loss, generator_loss
from gdmd.losses.reward_tilt import reward_tilt


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_gan_losses_are_those_of_logistic_regression() -> None:
    real, student = tensor(-2.0, 0.0, 1.5, 40.0), tensor(3.0, 0.0, -0.5, -40.0)
    # -log s(real) - log(1 - s(student)) by hand: log1p(exp(.)), at 0 it is 2 log 2
    wanted = [math.log1p(math.exp(2)) + math.log1p(math.exp(3)), 2 * math.log(2)]
    wanted += [math.log1p(math.exp(-1.5)) + math.log1p(math.exp(-0.5)), 2 * math.exp(-40)]
    torch.testing.assert_close(discriminator_loss(real, student), tensor(*wanted), rtol=1e-12, atol=0)
    assert wanted[0] == pytest.approx(2.126928011042972 + 3.048587351573742, rel=1e-15)
    torch.testing.assert_close(generator_loss(student)[:2], tensor(0.048587351573742, math.log(2)), rtol=1e-12, atol=0)


def test_the_generator_gradient_does_not_vanish_where_the_head_is_certain() -> None:
    logit = tensor(-30.0, 0.0, 30.0).requires_grad_(True)
    (grad,) = torch.autograd.grad(generator_loss(logit).sum(), logit)
    torch.testing.assert_close(grad, tensor(-1.0, -0.5, 0.0), rtol=0, atol=1e-12)


def test_regression_loss() -> None:
    """The mean square to the ODE sample, per sample."""
    x0 = torch.arange(24, dtype=torch.float64).reshape(2, 3, 2, 2).requires_grad_(True)
    x0_ode = torch.zeros_like(x0).requires_grad_(True)
    loss = regression_loss(x0, x0_ode)
    torch.testing.assert_close(loss, tensor(506 / 12, 3818 / 12))  # sums of squares of 0..11 and 12..23
    loss.sum().backward()
    assert x0_ode.grad is None and x0.grad is not None
    torch.testing.assert_close(x0.grad, 2 * x0.detach() / 12)


def test_tilt_of_one_reward() -> None:
    """exp((r - mean) / std), or exp(r / ||r||), over the batch."""
    r = tensor(1.0, 3.0, 5.0, 7.0)  # mean 4, population std sqrt(5), ||r|| = sqrt(84)
    wanted = tensor(*(math.exp((x - 4) / math.sqrt(5)) for x in r.tolist()))
    torch.testing.assert_close(reward_tilt(r[None]), wanted, rtol=1e-12, atol=0)
    literal = tensor(*(math.exp(x / math.sqrt(84)) for x in r.tolist()))
    torch.testing.assert_close(reward_tilt(r[None], unit="norm"), literal, rtol=1e-14, atol=0)
    half = reward_tilt(r[None], 0.5)
    torch.testing.assert_close(half, wanted.sqrt(), rtol=1e-12, atol=0)


def test_the_literal_tilt_hardly_uses_rewards_and_the_standardized_one_does() -> None:
    """Scores of PickScore's size (0.22 +- 0.01 as cosines) at a batch of 32."""
    r = 0.22 + 0.01 * np.random.default_rng(0).standard_normal(32)
    literal, used = (reward_tilt(torch.tensor(r)[None], unit=unit).numpy() for unit in ("norm", "std"))
    assert literal.mean() == pytest.approx(1.19, abs=0.01) and literal.std() / literal.mean() < 0.02
    assert np.log(used).std() == pytest.approx(1, abs=1e-9) and np.log(used).mean() == pytest.approx(0, abs=1e-9)


def test_tilt_of_several_rewards() -> None:
    """The weight is the mean over rewards. It does not depend on units or, if standardized, on a shift."""
    first, second = tensor(3.0, -4.0), tensor(0.0, 2.0)
    wanted = tensor((math.e + math.exp(-1)) / 2, (math.exp(-1) + math.e) / 2)
    torch.testing.assert_close(reward_tilt(torch.stack([first, second])), wanted, rtol=1e-14, atol=0)
    torch.testing.assert_close(reward_tilt(torch.stack([100 * first + 7, second - 9])), wanted, rtol=1e-12, atol=0)
    literal = tensor((math.exp(0.6) + 1) / 2, (math.exp(-0.8) + math.e) / 2)
    torch.testing.assert_close(reward_tilt(torch.stack([first, second]), unit="norm"), literal, rtol=1e-14, atol=0)


@pytest.mark.parametrize("unit", ["std", "norm"])
def test_no_tilt_without_score_reward_or_strength(unit: Literal["std", "norm"]) -> None:
    """Unscored samples, zero rewards and strength 0 have weight 1."""
    gone = reward_tilt(torch.stack([tensor(3.0, math.nan, 4.0), tensor(1.0, 1.0, 0.0)]), unit=unit)
    kept = reward_tilt(torch.stack([tensor(3.0, 4.0), tensor(1.0, 0.0)]), unit=unit)
    if unit == "norm":
        torch.testing.assert_close(gone[2].item(), (math.exp(0.8) + 1) / 2)
        torch.testing.assert_close(gone[0].item(), (math.exp(0.6) + math.exp(math.sqrt(0.5))) / 2)
    else:
        torch.testing.assert_close(kept.tolist(), [(math.exp(-1) + math.e) / 2] * 2)
        torch.testing.assert_close(
            gone[2].item(), (math.e + math.exp(-math.sqrt(2))) / 2
        )  # second: (1, 1, 0), std sqrt(2) / 3
    assert gone[1] == 1
    assert reward_tilt(torch.zeros(2, 3), unit=unit).tolist() == [1, 1, 1]
    assert reward_tilt(torch.full((1, 3), math.nan), unit=unit).tolist() == [1, 1, 1]
    assert reward_tilt(tensor(3.0, -4.0)[None], 0.0, unit).tolist() == [1, 1]


def test_the_cosine_falls_from_one_to_zero_and_stays_there() -> None:
    golden = [1.0, 0.853553390593274, 0.5, 0.146446609406726, 0.0, 0.0]
    assert [cosine_anneal(step, 400) for step in (0, 100, 200, 300, 400, 10**6)] == pytest.approx(golden, abs=1e-15)
    assert cosine_anneal(0, 0) == cosine_anneal(7, 0) == 0.0


def test_the_beta_of_dynars_goes_from_its_shape_to_the_uniform() -> None:
    assert annealed_shape(4.0, 1.5, 1.0) == (4.0, 1.5)
    assert annealed_shape(4.0, 1.5, 0.5) == (2.5, 1.25)
    assert annealed_shape(4.0, 1.5, 0.0) == (1.0, 1.0)


SHAPES = (1.0, 1.001, 1.1, 1.5, 4.0, 30.0, 1000.0)
DRAWS = (2.0**-24, 1e-5, 0.01, 0.3, 0.77, 0.999, 1 - 2.0**-24)
"""From the smallest to the largest uniform draw of ``SampleRng``."""


@pytest.mark.parametrize("a", SHAPES)
@pytest.mark.parametrize("b", SHAPES)
def test_beta_quantiles_match_mpmath(a: float, b: float) -> None:
    """The distribution function of an independent library lies below u one millionth to the left, above it to the right."""
    mpmath = pytest.importorskip("mpmath")
    for u, t in zip(DRAWS, beta_quantile(tensor(*DRAWS), a, b).tolist(), strict=True):
        below, above = (mpmath.betainc(a, b, 0, x, regularized=True) for x in (max(t - 1e-6, 0), min(t + 1e-6, 1)))
        assert below <= u <= above, (u, t)


def test_quantiles_of_the_beta_that_have_a_formula() -> None:
    u = torch.linspace(2**-24, 1 - 2**-24, 3001, dtype=torch.float64)
    torch.testing.assert_close(beta_quantile(u, 4.0, 1.0), u ** (1 / 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(beta_quantile(u, 1.0, 1.5), 1 - (1 - u) ** (1 / 1.5), rtol=0, atol=1e-6)
    t = beta_quantile(u, 2.0, 2.0)
    torch.testing.assert_close(t**2 * (3 - 2 * t), u, rtol=0, atol=1.5e-6)  # the density is at most 1.5


def test_beta_quantiles_invert_the_cdf() -> None:
    # Beta(4, 1.5) with t = 1 - s^2: the density becomes (1 - s^2)^3 s^2, a polynomial with this integral from s to 1
    def below(t: Tensor) -> Tensor:
        def primitive(s: Tensor) -> Tensor:
            return s**3 / 3 - 3 * s**5 / 5 + 3 * s**7 / 7 - s**9 / 9

        one = torch.ones((), dtype=torch.float64)
        return (primitive(one) - primitive((1 - t).sqrt())) / primitive(one)

    u = torch.linspace(0.0005, 0.9995, 400, dtype=torch.float64)
    torch.testing.assert_close(below(beta_quantile(u, 4.0, 1.5)), u, rtol=0, atol=2.2e-6)  # the density is at most 2.2
    assert beta_quantile(tensor(0.5), 4.0, 1.5).item() == pytest.approx(0.7561355609542169, abs=1e-6)


def test_uniform_beta_and_poles() -> None:
    """Beta(1, 1) returns the draw itself; a pole is an error."""
    u = torch.rand(50)
    assert torch.equal(beta_quantile(u, 1.0, 1.0), u)
    t = beta_quantile(torch.tensor([2.0**-24, 0.5, 1 - 2.0**-24]), 4.0, 1.5)
    assert t.dtype == torch.float32 and ((t > 0) & (t <= 1)).all()
    with pytest.raises(ValueError, match="a >= 1 and b >= 1"):
        beta_quantile(u, 0.5, 1.0)
