"""DMDR as an algorithm: its two stages, its schedules, its three reward losses, and DMD where they are off."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_roles import (
    Toy,
    ToyCodec,
    apply,
    dmd,
    grouped,
    make,
    plain_dmd,
    prompts,
    rng,
    same,
    tiny_roles,
    train,
    updates,
    watch,
)
from torch import Tensor

from gdmd.config.load import ConfigError
from gdmd.config.methods.dmdr import DMDRConfig
from gdmd.diffusion.dmdr_schedules import beta_quantile
from gdmd.diffusion.sampling import few_step_sample
from gdmd.diffusion.stochastic_sampling import cps_log_prob, cps_mean
from gdmd.methods.dmdr import Dmdr
from gdmd.methods.preference_pairs import extremes
from gdmd.programs.train import check_mixture
from gdmd.recipes.read import read_recipe
from gdmd.shapes.roles import LATENT_SHAPE, ShapesRoles
from gdmd.types import PromptBatch, Reward, Update

STRATEGIES = ["refl", "grpo", "dpo"]


def dmdr(roles: ShapesRoles, *rewards: Reward, codec: ToyCodec | None = None, **options: Any) -> Dmdr:
    return make("dmdr", roles, *rewards, codec=codec, **{"margin": 2.0, **options})


def student_update(method: Dmdr, roles: ShapesRoles, step: int, batch: PromptBatch | None = None) -> Update:
    """The student's update of a step, the fake's applied before it."""
    batch = batch or prompts()
    for update in method.iteration(step, batch, rng(step, batch)):
        if update.role == "student":
            return update
        apply(update, roles)
    raise AssertionError("no student update")


def gradients(update: Update, roles: ShapesRoles, value: Tensor | None = None) -> list[Tensor]:
    loss = update.loss(update.batch).per_sample if value is None else value
    return list(torch.autograd.grad(loss.mean(), list(roles.parameters("student").values())))


def test_once_the_schedules_have_ended_it_is_dmd_bit_for_bit() -> None:
    first, second = tiny_roles(), tiny_roles()
    wanted = train(dmd(first), first, start=7)
    off: dict[str, Any] = {"tilt": 0.0, "rl_weight": 0.0, "renoise_x0": False}
    method = dmdr(second, anneal=7, **off)
    assert same(train(method, second, start=7), wanted)
    third = tiny_roles()
    assert not same(train(dmdr(third, anneal=9, **off), third, start=7), wanted)


def test_student_is_trained_at_its_own_x0_renoised() -> None:
    """x_tau' = (1 - tau) x0 + tau n with the x0 that the rollout predicts at tau, from which the fake score learns."""
    roles = tiny_roles()
    method = dmdr(roles, tilt=0.0, rl_weight=0.0, anneal=0)
    rollout = method.rollout(prompts(), rng())
    made = list(updates(method, roles))
    assert torch.equal(made[0].batch.x0, rollout.x0)
    batch, noise = made[-1].batch, rng().normal("own_x0", LATENT_SHAPE)
    tau = rollout.tau[:, None, None, None]
    torch.testing.assert_close(batch.x_tau, (1 - tau) * rollout.x0 + tau * noise)
    with pytest.raises(ValueError, match="renoise_x0 trains the student at its own x0"):
        DMDRConfig(student_input="data")


def test_a_first_step_is_trained_at_pure_noise() -> None:
    roles = tiny_roles()
    options: dict[str, Any] = {"tilt": 0.0, "rl_weight": 0.0, "student_steps": (1.0,)}
    (batch,) = (update.batch for update in updates(dmdr(roles, **options), roles, role="student"))
    assert torch.equal(batch.x_tau, rng().normal("own_x0", LATENT_SHAPE))


def test_update_ratio_in_both_stages() -> None:
    """Five updates of the fake score precede one of the student."""
    roles = tiny_roles()
    method = dmdr(roles, cold_start=1)
    made = []
    for step in (0, 1):
        for update in method.iteration(step, prompts(), rng(step)):
            made.append((update.role, update.loss))
            apply(update, roles)
    assert [role for role, _ in made] == 2 * (["fake"] * 5 + ["student"])
    assert made[5][1] == method.tilted_loss and made[11][1] == method.refl_student_loss


