"""DMD + ReFL, + NFT and + GRPO: plain DMD at weight 0, what each reads and moves, and what changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_roles import (
    Toy,
    ToyCodec,
    apply,
    dmd,
    make,
    plain_dmd,
    rng,
    same,
    student_gradient,
    tiny_roles,
    watch,
    weights,
)
from torch import Tensor

from gdmd.config.methods.all import MethodConfig, without_rewards
from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.methods.dmd_reward import DMDGRPOConfig, DMDNFTConfig, DMDReFLConfig
from gdmd.config.run import RunConfig
from gdmd.data.prompts import batch_of
from gdmd.diffusion.schedule import renoise
from gdmd.losses.advantages import group_advantage
from gdmd.losses.dmd import dmd_loss
from gdmd.methods.rollouts import collect, step_log_prob
from gdmd.shapes.roles import LATENT_SHAPE, ShapesRoles, ShapesTextEncoder
from gdmd.types import Denoiser, Method, PromptBatch, Reward, Schedule, Update

KINDS = ["dmd_refl", "dmd_nft", "dmd_grpo"]
BLACK_BOX = ["dmd_nft", "dmd_grpo"]
UPDATES = {"fake_updates": 3, "student_updates": 2}
TEXTS = ("a circle",) * 3 + ("a red square",) * 3
GROUP = torch.tensor([4, 4, 4, 9, 9, 9])


def baseline(kind: str, roles: ShapesRoles, *rewards: Reward, codec: ToyCodec | None = None, **options: Any) -> Any:
    return make(kind, roles, *rewards, codec=codec, **{**UPDATES, **options})


def grouped() -> PromptBatch:
    """Six samples of two prompts."""
    return batch_of(TEXTS, ShapesTextEncoder(), group=GROUP)


def run(method: Method, roles: ShapesRoles, step: int = 0, role: str = "student") -> Iterator[Update]:
    """The updates of one role in one iteration, each handed out before it is applied."""
    batch = grouped()
    for update in method.iteration(step, batch, rng(step, batch)):
        if update.role == role:
            yield update
        apply(update, roles)


def train(method: Method, roles: ShapesRoles, steps: int = 2, start: int = 0) -> dict[str, Tensor]:
    for step in range(start, start + steps):
        list(run(method, roles, step))
    return weights(roles)


def policy(roles: ShapesRoles) -> tuple[Denoiser, Schedule]:
    """The student as the policy that samples."""
    return roles.student, roles.schedule


@pytest.mark.parametrize("kind", BLACK_BOX)
def test_permuting_the_samples_permutes_their_advantages(kind: str) -> None:
    roles, batch, order = tiny_roles(), grouped(), torch.tensor([5, 0, 3, 2, 4, 1])
    method = baseline(kind, roles)
    texts = tuple(TEXTS[k] for k in order)
    mixed = batch_of(texts, ShapesTextEncoder(), order, GROUP[order])
    one, two = (
        collect(*policy(roles), method.scorer, method.cfg, own, rng(0, own), LATENT_SHAPE).advantage
        for own in (batch, mixed)
    )
    torch.testing.assert_close(two, one[order], rtol=1e-3, atol=1e-4)
    assert one.std() > 0.1


@pytest.mark.parametrize("kind", BLACK_BOX)
def test_samples_are_compared_inside_their_group_by_the_integer_id(kind: str) -> None:
    roles, batch, codec = tiny_roles(), grouped(), ToyCodec()
    method = baseline(kind, roles, Toy(), codec=codec)
    collected = collect(*policy(roles), method.scorer, method.cfg, batch, rng(0, batch), LATENT_SHAPE)
    assert torch.equal(codec.shown[-1], collected.trajectory.x0)
    reward = Toy().score(codec.decode(codec.shown[-1]), batch).detach()
    torch.testing.assert_close(collected.advantage, group_advantage(reward, GROUP))
    alone = batch_of(TEXTS, ShapesTextEncoder())  # same texts, other groups
    lonely = collect(*policy(roles), method.scorer, method.cfg, alone, rng(0, alone), LATENT_SHAPE)
    assert torch.equal(lonely.advantage, torch.zeros(6))


def test_refl_backpropagates_the_reward() -> None:
    """Through decoder and reward into the student step."""
    roles, codec, rewards = tiny_roles(), ToyCodec(), (Toy(), Toy("other", 2, factor=3.0))
    update = next(run(baseline("dmd_refl", roles, *rewards, codec=codec, rl_weight=0.5, margin=0.9), roles))

    def wanted(batch: Any) -> Tensor:
        x0 = roles.student(batch.x_tau, batch.tau, batch.cond).x0
        images = codec.decode(x0)
        hinge = torch.stack([(0.9 - reward.score(images, batch.prompts)).relu() for reward in rewards]).mean(0)
        return dmd_loss(x0, batch.x_tar) + 0.5 * hinge

    torch.testing.assert_close(update.loss(update.batch).per_sample, wanted(update.batch))
    gradient = student_gradient(update, roles)
    torch.testing.assert_close(gradient, student_gradient(update, roles, wanted), rtol=1e-4, atol=1e-6)
    assert (gradient - student_gradient(update, roles, lambda batch: plain_dmd(roles, batch))).abs().max() > 1e-4


def test_refl_leaves_images_above_the_margin_to_dmd() -> None:
    first, second = tiny_roles(), tiny_roles()
    wanted = train(dmd(first, **UPDATES), first)
    assert same(train(baseline("dmd_refl", second, Toy(offset=5.0), margin=0.7), second), wanted)


def test_refl_refuses_a_black_box_reward_unless_it_is_not_used() -> None:
    box = Toy("checker", differentiable=False)
    with pytest.raises(
        ValueError, match="dmd_refl back-propagates its rewards, and checker is not differentiable; give"
    ):
        baseline("dmd_refl", tiny_roles(), Toy(), box)
    baseline("dmd_refl", tiny_roles(), box, rl_weight=0.0)


def test_nft_trains_on_the_re_noised_scored_samples() -> None:
    roles, codec = tiny_roles(), ToyCodec()
    batches = [update.batch for update in run(baseline("dmd_nft", roles, codec=codec, nft_steps=(0.9, 0.3)), roles)]
    assert len(codec.shown) == 1
    for i, batch in enumerate(batches):
        assert torch.equal(batch.x_s, codec.shown[0]) and set(batch.t.tolist()) <= {
            torch.tensor(0.9).item(),
            torch.tensor(0.3).item(),
        }
        eps = rng(0, grouped()).normal("nft_eps", LATENT_SHAPE, i)
        assert torch.equal(batch.x_t, renoise(batch.x_s, batch.t, eps, roles.schedule))
        reward = Toy().score(codec.decode(batch.x_s), grouped()).detach()
        torch.testing.assert_close(batch.r, 0.5 + group_advantage(reward, GROUP) / 10)
    assert not torch.equal(batches[0].x_t, batches[1].x_t)


def test_nft_is_neutral_for_equal_rewards_on_policy() -> None:
    """r = 1/2 for equal rewards, and the student is the old policy."""
    roles = tiny_roles()
    roles.follow(0.0)
    update = next(run(baseline("dmd_nft", roles, Toy(factor=0.0, offset=2.0)), roles))
    assert torch.equal(update.batch.r, torch.full((6,), 0.5))
    wanted = student_gradient(update, roles, lambda batch: plain_dmd(roles, batch))
    torch.testing.assert_close(student_gradient(update, roles), wanted, rtol=1e-4, atol=1e-5)


def log_prob_of(method: Any, batch: Any) -> Tensor:
    return step_log_prob(method.roles, batch.x, batch.cond, method.cfg)


def test_grpo_first_update_and_clip() -> None:
    """The first update is the policy gradient, the second is clipped."""
    roles = tiny_roles()
    method = baseline("dmd_grpo", roles, rl_weight=3.0, ratio_clip=1e-6)
    for place, update in enumerate(run(method, roles)):
        log_prob = log_prob_of(method, update.batch)
        moved = (log_prob - update.batch.log_prob_old).abs().max()
        if place == 0:
            assert moved < 1e-6
            gain = lambda b: plain_dmd(roles, b) - 3 * b.advantage * log_prob_of(method, b).mean(1)  # noqa: E731
            wanted = student_gradient(update, roles, gain)
            torch.testing.assert_close(student_gradient(update, roles), wanted, rtol=1e-3, atol=1e-5)
        else:
            assert moved > 1e-5 and update.loss(update.batch).stats["policy/clipped"].mean() > 0.5


def test_grpo_raises_the_likelihood_of_better_samples() -> None:
    roles = tiny_roles()
    method = baseline("dmd_grpo", roles, rl_weight=1e4, student_updates=1)
    update = next(run(method, roles))
    before = log_prob_of(method, update.batch).mean(1).detach()
    gradient = student_gradient(update, roles)
    with torch.no_grad():
        place = 0
        for parameter in roles.parameters("student").values():
            step = gradient[place : place + parameter.numel()].reshape(parameter.shape)
            parameter.sub_(1e-3 * step / gradient.norm())
            place += parameter.numel()
    gained = log_prob_of(method, update.batch).mean(1).detach() - before
    assert (gained * update.batch.advantage).sum() > 0


def test_policy_rollout_uses_weights_before_the_update() -> None:
    roles = tiny_roles()
    diary = watch(roles)
    update = next(run(baseline("dmd_grpo", roles, noise_level=0.8), roles))
    calls = [call for call in diary if call.name == "student"][-4:]
    assert [call.t[0].item() for call in calls] == [1.0, 0.75, 0.5, 0.25]
    assert torch.equal(torch.stack([call.x_t for call in calls], 1), update.batch.x)
    noise = rng(0, grouped()).normal("policy_rollout", LATENT_SHAPE, 1)
    mean = update.batch.x[:, 1] - 0.75 * math.sin(0.4 * math.pi) * noise
    wanted = -(0.75 * math.sin(0.4 * math.pi) * noise).square().mean((1, 2, 3))
    torch.testing.assert_close(update.batch.log_prob_old[:, 0], wanted)
    assert (mean - 0.25 * calls[0].x0).abs().max() > 1e-3  # the rest of the noise is the prediction's own


def recipe(**method: Any) -> RunConfig:
    return RunConfig.model_validate({"name": "x", "method": method, "loop": {"batch_size": 12}})


@pytest.mark.parametrize("kind", BLACK_BOX)
def test_group_size_must_divide_the_batch(kind: str) -> None:
    """Otherwise it is a config error."""
    with pytest.raises(ValueError, match=f"group size does not divide: method {kind} compares 8 images per prompt"):
        recipe(kind=kind)
    assert recipe(kind=kind, images_per_prompt=4).method.prompt_group == 4
    with pytest.raises(ValueError, match="images_per_prompt"):
        recipe(kind=kind, images_per_prompt=1)


@pytest.mark.parametrize("kind", KINDS)
def test_recipe_needs_rewards_unless_weight_is_zero(kind: str) -> None:
    """A recipe without rewards is an error unless the weight is 0."""
    base = {"name": "x", "rewards": [], "loop": {"batch_size": 16}}
    with pytest.raises(ValueError, match=f"method {kind} reads rewards and needs at least one under `rewards`"):
        RunConfig.model_validate({**base, "method": {"kind": kind}})
    RunConfig.model_validate({**base, "method": {"kind": kind, "rl_weight": 0.0}})


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ValueError, match="GRPO needs at least two steps"):
        DMDGRPOConfig(student_steps=(1.0,))
    with pytest.raises(ValueError, match="nft_steps must lie in"):
        DMDNFTConfig(nft_steps=(0.5, 1.5))
    with pytest.raises(ValueError, match="student_updates 3 must not exceed fake_updates 2"):
        DMDReFLConfig(fake_updates=2, student_updates=3)
    with pytest.raises(ValueError, match="noise_level"):
        DMDGRPOConfig(noise_level=0.0)


@pytest.mark.parametrize("cfg", [DMDReFLConfig(), DMDNFTConfig(), DMDGRPOConfig()])
def test_default_ratio_and_without_rewards(cfg: MethodConfig) -> None:
    """The update ratio is DMD's, and without rewards the weight is 0."""
    other = DMDConfig()
    assert (cfg.fake_updates, cfg.student_updates) == (other.fake_updates, other.student_updates)  # type: ignore[union-attr]
    bare = without_rewards(cfg)
    assert bare is not None and bare == cfg.model_copy(update={"rl_weight": 0.0}) and without_rewards(bare) is None
