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
    prompts,
    rng,
    tiny_roles,
    updates,
)
from torch import Tensor

from gdmd.losses.denoising import denoising_loss
from gdmd.methods.scorer import Scorer
from gdmd.types import PromptBatch


def test_rewards_see_clipped_images_without_graph() -> None:
    """Rewards are called without a graph, on fp32 images in [0, 1]."""
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


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_reward_gradients_of_micro_batches_are_those_of_the_whole_batch(micro_batch: int) -> None:
    """With two rewards, one of which leaves a sample unscored; no more than a micro-batch is decoded at once."""
    rewards = [Toy(unscored=(2,)), Toy("green", 1)]
    whole, parts = (Scorer(ToyCodec(), rewards, size) for size in (0, micro_batch))
    latents, batch = torch.randn(4, 8, 8, 8, dtype=torch.float64), prompts()
    loss = lambda scores: scores.square().nansum(0)  # noqa: E731
    for own, other in zip(whole.gradient(latents, batch, loss), parts.gradient(latents, batch, loss), strict=True):
        torch.testing.assert_close(own, other, equal_nan=True)
    for own, other in zip(whole.gradients(latents, batch), parts.gradients(latents, batch), strict=True):
        torch.testing.assert_close(own, other, equal_nan=True)
    assert max(len(shown) for shown in parts.codec.shown) == micro_batch < 5
    torch.testing.assert_close(whole.stats(), parts.stats())


def test_draws_do_not_depend_on_the_batch() -> None:
    """A sample's draws do not depend on the rest of the batch."""
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
def test_fake_loss_on_student_samples(fake_loss: str, target: Any) -> None:
    """The fake score is trained on student samples with the chosen loss."""
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
    method.scores(method.rollout(many, rng(0, many)), rng(0, many), 0)
    assert 0.3 <= seen[0].min() < 0.305 and 0.395 < seen[0].max() <= 0.4
