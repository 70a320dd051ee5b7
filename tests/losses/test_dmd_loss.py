"""DMD's gradient, its regression form and the fake score's denoising loss, against independent numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gdmd.losses.denoising import denoising_loss, mean_square
from gdmd.losses.dmd import dmd_gradient, dmd_loss, normalizer
from gdmd.losses.gdmd import implicit_target
from gdmd.types import Prediction

SHAPE = (4, 2, 3, 3)


def three() -> tuple[Tensor, Tensor, Tensor]:
    """x0, x0_real, x0_fake: [4, 2, 3, 3] float64, samples of very different scale."""
    x0, x0_real, x0_fake = torch.randn(3, *SHAPE, dtype=torch.float64)
    scale = torch.tensor([0.01, 1.0, 10.0, 100.0], dtype=torch.float64)[:, None, None, None]
    return x0, x0 + scale * x0_real, x0 + scale * x0_fake


def test_gradient_is_the_normalized_score_difference() -> None:
    """(x0_fake - x0_real) / n, per sample."""
    x0, x0_real, x0_fake = three()
    a, b, c = x0.numpy(), x0_real.numpy(), x0_fake.numpy()
    wanted = np.stack([(c[i] - b[i]) / np.sum(np.abs(a[i] - b[i])) * a[i].size for i in range(len(a))])
    np.testing.assert_allclose(dmd_gradient(x0, x0_real, x0_fake).numpy(), wanted, rtol=1e-12)


def test_gradient_without_normalizer() -> None:
    """x0_fake - x0_real."""
    x0, x0_real, x0_fake = three()
    raw = dmd_gradient(x0, x0_real, x0_fake, normalize=False)
    assert torch.equal(raw, x0_fake - x0_real) and torch.equal(implicit_target(x0, raw), x0 - (x0_fake - x0_real))


def test_the_normalizer_is_per_sample_and_broadcasts() -> None:
    x0, x0_real, _ = three()
    n = normalizer(x0, x0_real)
    assert n.shape == (4, 1, 1, 1)
    other = x0_real.clone()
    other[1:] += 5
    assert torch.equal(normalizer(x0, other)[0], n[0])


def test_the_normalized_gradient_does_not_depend_on_units() -> None:
    x0, x0_real, x0_fake = three()
    torch.testing.assert_close(dmd_gradient(7 * x0, 7 * x0_real, 7 * x0_fake), dmd_gradient(x0, x0_real, x0_fake))


def test_a_teacher_that_reproduces_x0_gives_a_finite_gradient() -> None:
    x0 = torch.randn(SHAPE)
    assert torch.equal(dmd_gradient(x0, x0, x0), torch.zeros(SHAPE))
    assert dmd_gradient(x0, x0, x0 + 1e-7).isfinite().all()


def test_fake_equal_to_teacher_is_the_fixed_point() -> None:
    x0, x0_real, _ = three()
    assert not dmd_gradient(x0, x0_real, x0_real).any()


def test_the_gradient_of_the_dmd_loss_is_two_grad_over_the_size() -> None:
    x0, x0_real, x0_fake = three()
    grad = dmd_gradient(x0, x0_real, x0_fake)
    x = x0.clone().requires_grad_()
    dmd_loss(x, implicit_target(x, grad)).sum().backward()
    torch.testing.assert_close(x.grad, 2 * grad / x0[0].numel(), rtol=1e-9, atol=1e-12)


def test_loss_is_a_mean_without_a_half() -> None:
    """|| x0 - x_tar ||^2 is a mean over C, H, W, and x_tar a constant."""
    x0 = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
    x_tar = torch.full(SHAPE, 3.0, dtype=torch.float64, requires_grad=True)
    loss = dmd_loss(x0, x_tar)
    assert loss.tolist() == [9.0] * 4
    loss.sum().backward()
    assert x_tar.grad is None and x0.grad is not None


def test_target_carries_no_gradient() -> None:
    """Neither dmd_gradient nor implicit_target has a graph."""
    x0, x0_real, x0_fake = (x.requires_grad_() for x in three())
    grad = dmd_gradient(x0, x0_real, x0_fake)
    assert not grad.requires_grad and not implicit_target(x0, grad).requires_grad


def test_mean_square_is_the_mean_over_all_but_the_batch() -> None:
    x = torch.arange(12.0).reshape(2, 1, 2, 3)
    np.testing.assert_allclose(mean_square(x).numpy(), (x.numpy().reshape(2, -1) ** 2).mean(1))


@pytest.mark.parametrize("kind", ["x0", "eps", "velocity"])
def test_denoising_loss_kinds(kind: str) -> None:
    """0 at the truth; each kind counts only its own error."""
    x0, eps = torch.randn(2, *SHAPE, dtype=torch.float64)
    assert not denoising_loss(Prediction(x0, eps), x0, eps, kind).any()
    off = {"x0": (2.0, 0.0), "eps": (0.0, 2.0), "velocity": (1.0, 3.0)}[kind]
    wrong = Prediction(x0 + off[0], eps + off[1])
    torch.testing.assert_close(denoising_loss(wrong, x0, eps, kind), torch.full((4,), 4.0, dtype=torch.float64))


def test_the_denoising_loss_moves_the_prediction_only() -> None:
    x0, eps = (torch.randn(SHAPE, requires_grad=True) for _ in range(2))
    answer = torch.randn(SHAPE, requires_grad=True)
    denoising_loss(Prediction(answer, eps.detach()), x0, eps, "x0").sum().backward()
    assert x0.grad is None and eps.grad is None
    torch.testing.assert_close(answer.grad, 2 * (answer - x0).detach() / x0[0].numel())


def test_an_unknown_denoising_target_is_named() -> None:
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="'x0', 'eps' or 'velocity', got 'v'"):
        denoising_loss(Prediction(x, x), x, x, "v")  # type: ignore[arg-type]