def test_tilt_is_of_the_finished_rollout() -> None:
    """Each sample is tilted by the reward of the image that its rollout ends in."""
    roles, codec = tiny_roles(), ToyCodec()
    options: dict[str, Any] = {"cold_start": 5, "anneal": 0, "renoise_x0": False}
    update = student_update(dmdr(roles, codec=codec, **options), roles, 0)
    batch, draws = update.batch, rng()
    again = lambda i: draws.normal("rollout", LATENT_SHAPE, i)  # noqa: E731
    noise, steps = draws.normal("noise", LATENT_SHAPE), (1.0, 0.75, 0.5, 0.25)
    finished = few_step_sample(roles.student, noise, steps, prompts().cond, again, roles.schedule)
    torch.testing.assert_close(codec.shown[0], finished)
    last = batch.tau == 0.25
    x0 = roles.student(batch.x_tau, batch.tau, batch.cond).x0
    torch.testing.assert_close(finished[last], x0[last], rtol=1e-4, atol=1e-5)
    reward = torch.sigmoid(finished[:, 0]).mean((1, 2)).double().numpy()
    wanted = np.exp((reward - reward.mean()) / reward.std())
    np.testing.assert_allclose(batch.weight.numpy(), wanted, rtol=1e-4)
    literal = student_update(dmdr(roles, tilt_unit="norm", **options), roles, 0).batch.weight
    np.testing.assert_allclose(literal.numpy(), np.exp(reward / np.sqrt((reward**2).sum())), rtol=1e-5)
    torch.testing.assert_close(update.loss(batch).per_sample, batch.weight * plain_dmd(roles, batch))


def test_a_sample_that_was_not_scored_is_distilled_untilted() -> None:
    roles = tiny_roles()
    update = student_update(dmdr(roles, Toy(unscored=(2,)), cold_start=5), roles, 0)
    others = update.batch.weight[[0, 1, 3]].double()
    assert update.batch.weight[2] == 1 and (others != 1).all()
    assert others.log().sum().item() == pytest.approx(0, abs=1e-5)  # standardized over the scored ones


def test_blended_teacher_weights() -> None:
    """teacher + share (fake - teacher)."""
    roles = tiny_roles()
    teacher, fake = roles.teacher.net, roles.fake.net
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    for name, value in roles.blended_teacher(0.25).weights.items():
        here, there = before[name].double(), dict(fake.named_parameters())[name].detach().double()
        torch.testing.assert_close(value.double(), here + 0.25 * (there - here), rtol=1e-6, atol=1e-7)
        assert not value.requires_grad
    draws, batch = rng(), prompts()
    x_t, t = draws.normal("x", LATENT_SHAPE), draws.uniform("t")
    none, whole = (roles.blended_teacher(share)(x_t, t, batch.cond).x0 for share in (0.0, 1.0))
    torch.testing.assert_close(none, roles.teacher(x_t, t, batch.cond).x0)
    torch.testing.assert_close(whole, roles.fake(x_t, t, batch.cond).x0, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in teacher.named_parameters())


def test_blend_is_annealed() -> None:
    """The real score starts near the fake score and ends at the teacher."""
    roles = tiny_roles()
    shares: list[float] = []
    method = dmdr(roles, anneal=400, overlap=0.25)
    method.blend = lambda share: (shares.append(share), roles.blended_teacher(share))[1]
    for step in (0, 100, 200, 400, 4000):
        student_update(method, roles, step)
    assert shares == pytest.approx([0.25, 0.25 * 0.853553390593274, 0.125], abs=1e-12)


def test_the_overlap_shrinks_the_gap_between_the_two_scores() -> None:
    gaps = []
    for overlap in (0.0, 0.5, 1.0):
        roles = tiny_roles()
        method = dmdr(roles, anneal=400, overlap=overlap, guidance=1.0, fake_updates=1)
        student_update(method, roles, 0)
        gaps.append(method.stats()["gap/grad"].item())
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] == pytest.approx(0, abs=1e-6)


def test_times_follow_the_annealed_beta() -> None:
    """Both for the gradient and for the fake score's training."""
    many = prompts(("a circle",) * 4000)
    draws, method = rng(0, many), dmdr(tiny_roles(), renoise_low=0.1, renoise_high=0.9)
    for pace, mean in ((1.0, 4 / 5.5), (0.5, 2.5 / 3.75), (0.0, 0.5)):
        method.pace = pace
        assert method.fake_time(draws, 0).mean().item() == pytest.approx(mean, abs=0.01)
        t = method.renoise_time(draws, 0)
        assert t.mean().item() == pytest.approx(0.1 + 0.8 * mean, abs=0.01)
        assert 0.1 < t.min() and t.max() < 0.9
    assert torch.equal(method.fake_time(draws, 3), draws.uniform("fake_t", 3))
    method.pace = 1.0
    assert torch.equal(method.fake_time(draws, 3), beta_quantile(draws.uniform("fake_t", 3), 4.0, 1.5))


