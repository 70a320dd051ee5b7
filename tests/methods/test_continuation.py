"""Continuations as scored targets: the rest of the sampler, its cost, and the tilt that its scores give to DMD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_roles import (
    Toy,
    ToyCodec,
    distance,
    first_student,
    gdmd,
    prompts,
    rng,
    same,
    student_gradient,
    tiny_roles,
    train,
    updates,
    watch,
)
from torch import Tensor

from gdmd.config.methods.gdmd import GdmdConfig
from gdmd.diffusion.sampling import backward_simulation, continuation, few_step_sample
from gdmd.diffusion.schedule import FlowSchedule
from gdmd.losses.advantages import softmax_weights
from gdmd.recipes.call_counts import tally
from gdmd.recipes.read import read_recipe
from gdmd.types import Cond, Prediction

STEPS = (1.0, 0.75, 0.5, 0.25)
ON: dict[str, Any] = {
    "score_target": "continuation",
    "continuations": 3,
    "continuation_weight": 1.0,
    "weighting": "softmax",
    "student_target": "mean",
}

EACH = {"student_target": "each"}


class Affine:
    """A student whose x0 depends on every argument, and that counts what it is asked."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        self.calls.append(len(x_t))
        return Prediction(x0=(0.3 + t[:, None, None, None]) * x_t + cond["shift"][:, None, None, None], eps=x_t)


def noise(purpose: str, i: int = 0) -> Tensor:
    seed = sum(map(ord, purpose)) + i
    return torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_roll_out_that_is_stopped_and_continued_is_the_sampler_itself() -> None:
    student, stop = Affine(), torch.tensor([0, 1, 2, 1])
    cond = {"shift": torch.tensor([0.1, 0.2, -0.3, 0.4], dtype=torch.float64)}
    again = lambda i: noise("again", i)  # noqa: E731
    whole = few_step_sample(student, noise("start"), STEPS, cond, again, FlowSchedule())
    x_tau = backward_simulation(student, noise("start"), STEPS, stop, cond, again, FlowSchedule())
    x0 = student(x_tau, torch.tensor(STEPS, dtype=torch.float64)[stop], cond).x0
    student.calls.clear()
    end = continuation(student, x0, stop, STEPS, cond, again, FlowSchedule())
    torch.testing.assert_close(end, whole, rtol=1e-6, atol=1e-6)
    assert sum(student.calls) == sum(3 - s for s in stop.tolist())


def test_the_last_step_is_made_again_from_fresh_noise() -> None:
    student, stop = Affine(), torch.full((4,), 3)
    cond = {"shift": torch.zeros(4, dtype=torch.float64)}
    end = continuation(student, noise("x0"), stop, STEPS, cond, lambda i: noise("again", i), FlowSchedule())
    x_t = 0.75 * noise("x0") + 0.25 * noise("again", 3)
    torch.testing.assert_close(end, (0.3 + 0.25) * x_t, rtol=1e-6, atol=1e-6)
    assert student.calls == [4]


def test_together_the_student_is_called_at_every_step_and_nothing_else_changes() -> None:
    stop, cond = torch.tensor([3, 2, 3, 2]), {"shift": torch.ones(4, dtype=torch.float64)}
    ends, calls = [], []
    for together in (False, True):
        student = Affine()
        again = lambda i: noise("again", i)  # noqa: E731
        ends.append(continuation(student, noise("x0"), stop, STEPS, cond, again, FlowSchedule(), together=together))
        calls.append(student.calls)
    assert torch.equal(*ends) and calls == [[4], [1, 1, 4]]


def test_one_step_has_no_continuation() -> None:
    stop = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="has no step after the first"):
        continuation(Affine(), noise("x0"), stop, (1.0,), {}, lambda i: noise("a"), FlowSchedule())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_steps": [1.0]}, "at least 2 student_steps"),
        ({"continuations": 1}, "2 continuations"),
        ({"scored_guidances": [3.0, 5.0]}, "scored_guidances must be empty"),
        ({"score_baseline": "time"}, "a continuation has no t"),
    ],
)
def test_settings_that_do_not_go_with_continuations_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GdmdConfig.model_validate({"score_target": "continuation", **options})


def test_gamma_zero_is_the_loop_without_continuations() -> None:
    first, second, codec = tiny_roles(), tiny_roles(), ToyCodec()
    plain = train(gdmd(first, gamma=0.0), first)
    assert same(train(gdmd(second, codec=codec, **ON | EACH | {"gamma": 0.0}), second), plain)
    assert not codec.shown
    third = tiny_roles()
    assert distance(train(gdmd(third, **ON | EACH, gamma=4.0), third), plain) > 1e-5


