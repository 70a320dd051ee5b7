"""Tilted GDMD: finished rollouts, the tilt that their scores give to DMD's target, and the rewards' own gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_roles import (
    Toy,
    ToyCodec,
    first_student,
    gdmd,
    make,
    prompts,
    rng,
    same,
    student_gradient,
    tilted,
    tiny_roles,
    train,
    updates,
    watch,
)
from torch import Tensor

from gdmd.config.load import ConfigError
from gdmd.diffusion.rng import SampleRng
from gdmd.losses.advantages import softmax_weights
from gdmd.methods.gdmd_tilted import Finished, GdmdTilted, weighted_mean
from gdmd.recipes.call_counts import count_calls
from gdmd.recipes.read import read_recipe
from gdmd.recipes.run_folders import config_of
from gdmd.runs.run_folder import create

WEIGHT = 0.25
Z = torch.tensor([0.5, 2.0], dtype=torch.float64)


def finished(method: GdmdTilted) -> Finished:
    return method.finish(method.rollout(prompts(), rng()), prompts(), rng())


@pytest.mark.parametrize("normalize", [False, True])
def test_target_is_dmds_with_the_tilt(normalize: bool) -> None:
    """x_tar = x0 - (x0_fake - x0_real - kappa (E_w y - E y)) / n, with everything recomputed from the calls."""
    roles = tiny_roles()
    method = tilted(roles, gamma=2.0, continuation_weight=1.5, group_size=1, normalize=normalize)
    own = finished(method)
    w = torch.softmax(2.0 * own.scores[0].double() / own.scores[0].double().std(), 0)  # [K, B]
    tilt = torch.einsum("kb,bkchw->bchw", w.float(), own.y) - own.y.mean(1)
    x_tar = first_student(method, roles).batch.x_tar
    other = tiny_roles()
    moved = x_tar - first_student(gdmd(other, gamma=0.0, group_size=1, normalize=normalize), other).batch.x_tar
    if not normalize:
        torch.testing.assert_close(moved, 1.5 * tilt, rtol=1e-3, atol=1e-4)
    ratio = (moved / (1.5 * tilt)).flatten(1).median(1).values
    torch.testing.assert_close(moved, ratio[:, None, None, None] * 1.5 * tilt, rtol=1e-2, atol=1e-3)
    assert tilt.abs().max() > 1e-3


def test_constant_reward_follows_the_mean_dmd_target() -> None:
    first, second = tiny_roles(), tiny_roles()
    update = first_student(tilted(first, Toy(factor=0.0, offset=3.0), gamma=4.0, group_size=1), first)
    plain = student_gradient(first_student(gdmd(second, gamma=0.0, group_size=1), second), second)
    torch.testing.assert_close(student_gradient(update, first), plain, rtol=1e-3, atol=1e-5)


def test_unscored_sample_follows_the_dmd_target() -> None:
    x_tar = []
    for reward in (Toy(unscored=(2,)), Toy(factor=0.0), Toy()):
        roles = tiny_roles()
        x_tar.append(first_student(tilted(roles, reward), roles).batch.x_tar)
    torch.testing.assert_close(x_tar[0][2], x_tar[1][2], rtol=1e-4, atol=1e-5)
    assert (x_tar[2][2] - x_tar[1][2]).abs().max() > 1e-2


def test_rollouts_are_finished_once_for_all_draws() -> None:
    roles, codec = tiny_roles(), ToyCodec()
    method = tilted(roles, codec=codec, group_size=4)
    diary = watch(roles)
    x_tar = [update.batch.x_tar for update in updates(method, roles, role="student")]
    assert len(codec.shown) == 3  # x0 itself is not scored
    assert sum(call.name == "teacher" for call in diary) == 4
    assert len(x_tar) == 4 and all(one is x_tar[0] for one in x_tar)
    assert count_calls(read_recipe("shapes_gdmd")).decoded == 8
    assert count_calls(read_recipe("shapes_gdmd", ["method.kind=gdmd_tilted_shuffled"])).decoded == 9


def test_extra_fake_updates_come_before_the_targets() -> None:
    """Each with its own noise on the same rollout; the target uses the fake score after these updates."""
    roles = tiny_roles()
    method = tilted(roles, group_size=1, extra_fake_updates=2)
    found = list(updates(method, roles))
    assert [update.role for update in found] == ["fake", "fake", "fake", "student"]
    fake = [update.batch for update in found[:3]]
    assert all(batch.x0 is fake[0].x0 for batch in fake)
    assert len({float(batch.eps.sum()) for batch in fake}) == len({tuple(batch.t.tolist()) for batch in fake}) == 3
    other = tiny_roles()
    plain = first_student(tilted(other, group_size=1), other).batch.x_tar
    assert (found[3].batch.x_tar - plain).abs().max() > 1e-4


def test_weights_equal_those_of_scores_relative_to_the_sample() -> None:
    """Subtracting the sample's own score from all its targets does not change their softmax."""
    roles = tiny_roles()
    method = tilted(roles, Toy(), Toy("b", 1, factor=3.0), gamma=2.0, group_size=1)
    r = method.rollout(prompts(), rng())
    ends = method.finish(r, prompts(), rng())
    gain = (ends.scores - method.scorer(r.x0, prompts())[:, None]).double()
    gain = gain / ends.scores.double().flatten(1).std(1)[:, None, None]
    wanted = 3 * torch.softmax(2.0 * gain.mean(0), 0)  # [K, B]
    weights = method.weigh(ends, r, prompts(), rng())
    assert weights.std() > 0.05
    torch.testing.assert_close(weights[0].double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("draws", [1, 2, 4])
def test_z_is_the_spread_of_the_rollouts(draws: int) -> None:
    """Each of the B K scores counts once, however many draws follow: sqrt(sum (s - mean)^2 / (B K - 1))."""
    roles = tiny_roles()
    method = tilted(roles, Toy(), Toy("b", 1, factor=3.0), group_size=draws)
    own = finished(method).scores.double().flatten(1)
    list(updates(method, roles))
    assert own.shape[1] == 4 * 3
    torch.testing.assert_close(method.scale.value(), own.std(1).float(), rtol=1e-5, atol=0)


def test_weights_are_logged() -> None:
    """The log has their mean and the effective number of targets."""
    roles, count = tiny_roles(), 3 * 3
    for gamma, low, high in ((1e-6, count - 0.01, count + 0.01), (1e6, 3.0, 3.6)):
        method = tilted(roles, gamma=gamma)
        first_student(method, roles)
        assert method.stats()["weight/mean"].item() == pytest.approx(1)
        assert low <= method.stats()["weight/effective"].item() <= high


def test_weighted_mean_is_that_of_float64() -> None:
    targets, weights = torch.randn(3, 4, 5, 2, 8, 8), torch.rand(3, 5, 4)  # [eta, B, K, C, H, W], [eta, K, B]
    wanted = torch.einsum("ebkchw,ekb->bchw", targets.double(), weights.double())
    wanted = wanted / weights.double().sum((0, 1))[:, None, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        found = weighted_mean(list(targets), weights)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)  # 15 terms of size 4: 4e-6


def test_tilt_estimates_the_score_of_the_tilted_posterior() -> None:
    """y ~ N(m, v), R = a y: E_w y - E y -> gamma v a, which is (sigma^2 / alpha) grad log E exp(gamma R) by Tweedie."""
    g = torch.Generator().manual_seed(0)
    m, v, a, gamma = 0.7, 0.25, 1.3, 0.8
    y = m + v**0.5 * torch.randn(200_000, 1, generator=g, dtype=torch.float64)
    w = softmax_weights(a * y, gamma)
    assert float((w * y).mean() - y.mean()) == pytest.approx(gamma * v * a, rel=0.02)


def targets(weight: float, *rewards: Toy, scale: Tensor | None = Z, normalize: bool = False) -> tuple[Tensor, Finished]:
    """x_tar of the first student update, and the finished rollouts; Z is set to ``scale`` before."""
    roles = tiny_roles()
    method = tilted(roles, *rewards, group_size=1, gamma=1.0, normalize=normalize, reward_gradient=weight)
    if scale is not None:
        one = torch.ones(len(rewards), dtype=torch.float64)
        method.scale.mean, method.scale.weight = scale[: len(rewards)].clone(), one
    return first_student(method, roles).batch.x_tar, finished(method)


def by_hand(y: Tensor, channel: int, factor: float) -> Tensor:
    """d / dy of factor x mean over pixels of sigmoid(y_channel)."""
    own = torch.zeros_like(y)
    bright = torch.sigmoid(y[:, channel])
    own[:, channel] = factor * bright * (1 - bright) / y[0, channel].numel()
    return own


def test_target_moves_up_the_reward_gradient() -> None:
    """w N / 2 x mean over the first two rollouts of d/dy mean_k R_k / Z_k."""
    rewards = (Toy(), Toy("other", 1, factor=3.0))
    plain, _ = targets(0.0, *rewards)
    moved, own = targets(WEIGHT, *rewards)
    y = own.y.double()
    each = [0.5 * (by_hand(y[:, k], 0, 1.0) / Z[0] + by_hand(y[:, k], 1, 3.0) / Z[1]) for k in (0, 1)]
    want = WEIGHT * y[0, 0].numel() / 2 * (each[0] + each[1]) / 2
    assert want.abs().max() > 0.05
    torch.testing.assert_close((moved - plain).double(), want, rtol=1e-4, atol=1e-5)


def test_normalizer_also_divides_the_reward_gradient() -> None:
    free = targets(WEIGHT, Toy())[0] - targets(0.0, Toy())[0]
    divided = targets(WEIGHT, Toy(), normalize=True)[0] - targets(0.0, Toy(), normalize=True)[0]
    n = (free.flatten(1).norm(dim=1) / divided.flatten(1).norm(dim=1))[:, None, None, None]
    torch.testing.assert_close(divided * n, free, rtol=1e-3, atol=1e-5)
    assert n.std() > 0  # each sample has its own


def test_loss_gradient_is_that_of_a_reward_loss() -> None:
    """d/dx0 of the mean square to the moved target = that of DMD minus w x the reward's gradient."""
    (plain, _), (moved, own) = targets(0.0, Toy()), targets(WEIGHT, Toy())
    x0 = torch.zeros_like(plain).requires_grad_()
    grads = [torch.autograd.grad((x0 - one).square().flatten(1).mean(1).sum(), x0)[0] for one in (plain, moved)]
    gradient = (by_hand(own.y[:, 0], 0, 1.0) + by_hand(own.y[:, 1], 0, 1.0)) / 2 / Z[0]
    torch.testing.assert_close(grads[0] - grads[1], WEIGHT * gradient.float(), rtol=1e-3, atol=1e-6)


def test_no_reward_gradient_without_scores_or_z() -> None:
    plain, _ = targets(0.0, Toy(unscored=(2,)))
    moved, _ = targets(WEIGHT, Toy(unscored=(2,)))
    still = [torch.equal(moved[i], plain[i]) for i in range(4)]
    assert still == [False, False, True, False] and moved.isfinite().all()
    assert torch.equal(targets(WEIGHT, Toy(), scale=None)[0], targets(0.0, Toy(), scale=None)[0])


def test_two_rollouts_are_differentiated() -> None:
    """Score and gradient of a rollout come from one decoding."""
    roles, codec = tiny_roles(), ToyCodec()
    list(updates(tilted(roles, codec=codec, reward_gradient=WEIGHT), roles))
    assert [latents.requires_grad for latents in codec.shown] == [True, True, False]
    counted = count_calls(read_recipe("shapes_gdmd", ["method.reward_gradient=0.1"]))
    assert (counted.decoded_with_grad, counted.decoded) == (2, 6)


class OnlyFirstNoise(SampleRng):
    """Fails when a rollout asks for fresh noise."""

    def normal(self, purpose: str, shape: tuple[int, ...], i: int = 0) -> Tensor:
        assert purpose != "rollout"
        return super().normal(purpose, shape, i)


def test_deterministic_student_draws_noise_once_per_continuation() -> None:
    """Its rollout depends on the first noise only; its K finished rollouts differ by the draw of the next step."""
    method = tilted(tiny_roles(), student_sampler="ode")
    draws = OnlyFirstNoise(11, 0, prompts().index)
    y = method.finish(method.rollout(prompts(), draws), prompts(), draws).y  # [B, K, C, H, W]
    assert (y[:, 0] - y[:, 1]).abs().flatten(1).amax(1).min() > 0.01
    with pytest.raises(AssertionError):
        tilted(tiny_roles()).rollout(prompts(), draws)


def test_reward_gradient_zero_is_off() -> None:
    runs = []
    for own in ({}, {"reward_gradient": 0.0}, {"reward_gradient": WEIGHT}):
        roles = tiny_roles()
        runs.append(train(tilted(roles, **own), roles, steps=3))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_reward_gradient_needs_differentiable_rewards() -> None:
    box = Toy("box", differentiable=False)
    with pytest.raises(
        ValueError, match="gdmd_tilted with reward_gradient back-propagates its rewards, and box is not"
    ):
        tilted(tiny_roles(), box, reward_gradient=WEIGHT)
    tilted(tiny_roles(), box)
    tilted(tiny_roles(), box, reward_gradient=WEIGHT, gamma=0.0)  # no reward is used at all


@pytest.mark.parametrize(("options", "message"), [
    ({"student_steps": [1.0]}, "at least 2 student_steps"),
    ({"continuations": 1}, "greater than or equal to 2"),
])  # fmt: skip
def test_rollouts_need_two_steps_and_two_continuations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make("gdmd_tilted", tiny_roles(), **options)


@pytest.mark.parametrize(("kind", "options", "advice"), [
    ("gdmd", {"score_target": "continuation"}, "write kind: gdmd_tilted, without score_target"),
    ("gdmd", {"score_target": "continuation", "control": "shuffled"}, "control is kind: gdmd_tilted_shuffled"),
    ("gdmd", {"control": "constant"}, "use kind: gdmd_ablation with control constant"),
    ("gdmd", {"z_decay": 0.9, "scored_guidances": [1.0]}, "scored_guidances was removed: .*; z_decay was removed: "),
    ("gdmd", {"score_target": "raw", "z_source": "scores"}, "raw is scored_step: 1 .*; z_source was removed: kind gdmd"),
    ("gdmd_ablation", {"weighting": "napo"}, "weighting was removed"),
    ("gdmd_tilted", {"student_target": "mean"}, "kind gdmd_tilted one mean target"),
])  # fmt: skip
def test_removed_options_name_what_to_use(kind: str, options: dict[str, Any], advice: str) -> None:
    with pytest.raises(ValidationError, match=advice):
        make(kind, tiny_roles(), **options)


def test_run_of_an_older_version_names_what_to_use(tmp_path: Path) -> None:
    old = {
        "kind": "gdmd",
        "score_target": "continuation",
        "weighting": "softmax",
        "student_target": "mean",
        "z_decay": 0.99,
    }
    create(tmp_path / "run", {"name": "x", "method": old, "loop": {"steps": 2}})
    with pytest.raises(ConfigError, match="method: score_target 'continuation' is a separate method now; write kind"):
        config_of(tmp_path / "run")