def test_refl_adds_the_weighted_hinge() -> None:
    """L_DMD + 1.2 mean_k relu(m - R_k), R of the one-step image."""
    roles = tiny_roles()
    rewards = Toy(), Toy("other", 1, factor=3.0)
    update = student_update(dmdr(roles, *rewards, cold_start=0, margin=0.8), roles, 0)
    x0 = roles.student(update.batch.x_tau, update.batch.tau, update.batch.cond).x0
    shown = torch.sigmoid(x0[:, :2]).mean((2, 3))
    hinge = ((0.8 - shown[:, 0]).relu() + (0.8 - 3 * shown[:, 1]).relu()) / 2
    wanted = plain_dmd(roles, update.batch) + 1.2 * hinge
    loss = update.loss(update.batch)
    torch.testing.assert_close(loss.per_sample, wanted)
    torch.testing.assert_close(loss.stats["reward/other/sample"], 3 * shown[:, 1].detach())
    for own, other in zip(gradients(update, roles), gradients(update, roles, wanted), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"margin": -1.0}, {"rl_weight": 0.0}])
def test_a_reward_beyond_its_margin_leaves_dmd(options: dict[str, Any]) -> None:
    roles = tiny_roles()
    update = student_update(dmdr(roles, cold_start=0, **options), roles, 0)
    assert torch.equal(update.loss(update.batch).per_sample, plain_dmd(roles, update.batch))


def test_refl_refuses_a_black_box_and_the_other_strategies_take_it() -> None:
    roles = tiny_roles()
    with pytest.raises(ValueError, match="brightness is not differentiable"):
        dmdr(roles, Toy(differentiable=False))
    for strategy in ("grpo", "dpo"):
        dmdr(roles, Toy(differentiable=False), strategy=strategy)
    dmdr(roles, Toy(differentiable=False), rl_weight=0.0)