@pytest.mark.parametrize("normalize", [False, True])
def test_the_mean_target_is_dmds_with_the_tilt_of_the_ends(normalize: bool) -> None:
    """x_tar = x0 - (x0_fake - x0_real - kappa (E_w y - E y)) / n, with everything recomputed from the calls."""
    roles, reward = tiny_roles(), Toy()
    how = ON | {"gamma": 2.0, "continuation_weight": 1.5, "group_size": 1, "normalize": normalize}
    method = gdmd(roles, reward, **how)
    with torch.no_grad():
        r = method.rollout(prompts(), rng())
        group = method._continue(r, prompts(), rng())
        assert group.ends is not None
        z = group.score[0].double().std()
        w = torch.softmax(2.0 * group.score[0][0].double() / z, 0)  # [K, B]
        tilt = torch.einsum("kb,bkchw->bchw", w.float(), group.ends) - group.ends.mean(1)
    update = first_student(method, roles)
    other = tiny_roles()
    plain = first_student(gdmd(other, gamma=0.0, group_size=1, normalize=normalize), other)
    moved = update.batch.x_tar[:, 0] - plain.batch.x_tar[:, 0]
    if not normalize:
        torch.testing.assert_close(moved, 1.5 * tilt, rtol=1e-3, atol=1e-4)
    ratio = (moved / (1.5 * tilt)).flatten(1).median(1).values
    torch.testing.assert_close(moved, ratio[:, None, None, None] * 1.5 * tilt, rtol=1e-2, atol=1e-3)
    assert tilt.abs().max() > 1e-3


def test_a_constant_reward_gives_the_update_of_dmd() -> None:
    first, second = tiny_roles(), tiny_roles()
    update = first_student(gdmd(first, Toy(factor=0.0, offset=3.0), **ON | EACH, gamma=4.0), first)
    plain = student_gradient(first_student(gdmd(second, gamma=0.0), second), second)
    torch.testing.assert_close(student_gradient(update, first), plain, rtol=1e-3, atol=1e-5)


def test_shuffled_scores_keep_the_targets_and_change_their_weights() -> None:
    batches = []
    for control in ("none", "shuffled"):
        roles = tiny_roles()
        how = ON | EACH | {"gamma": 2.0, "control": control}
        batches.append(first_student(gdmd(roles, Toy(), **how), roles).batch)
    assert torch.equal(batches[0].x_tar, batches[1].x_tar)
    assert not torch.equal(batches[0].share, batches[1].share)


def test_the_continuations_are_made_once_for_all_draws() -> None:
    roles, codec = tiny_roles(), ToyCodec()
    method = gdmd(roles, codec=codec, **ON, group_size=4)
    diary = watch(roles)
    list(updates(method, roles))
    assert len(codec.shown) == 3
    assert sum(call.name == "teacher" for call in diary) == 4


@pytest.mark.parametrize(("options", "own"), [
    ({}, False),
    ({"weighting": "napo", "student_target": "each"}, True),
    ({"z_source": "difference"}, True),
    ({"control": "shuffled"}, True),
])  # fmt: skip
def test_the_sample_is_decoded_only_where_its_score_moves_a_weight(options: dict[str, Any], own: bool) -> None:
    roles, codec = tiny_roles(), ToyCodec()
    method = gdmd(roles, codec=codec, **ON | options)
    x0 = method.rollout(prompts(), rng()).x0
    list(updates(method, roles))
    assert sum(torch.equal(shown, x0) for shown in codec.shown) == own
    assert ("reward/sample" in method.stats()) == ("reward/gain" in method.stats()) == own
    words = [f"method.{name}={value}" for name, value in options.items()]
    assert tally(read_recipe("shapes_gdmd", words)).decoded == 8 + own


def test_the_weights_are_those_of_scores_measured_from_the_sample() -> None:
    """A softmax over the targets of one sample does not see what they are measured from."""
    roles = tiny_roles()
    method = gdmd(roles, Toy(), Toy("b", 1, factor=3.0), **ON | EACH, gamma=2.0, group_size=1)
    with torch.no_grad():
        r = method.rollout(prompts(), rng())
        (ends,) = method._continue(r, prompts(), rng()).score  # [R, K, B]
        own = method.scorer(r.x0, prompts())  # [R, B]
    gain = (ends - own[:, None]).double() / ends.double().flatten(1).std(1)[:, None, None]
    wanted = 3 * torch.softmax(2.0 * gain.mean(0), 0)  # [K, B]
    share = first_student(method, roles).batch.share
    assert share.std() > 0.05
    torch.testing.assert_close(share.T.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("draws", [1, 2, 4])
def test_z_is_the_spread_of_the_rollouts_however_many_draws_follow_them(draws: int) -> None:
    """Each of the B K scores counts once: sqrt(sum (s - mean)^2 / (B K - 1))."""
    roles = tiny_roles()
    method = gdmd(roles, Toy(), Toy("b", 1, factor=3.0), **ON, group_size=draws)
    with torch.no_grad():
        (scores,) = method._continue(method.rollout(prompts(), rng()), prompts(), rng()).score  # [R, K, B]
    list(updates(method, roles))
    own = scores.double().flatten(1)
    assert own.shape[1] == 4 * 3
    wanted = ((own - own.mean(1, keepdim=True)).square().sum(1) / (own.shape[1] - 1)).sqrt()
    torch.testing.assert_close(method.scale.value(), wanted.float(), rtol=1e-5, atol=0)


def test_the_weighted_ends_estimate_the_score_of_the_tilted_posterior() -> None:
    """y ~ N(m, v), R = a y: E_w y - E y -> gamma v a, which is (sigma^2 / alpha) grad log E exp(gamma R) by Tweedie."""
    g = torch.Generator().manual_seed(0)
    m, v, a, gamma = 0.7, 0.25, 1.3, 0.8
    y = m + v**0.5 * torch.randn(200_000, 1, generator=g, dtype=torch.float64)
    w = softmax_weights(a * y, gamma)
    assert float((w * y).mean() - y.mean()) == pytest.approx(gamma * v * a, rel=0.02)
