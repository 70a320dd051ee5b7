"""Where gradients go, and that a loss is one deterministic number per sample that may be cut into micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_roles import (
    Toy,
    ToyCodec,
    cut,
    dmd,
    gdmd,
    prompts,
    rng,
    student_gradient,
    tiny_roles,
    updates,
)
from torch import Tensor

from gdmd.losses.denoising import denoising_loss
from gdmd.methods.scorer import Scorer
from gdmd.shapes.roles import ShapesRoles
from gdmd.types import PromptBatch, Update

VARIANTS: list[dict[str, Any]] = [
    {},
    {"gamma": 0.0},
    {"weighting": "softmax", "scored_guidances": (1.0, 4.0)},
    {"weighting": "softmax", "score_target": "continuation", "continuations": 2},
    {"weighting": "softmax", "score_target": "continuation", "continuations": 2, "reward_gradient": 0.1},
    {"old_policy": "ema"},
    {"control": "indicator"},
    {"step_draw": "batch", "fake_loss": "x0"},
]


def nets(roles: ShapesRoles) -> dict[str, list[Tensor]]:
    """Every parameter by network, all asking for gradients so that a leak would show."""
    found = {name: list(getattr(roles, name).net.parameters()) for name in ("student", "fake", "teacher", "old")}
    for parameters in found.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    return found


@pytest.mark.parametrize("options", VARIANTS)
def test_an_update_sends_gradient_to_its_own_role_only(options: dict[str, Any]) -> None:
    roles, codec, reward = tiny_roles(), ToyCodec(), Toy()
    found = nets(roles)
    for update in updates(gdmd(roles, reward, codec=codec, **options), roles):
        update.loss(update.batch).per_sample.mean().backward()
        reached = {name for name, own in found.items() if any(p.grad is not None for p in own)}
        assert reached == {update.role}
        assert all(p.grad is not None and p.grad.isfinite().all() for p in found[update.role])
        assert codec.gain.grad is None and reward.gain.grad is None
        for parameter in found[update.role]:
            parameter.grad = None


@pytest.mark.parametrize("options", VARIANTS)
def test_batches_hold_no_graph(options: dict[str, Any]) -> None:
    roles = tiny_roles()
    nets(roles)
    for update in updates(gdmd(roles, **options), roles):
        assert not any(value.requires_grad for value in vars(update.batch).values() if isinstance(value, Tensor))


def test_rewards_are_scored_without_a_graph_on_pictures_in_zero_to_one() -> None:
    seen = []

    class Spy(Toy):
        def score(self, images: Tensor, batch: PromptBatch) -> Tensor:
            seen.append((torch.is_grad_enabled(), images.min().item(), images.max().item(), images.dtype))
            return super().score(images, batch)

    class Loud(ToyCodec):
        def decode(self, latents: Tensor) -> Tensor:
            return (10 * latents[:, :3]).bfloat16()

    latents = torch.randn(4, 8, 8, 8, requires_grad=True)
    scores = Scorer(Loud(), [Spy()])(latents, prompts())
    assert seen == [(False, 0.0, 1.0, torch.float32)] and not scores.requires_grad and scores.shape == (1, 4)


def test_a_reward_of_the_wrong_shape_is_named() -> None:
    class Flat(Toy):
        def score(self, images: Tensor, batch: PromptBatch) -> Tensor:
            return images.mean((2, 3))

    with pytest.raises(ValueError, match=r"'brightness' returned shape \[4, 3\] for 4 images"):
        Scorer(ToyCodec(), [Flat()])(torch.randn(4, 8, 8, 8), prompts())


@pytest.mark.parametrize("options", VARIANTS)
def test_micro_batches_are_the_whole_batch(options: dict[str, Any]) -> None:
    roles = tiny_roles()
    for update in updates(gdmd(roles, Toy(unscored=(1,)), **options), roles):
        whole = update.loss(update.batch)
        parts = [update.loss(cut(update.batch, k, k + 1)) for k in range(4)]
        torch.testing.assert_close(torch.cat([p.per_sample for p in parts]), whole.per_sample, rtol=1e-4, atol=1e-6)
        for name, value in whole.stats.items():
            own = torch.cat([part.stats[name] for part in parts])
            torch.testing.assert_close(own, value, rtol=1e-4, atol=1e-6, equal_nan=True)
        if update.role == "student":
            cuts = [Update("student", update.loss, cut(update.batch, k, k + 1)) for k in range(4)]
            mean = torch.stack([student_gradient(part, roles) for part in cuts]).mean(0)
            torch.testing.assert_close(mean, student_gradient(update, roles), rtol=1e-3, atol=1e-5)


def test_a_loss_is_deterministic_and_uses_no_global_randomness() -> None:
    roles = tiny_roles()
    for update in updates(gdmd(roles), roles):
        before = torch.random.get_rng_state()
        first = update.loss(update.batch).per_sample
        assert torch.equal(update.loss(update.batch).per_sample, first)
        assert torch.equal(torch.random.get_rng_state(), before)


def test_losses_and_statistics_are_one_number_per_sample() -> None:
    roles = tiny_roles()
    for update in updates(gdmd(roles), roles):
        loss = update.loss(update.batch)
        assert loss.per_sample.shape == (4,) and loss.per_sample.dtype is torch.float32
        assert all(value.shape == (4,) and not value.requires_grad for value in loss.stats.values())


def test_the_draws_of_a_sample_do_not_depend_on_the_rest_of_the_batch() -> None:
    batch, half = prompts(), prompts()
    half = PromptBatch(batch.index[2:], batch.text[2:], batch.group[2:], cut(batch.cond, 2, 4), cut(batch.uncond, 2, 4))
    method = dmd(tiny_roles())
    whole, part = method.rollout(batch, rng(0, batch)), method.rollout(half, rng(0, half))
    assert torch.equal(whole.tau[2:], part.tau)
    torch.testing.assert_close(whole.x_tau[2:], part.x_tau, rtol=1e-5, atol=1e-5)
    one, two = method.fake_batch(whole, rng(0, batch), 1), method.fake_batch(part, rng(0, half), 1)
    assert torch.equal(one.t[2:], two.t) and torch.equal(one.eps[2:], two.eps)


def test_the_step_is_drawn_per_sample_or_once_for_the_batch() -> None:
    many = prompts(("a circle",) * 64)
    roles = tiny_roles()
    assert len(dmd(roles).rollout(many, rng(0, many)).tau.unique()) == 4
    once = [dmd(roles, step_draw="batch").rollout(many, rng(k, many)).tau.unique() for k in range(12)]
    assert all(len(tau) == 1 for tau in once) and len(torch.cat(once).unique()) > 1


@pytest.mark.parametrize(("fake_loss", "target"), [("native", "velocity"), ("x0", "x0")])
def test_the_fake_is_trained_on_samples_of_the_student_with_the_chosen_loss(fake_loss: str, target: Any) -> None:
    roles = tiny_roles()
    method = dmd(roles, fake_loss=fake_loss)
    r = method.rollout(prompts(), rng())
    update = next(updates(method, roles))
    batch = update.batch
    assert torch.equal(batch.x0, r.x0)
    t = batch.t[:, None, None, None]
    torch.testing.assert_close(batch.x_t, (1 - t) * r.x0 + t * batch.eps)
    wanted = denoising_loss(roles.fake(batch.x_t, batch.t, batch.cond), batch.x0, batch.eps, target)
    assert update.role == "fake" and torch.equal(update.loss(batch).per_sample, wanted)


def test_renoise_times_stay_in_their_interval() -> None:
    many = prompts(("a circle",) * 256)
    roles, seen = tiny_roles(), []
    teacher = roles.teacher
    roles.teacher = lambda x, t, c: (seen.append(t), teacher(x, t, c))[1]  # type: ignore[assignment]
    method = dmd(roles, renoise_low=0.3, renoise_high=0.4)
    method.scores(method.rollout(many, rng(0, many)), rng(0, many), 0, both=False)
    assert 0.3 <= seen[0].min() < 0.305 and 0.395 < seen[0].max() <= 0.4