def test_grpo_gradient_is_the_policy_gradient() -> None:
    """A times the gradient of the mean log-probability of the steps."""
    roles = tiny_roles()
    method = dmdr(roles, strategy="grpo", cold_start=0)
    update = student_update(method, roles, 0, grouped())
    batch, steps = update.batch, (1.0, 0.75, 0.5, 0.25)
    assert batch.advantage[:4].sum().item() == pytest.approx(0, abs=1e-5) and batch.advantage.std() > 0.5
    log_prob = []
    for i in range(3):
        prediction = roles.student(batch.x[:, i], torch.full((8,), steps[i]), batch.cond)
        mean = cps_mean(prediction, torch.full((8,), steps[i + 1]), 0.9, roles.schedule)
        log_prob.append(cps_log_prob(batch.x[:, i + 1], mean))
    torch.testing.assert_close(torch.stack(log_prob, 1), batch.log_prob_old, rtol=1e-4, atol=1e-5)
    wanted = plain_dmd(roles, batch) - 1.2 * batch.advantage * torch.stack(log_prob).mean(0)
    for own, other in zip(gradients(update, roles), gradients(update, roles, wanted), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


def test_extremes_of_each_group() -> None:
    """The best and the worst of each group, among scored samples."""
    advantage = torch.tensor([1.0, 3.0, math.nan, 2.0, 5.0, 5.0, math.nan, 0.0])
    group = torch.tensor([7, 7, 7, 7, 2, 2, 9, 9])
    best, worst, known = extremes(advantage, group)
    assert best[:4].tolist() == [1] * 4 and worst[:4].tolist() == [0] * 4 and known[:4].all()
    assert known[4:].tolist() == [False] * 4  # equal rewards; one scored image


def test_dpo_prefers_best_to_worst() -> None:
    """The best image of a group is preferred to the worst, relative to the reference."""
    roles = tiny_roles()
    method = dmdr(roles, strategy="dpo", cold_start=2, dpo_beta=10.0)
    update = student_update(method, roles, 2, grouped())
    pairs = update.batch.pairs
    score = torch.sigmoid(torch.stack([pairs.x0_win, pairs.x0_lose])[:, :, 0]).mean((2, 3))
    assert (score[0] > score[1]).all() and pairs.known.all()
    assert torch.equal(pairs.x0_win[0], pairs.x0_win[3]) and not torch.equal(pairs.x0_win[0], pairs.x0_win[4])
    assert len({tuple(x.flatten()[:3].tolist()) for x in pairs.win_t}) == 8  # draws of their own
    loss = update.loss(update.batch)
    torch.testing.assert_close(loss.stats["loss/rl"], torch.full((8,), math.log(2)), rtol=1e-3, atol=1e-4)
    errors = []
    for _ in range(2):
        x0 = roles.student(pairs.win_t, pairs.t, update.batch.cond).x0.detach()
        other = roles.student(pairs.lose_t, pairs.t, update.batch.cond).x0.detach()
        errors.append(((x0 - pairs.x0_win).square() - (other - pairs.x0_lose).square()).mean())
        steer = update.loss(update.batch).per_sample - plain_dmd(roles, update.batch)
        for parameter, grad in zip(roles.parameters("student").values(), gradients(update, roles, steer), strict=True):
            parameter.data.sub_(1e-3 * grad)  # one step of the preference alone
    assert errors[1] < errors[0]


def test_dpo_reference_is_the_cold_started_student() -> None:
    """The reference is the student at the end of the cold start."""
    roles = tiny_roles()
    method = dmdr(roles, strategy="dpo", cold_start=1)
    snapshots = []
    for step in range(3):
        snapshots.append({name: p.detach().clone() for name, p in roles.parameters("student").items()})
        for update in method.iteration(step, grouped(), rng(step, grouped())):
            apply(update, roles)
        assert bool(roles.old_state()) == (step >= 1)
    assert same(dict(roles.old_state()), snapshots[1]) and not same(snapshots[2], snapshots[1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_scores_leave_dmd(strategy: str) -> None:
    """Groups without a difference and unscored samples have L_DMD only."""
    roles = tiny_roles()
    method = dmdr(roles, Toy(unscored=tuple(range(8))), strategy=strategy, cold_start=0)
    update = student_update(method, roles, 0, grouped())
    assert torch.equal(update.loss(update.batch).per_sample, plain_dmd(roles, update.batch))
    assert all(gradient.isfinite().all() for gradient in gradients(update, roles))


def test_blended_teacher_and_head_calls_are_counted() -> None:
    """Hooks see the calls of the blended teacher and of the GAN head."""
    roles = ShapesRoles(tiny_roles().teacher.net, head_seed=0)
    calls: list[str] = []
    for name in ("teacher", "fake"):
        getattr(roles, name).net.register_forward_hook(lambda net, given, answer, name=name: calls.append(name))
    x_t, t = rng().normal("x", LATENT_SHAPE), rng().uniform("t")
    roles.blended_teacher(0.5)(x_t, t, prompts().cond)
    assert roles.critic is not None
    roles.critic(x_t, t, prompts().cond)
    assert calls == ["teacher", "fake"]


def test_one_teacher_call_per_iteration() -> None:
    """The teacher is called once per iteration, or the blend in its place."""
    roles = tiny_roles()
    method = dmdr(roles, anneal=3, cold_start=9)
    diary = watch(roles)
    student_update(method, roles, 0)
    assert not any(call.name == "teacher" for call in diary)
    student_update(method, roles, 3)
    assert sum(call.name == "teacher" for call in diary) == 1


def test_what_a_recipe_must_say_follows_from_the_options() -> None:
    assert DMDRConfig().rewarded and DMDRConfig(rl_weight=0.0).rewarded and DMDRConfig(cold_start=0).rewarded
    assert not DMDRConfig(rl_weight=0.0, tilt=0.0).rewarded and not DMDRConfig(rl_weight=0.0, cold_start=0).rewarded
    assert DMDRConfig().prompt_group == 1 and DMDRConfig(strategy="dpo").prompt_group == 8
    assert DMDRConfig(strategy="grpo", rl_weight=0.0).prompt_group == 1
    with pytest.raises(ValueError, match="at least 2 steps"):
        DMDRConfig(strategy="grpo", student_steps=(1.0,))
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        DMDRConfig(beta_a=0.5)


def test_a_mixture_that_is_not_possible_is_refused_before_anything_is_loaded() -> None:
    words = ("prompts.file=p.txt", "model.student_lora=few.safetensors", "model.fake_from=student")
    with pytest.raises(ConfigError, match="method.overlap = 0.25 activates the fake score's adapter on the teacher"):
        read_recipe("sdxl_dmdr", words)
    for possible in ("method.overlap=0", "method.anneal=0", "model.full=fake", "model.fake_from=teacher"):
        read_recipe("sdxl_dmdr", (*words, possible))
    with pytest.raises(ValueError, match="loop.sharding = full, and a sharded fake score cannot be mixed"):
        check_mixture(read_recipe("dmdr", ("loop.sharding=full",)), 2)
    check_mixture(read_recipe("dmdr", ("loop.sharding=full",)), 1)
    check_mixture(read_recipe("dmdr", ("loop.sharding=full", "method.overlap=0")), 2)
    check_mixture(read_recipe("sdxl_dmdr", ("loop.sharding=full", words[0])), 2)  # adapters are never sharded
