"""The running scale Z, the mean over rewards and the softmax weights of a group."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gdmd.losses.advantages import RunningScale, softmax_weights
from gdmd.losses.gdmd import optimality
from gdmd.methods.scorer import mean_advantage


def test_z_is_a_bias_corrected_ema_of_std() -> None:
    """Each reward has its own Z."""
    scale, batches = RunningScale(2, decay=0.9), [torch.randn(2, 3, 4, 5) * k for k in (1.0, 5.0, 0.3)]
    for n in range(1, 4):
        z = scale.update(batches[n - 1])
        std = np.stack([b.double().numpy().reshape(2, -1).std(1, ddof=1) for b in batches[:n]])
        weight = 0.9 ** np.arange(n)[::-1]  # the newest weighs most
        np.testing.assert_allclose(z.numpy(), (weight[:, None] * std).sum(0) / weight.sum(), rtol=1e-6)


def test_unscored_values_are_left_out_of_z() -> None:
    scores = torch.tensor([[1.0, math.nan, 3.0, 7.0], [math.nan, 2.0, math.nan, math.nan]])
    z = RunningScale(2).update(scores)
    assert z[0].item() == pytest.approx(np.std([1, 3, 7], ddof=1)) and z[1].item() == 0


def test_a_batch_with_less_than_two_scores_leaves_z_as_it_was() -> None:
    scale = RunningScale(1)
    before = scale.update(torch.tensor([[1.0, 4.0]])).clone()
    assert torch.equal(scale.update(torch.full((1, 6), math.nan)), before)
    assert torch.equal(scale.update(torch.tensor([[9.0, math.nan]])), before)


def test_a_constant_reward_has_scale_zero() -> None:
    assert RunningScale(1).update(torch.full((1, 8), 3.0)).item() == 0


def test_z_about_zero_is_the_root_mean_square() -> None:
    """A single number is enough; unscored values are left out."""
    scale = RunningScale(2, about_zero=True)
    z = scale.update(torch.tensor([[3.0, math.nan, 4.0], [-2.0, math.nan, math.nan]]))
    torch.testing.assert_close(z, torch.tensor([math.sqrt(12.5), 2.0]))
    assert torch.equal(scale.update(torch.full((2, 3), math.nan)), z)


def test_z_includes_the_batch_and_ignores_shifts() -> None:
    """The current batch counts; a shift of the reward does not."""
    scores = torch.randn(1, 4, 8)
    assert RunningScale(1).update(scores).item() == pytest.approx(scores.std().item(), rel=1e-6)
    assert RunningScale(1).update(scores + 1000).item() == pytest.approx(scores.std().item(), rel=1e-3)


def test_a_restored_scale_continues_bit_for_bit() -> None:
    first, batches = RunningScale(3, 0.8), torch.randn(6, 3, 10)
    for batch in batches[:3]:
        first.update(batch)
    saved = {name: value.clone() for name, value in first.state().items()}
    second = RunningScale(3, 0.8)
    second.load(saved)
    assert torch.equal(first.value(), second.value())
    for batch in batches[3:]:
        assert torch.equal(first.update(batch), second.update(batch))
    assert torch.equal(first.mean, second.mean) and torch.equal(first.weight, second.weight)


def test_rewards_are_normalized_before_the_mean() -> None:
    target, sample = torch.tensor([[[3.0, 1.0]], [[500.0, 300.0]]]), torch.tensor([[2.0, 2.0], [400.0, 400.0]])
    advantage = mean_advantage(target, sample, torch.tensor([2.0, 100.0]))  # [R = 2, E = 1, B = 2]
    torch.testing.assert_close(advantage, torch.tensor([[(0.5 + 1) / 2, (-0.5 - 1) / 2]]))


def test_a_reward_without_scale_contributes_nothing() -> None:
    target, sample = torch.tensor([[[3.0]], [[7.0]]]), torch.tensor([[2.0], [1.0]])
    assert mean_advantage(target, sample, torch.tensor([1.0, 0.0])).item() == 0.5


def test_one_unscored_reward_leaves_the_sample_unscored() -> None:
    target, sample = torch.ones(2, 3, 2), torch.zeros(2, 2)
    target[1, 0, 1] = math.nan
    advantage = mean_advantage(target, sample, torch.ones(2))
    assert advantage.isnan().tolist() == [[False, True], [False, False], [False, False]]
    unscored_sample = torch.tensor([[0.0, math.nan], [0.0, 0.0]])
    assert mean_advantage(torch.ones(2, 3, 2), unscored_sample, torch.zeros(2))[:, 1].isnan().all()


def test_optimality_ignores_affine_changes() -> None:
    """R -> p R + q changes Z alike."""
    targets, samples = torch.randn(5, 2, 4, 8, dtype=torch.float64), torch.randn(5, 2, 8, dtype=torch.float64)
    p, q = torch.tensor([30.0, 0.05]).double(), torch.tensor([-2.0, 6.0]).double()
    plain, moved = RunningScale(2), RunningScale(2)
    for target, sample in zip(targets, samples, strict=True):
        first = mean_advantage(target, sample, plain.update(target))
        other, shown = target * p[:, None, None] + q[:, None, None], sample * p[:, None] + q[:, None]
        second = mean_advantage(other, shown, moved.update(other))
        zero = torch.zeros_like(first)
        torch.testing.assert_close(optimality(second, zero, 1.0), optimality(first, zero, 1.0), rtol=0, atol=1e-6)


def test_softmax_weights_have_mean_one_and_follow_the_advantage() -> None:
    advantage = torch.randn(6, 5)
    weights = softmax_weights(advantage, 2.0)
    torch.testing.assert_close(weights.mean(0), torch.ones(5))
    raw = np.exp(2 * advantage.numpy())
    np.testing.assert_allclose(weights.numpy(), 6 * raw / raw.sum(0), rtol=1e-5)


def test_softmax_weights_ignore_shifts() -> None:
    """They also stay finite for large advantages."""
    advantage = torch.randn(4, 3)
    torch.testing.assert_close(softmax_weights(advantage + 7, 1.5), softmax_weights(advantage, 1.5))
    huge = softmax_weights(torch.tensor([[1e4], [0.0]]), 1.0)
    torch.testing.assert_close(huge, torch.tensor([[2.0], [0.0]]))
    assert torch.equal(softmax_weights(advantage, 0.0), torch.ones(4, 3))


def test_unscored_target_weighs_one() -> None:
    """The others share the rest."""
    advantage = torch.tensor([[math.nan, math.nan], [1.0, math.nan], [0.0, math.nan], [-1.0, math.nan]])
    weights = softmax_weights(advantage, 1.0)
    assert weights[:, 1].tolist() == [1.0] * 4 and weights[0, 0] == 1
    torch.testing.assert_close(weights[1:, 0], softmax_weights(advantage[1:, :1], 1.0)[:, 0])
    assert weights[:, 0].mean().item() == pytest.approx(1)
