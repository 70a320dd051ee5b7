"""GDMD as an algorithm (arXiv 2604.19009, Algorithm 1): what its group, scores and weights do to real updates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_roles import (
    Toy,
    ToyCodec,
    apply,
    cut,
    distance,
    dmd,
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
    weights,
)
from torch import Tensor

from gdmd.diffusion.schedule import renoise
from gdmd.losses.dmd import dmd_loss, normalizer
from gdmd.losses.gdmd import step_weight
from gdmd.methods.gdmd import Gdmd, Group
from gdmd.types import Update

ETA = 3


def scored(method: Gdmd, roles: Any, step: int = 0) -> Tensor:
    """r of every student update of one iteration, [E, B]."""
    return torch.stack([update.batch.r[:, 0] for update in updates(method, roles, step, "student")])


def plain_dmd(roles: Any, batch: Any) -> Tensor:
    """L_DMD per sample of a student batch with one target."""
    return dmd_loss(roles.student(batch.x_tau, batch.tau, batch.cond).x0, batch.x_tar[:, 0])


def test_gamma_zero_is_dmd_with_as_many_student_as_fake_updates() -> None:
    first, second = tiny_roles(), tiny_roles()
    plain = train(dmd(first, fake_updates=ETA, student_updates=ETA), first)
    assert same(train(gdmd(second, gamma=0.0), second), plain)
    assert distance(plain, weights(tiny_roles())) > 1e-4  # something was learnt
    third = tiny_roles()
    assert not same(train(gdmd(third, gamma=1.0), third), plain)


def test_gamma_zero_scores_nothing() -> None:
    codec, roles = ToyCodec(), tiny_roles()
    train(gdmd(roles, codec=codec, gamma=0.0), roles, 1)
    assert not codec.shown


def test_dmd_gives_one_gradient_per_student_update_with_the_last_fakes() -> None:
    roles = tiny_roles()
    diary = watch(roles)
    kinds = []
    for update in updates(dmd(roles, fake_updates=4, student_updates=2), roles):
        kinds.append((update.role, sum(call.name == "teacher" for call in diary)))
    assert kinds == [("fake", 0), ("fake", 0), ("fake", 0), ("fake", 1), ("student", 2), ("student", 2)]


def test_a_reward_that_is_constant_gives_the_update_of_dmd_on_policy() -> None:
    first, second = tiny_roles(), tiny_roles()
    update = first_student(gdmd(first, Toy(factor=0.0, offset=3.0)), first)
    assert torch.equal(update.batch.r, torch.full_like(update.batch.r, 0.5))
    plain = student_gradient(first_student(gdmd(second, gamma=0.0), second), second)
    torch.testing.assert_close(student_gradient(update, first), plain, rtol=1e-4, atol=1e-6)


def test_the_first_update_of_each_sample_is_w_times_its_dmd_gradient() -> None:
    roles = tiny_roles()
    update = first_student(gdmd(roles, gamma=0.7, beta=0.6), roles)
    w = step_weight(update.batch.r[:, 0], 1.0, 0.7, 0.6)
    assert w.std() > 0.01
    for k in range(len(w)):
        own = Update("student", update.loss, cut(update.batch, k, k + 1))
        plain = student_gradient(own, roles, lambda batch: plain_dmd(roles, batch))
        torch.testing.assert_close(student_gradient(own, roles), w[k] * plain, rtol=1e-3, atol=1e-5)


def test_an_unscored_sample_takes_plain_dmd_steps_to_the_last_update() -> None:
    roles = tiny_roles()
    method = gdmd(roles, Toy(), Toy("other", 1, unscored=(2,)))
    for update in updates(method, roles, role="student"):
        batch = update.batch
        assert batch.r[:, 0].isnan().tolist() == [False, False, True, False]
        plain = plain_dmd(roles, batch)
        loss = update.loss(batch).per_sample
        assert loss[2] == plain[2] and (loss != plain)[[0, 1, 3]].all() and loss.isfinite().all()
        assert student_gradient(update, roles).isfinite().all()
    assert method.stats()["reward/unscored"].item() == pytest.approx(0.25)


@pytest.mark.parametrize("weighting", ["napo", "softmax"])
def test_no_scored_sample_at_all_is_plain_dmd(weighting: str) -> None:
    first, second = tiny_roles(), tiny_roles()
    silent = Toy(unscored=(0, 1, 2, 3))
    assert same(train(gdmd(first, silent, weighting=weighting), first), train(gdmd(second, gamma=0.0), second))


@pytest.mark.parametrize("control", ["none", "shuffled", "indicator", "constant"])
def test_rewards_in_other_units_change_nothing(control: str) -> None:
    first, second = tiny_roles(), tiny_roles()
    plain = train(gdmd(first, Toy(), Toy("b", 1), control=control), first)
    rewards = Toy(factor=40.0, offset=-3.0), Toy("b", 1, factor=0.2, offset=0.5)
    assert distance(train(gdmd(second, *rewards, control=control), second), plain) < 2e-5


def test_the_group_of_mode_t_uses_only_the_last_fake() -> None:
    kinds, times = diary_of("t")
    assert kinds == ["update"] * ETA + ["score"] * ETA
    assert len({tuple(t.tolist()) for t in times}) == ETA


def test_the_group_of_mode_fake_is_one_draw_seen_by_every_fake() -> None:
    kinds, times = diary_of("fake")
    assert kinds == ["update", "score"] * ETA
    assert all(torch.equal(t, times[0]) for t in times)


def test_the_group_of_mode_all_varies_both() -> None:
    kinds, times = diary_of("all")
    assert kinds == ["update", "score"] * ETA
    assert len({tuple(t.tolist()) for t in times}) == ETA


def diary_of(collection: str) -> tuple[list[str], list[Tensor]]:
    """Order of fake updates and scorings before the first student update, and the t of each scoring."""
    roles = tiny_roles()
    diary = watch(roles)
    marks, trained = [], []
    for update in updates(gdmd(roles, collection=collection), roles):
        if update.role == "student":
            break
        marks.append(len(diary))
        trained.append(update.batch)
    kinds: list[tuple[int, str]] = [(mark, "update") for mark in marks]
    calls = [(place, call) for place, call in enumerate(diary) if call.name == "teacher"]
    kinds += [(place, "score") for place, _ in calls]
    size = len(prompts())
    for place, call in calls:  # both scores answer at the same x_t, and the fake is the one just updated
        assert diary[place + 1].name == "fake" and torch.equal(diary[place + 1].x_t, call.x_t[:size])
    scored_x_t = [call.x_t[:size] for _, call in calls]
    same_x_t = all(torch.equal(x, scored_x_t[0]) for x in scored_x_t)
    assert same_x_t == (collection == "fake")
    assert not torch.equal(trained[0].t, trained[1].t) and not torch.equal(trained[0].eps, trained[1].eps)
    assert not any(torch.equal(batch.t, call.t[:size]) for batch in trained for _, call in calls)
    return [kind for _, kind in sorted(kinds)], [call.t[:size] for _, call in calls]


def test_fake_versions_differ_between_the_scorings_of_mode_fake() -> None:
    roles = tiny_roles()
    diary = watch(roles)
    first_student(gdmd(roles, collection="fake"), roles)
    answers = [diary[place + 1].x0 for place, call in enumerate(diary) if call.name == "teacher"]
    assert not torch.equal(answers[0], answers[1]) and not torch.equal(answers[1], answers[2])


def test_permuting_the_group_permutes_r_and_keeps_the_summed_gradient() -> None:
    roles, order = tiny_roles(), [2, 0, 1]
    batch = prompts()
    method = gdmd(roles)
    r, group = method.rollout(batch, rng()), Group()
    for i in range(ETA):
        method._collect(group, r, batch, rng(), i)
    permuted = Group([group.x_tar[i] for i in order], [group.score[i] for i in order])
    one, _ = gdmd(roles)._weigh(group, r, batch, rng())
    two, _ = gdmd(roles)._weigh(permuted, r, batch, rng())
    torch.testing.assert_close(two, one[order])
    assert one.std() > 0.01
    sums = []
    for optimal, own in ((one, group), (two, permuted)):
        x0 = r.x0.clone().requires_grad_()
        parts = [method._napo(x0, _student_batch(r, own, optimal, i), 0).sum() for i in range(ETA)]
        sums.append(torch.autograd.grad(sum(parts), x0)[0])
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=1e-6)


def _student_batch(r: Any, group: Group, optimal: Tensor, i: int) -> Any:
    from gdmd.methods.gdmd import StudentBatch

    return StudentBatch(r.x_tau, r.tau, r.cond, r.x0, group.x_tar[i], optimal[i].T, torch.ones_like(optimal[i].T))


@pytest.mark.parametrize("target", ["raw", "normalized", "real"])
def test_the_reward_sees_the_chosen_target_and_the_loss_the_normalized_one(target: str) -> None:
    roles, codec, size = tiny_roles(), ToyCodec(), len(prompts())
    diary = watch(roles)
    update = first_student(gdmd(roles, codec=codec, score_target=target, guidance=3.0, group_size=1), roles)
    place = next(k for k, call in enumerate(diary) if call.name == "teacher")
    cond, uncond = diary[place].x0.split(size)
    x0_real, x0_fake, x0 = uncond + 3 * (cond - uncond), diary[place + 1].x0, update.batch.x0_old
    x_tar = x0 - (x0_fake - x0_real) / normalizer(x0, x0_real)
    shown = {"raw": x0 - x0_fake + x0_real, "normalized": x_tar, "real": x0_real}[target]
    torch.testing.assert_close(codec.shown[0], shown)
    assert len(codec.shown) == 2 and torch.equal(codec.shown[1], x0)
    torch.testing.assert_close(update.batch.x_tar[:, 0], x_tar)


def test_a_frozen_teacher_asked_the_same_again_is_scored_once_and_counts_once_in_z() -> None:
    """score_target real in mode fake: one (t, eps), so the draws differ by their fakes, which this score does not see."""
    roles, codec = tiny_roles(), ToyCodec()
    method = gdmd(roles, codec=codec, score_target="real", collection="fake")
    r = scored(method, roles)
    assert len(codec.shown) == 2  # the teacher's answer and x0
    assert torch.equal(r, r[:1].expand(ETA, -1)) and r.std() > 0.01
    teacher, _ = (torch.sigmoid(shown[:, 0]).mean((1, 2)) for shown in codec.shown)
    torch.testing.assert_close(method.scale.value(), teacher.detach().double().std().float()[None], rtol=1e-5, atol=0)


def test_without_the_normalizer_the_target_is_the_raw_one() -> None:
    roles, codec = tiny_roles(), ToyCodec()
    update = first_student(gdmd(roles, codec=codec, normalize=False), roles)
    torch.testing.assert_close(update.batch.x_tar[:, 0], codec.shown[0])


def test_shuffling_keeps_the_scores_of_the_batch_but_not_their_owners() -> None:
    first, second, third = tiny_roles(), tiny_roles(), tiny_roles()
    plain, mixed = scored(gdmd(first), first), scored(gdmd(second, control="shuffled"), second)
    assert torch.equal(plain.flatten().sort().values, mixed.flatten().sort().values)
    assert not torch.equal(plain, mixed)
    assert torch.equal(scored(gdmd(third, control="shuffled"), third), mixed)


def test_softmax_weights_are_logged_as_their_mean_and_the_effective_number_of_targets() -> None:
    roles, count = tiny_roles(), ETA * 2
    for gamma, low, high in ((1e-6, count - 0.01, count + 0.01), (1e6, 1.0, 1.2)):
        method = gdmd(roles, weighting="softmax", gamma=gamma, scored_guidances=[2.0, 6.0])
        first_student(method, roles)
        assert method.stats()["weight/mean"].item() == pytest.approx(1)
        assert low <= method.stats()["weight/effective"].item() <= high


def test_shuffled_softmax_weights_still_have_mean_one() -> None:
    roles = tiny_roles()
    share = [u.batch.share for u in updates(gdmd(roles, weighting="softmax", control="shuffled"), roles, 0, "student")]
    torch.testing.assert_close(torch.stack(share).mean(0), torch.ones(4, 1))


def test_the_constant_control_is_the_running_mean_of_r_with_the_pull_kept() -> None:
    first, second = tiny_roles(), tiny_roles()
    plain, constant = scored(gdmd(first), first), scored(gdmd(second, control="constant"), second)
    torch.testing.assert_close(constant, torch.full_like(constant, plain.mean().item()))
    method = gdmd(second, control="constant")
    means = [float(method._running_mean(torch.tensor([v]))) for v in (0.2, 0.8)]
    assert means[0] == pytest.approx(0.2) and means[1] == pytest.approx((0.99 * 0.2 + 0.8) / 1.99)


def test_the_constant_control_leaves_unscored_samples_out_and_survives_a_silent_step() -> None:
    roles = tiny_roles()
    reward = Toy(unscored=(0, 1, 2, 3))
    method = gdmd(roles, reward, control="constant")
    assert scored(method, roles).isnan().all()
    reward.unscored = (1,)
    r = scored(method, roles, 1)
    assert r[:, 1].isnan().all() and r[:, [0, 2, 3]].isfinite().all()


def test_the_indicator_control_keeps_improving_targets_only_and_has_no_pull() -> None:
    roles = tiny_roles()
    method = gdmd(roles, Toy(unscored=(3,)), control="indicator")
    for update in updates(method, roles, role="student"):
        batch = update.batch
        plain = plain_dmd(roles, batch)
        keep = torch.where(batch.r[:, 0].isnan(), True, batch.r[:, 0] > 0.5)
        assert torch.equal(update.loss(batch).per_sample, keep * plain)


def test_scored_guidances_are_targets_of_one_teacher_call_and_weigh_one_on_average() -> None:
    roles, size = tiny_roles(), len(prompts())
    diary = watch(roles)
    method = gdmd(roles, weighting="softmax", scored_guidances=(1.0, 4.0, 8.0), gamma=2.0)
    group = list(updates(method, roles, role="student"))
    assert [len(call.t) for call in diary if call.name == "teacher"] == [2 * size] * ETA
    share = torch.stack([update.batch.share for update in group])  # [E, B, G]
    assert share.shape == (ETA, size, 3) and share.std() > 0.05
    torch.testing.assert_close(share.mean((0, 2)), torch.ones(size))
    assert group[0].batch.x_tar.shape[:2] == (size, 3)


def on_policy_gradients(**how: Any) -> list[Tensor]:
    """The gradients of all student updates of one iteration at the weights before the first of them."""
    roles, batch = tiny_roles(), prompts()
    gradients = []
    for update in gdmd(roles, **how).iteration(0, batch, rng(0, batch)):
        if update.role == "student":
            gradients.append(student_gradient(update, roles))
        else:
            apply(update, roles)
    return gradients


def test_the_mean_target_has_on_policy_the_mean_gradient_of_all_targets() -> None:
    how = {"weighting": "softmax", "gamma": 2.0, "scored_guidances": [2.0, 6.0]}
    apart, together = on_policy_gradients(**how), on_policy_gradients(**how, student_target="mean")
    mean = torch.stack(apart).mean(0)
    assert len(together) == ETA
    for gradient in together:
        torch.testing.assert_close(gradient, mean, rtol=1e-3, atol=1e-6)
    assert (apart[0] - mean).abs().max() > 1e-2 * mean.abs().max()


def test_every_student_update_keeps_its_targets_and_recomputes_x0() -> None:
    roles = tiny_roles()
    diary = watch(roles)
    seen = []
    for update in updates(gdmd(roles), roles, role="student"):
        update.loss(update.batch)
        seen.append((update.batch.x_tau, update.batch.x0_old, diary[-1].x0.detach()))
    assert len(seen) == ETA and torch.equal(seen[0][2], seen[0][1])
    assert all(torch.equal(s[0], seen[0][0]) and torch.equal(s[1], seen[0][1]) for s in seen)
    assert not torch.equal(seen[1][2], seen[0][2]) and not torch.equal(seen[2][2], seen[1][2])


def test_the_ema_old_policy_follows_the_student_slowly_and_is_what_x_old_means() -> None:
    roles, decays = tiny_roles(), []
    follow = roles.follow
    roles.follow = lambda decay: (decays.append(decay), follow(decay))[1]  # type: ignore[method-assign]
    method = gdmd(roles, old_policy="ema", old_decay=0.002)
    update = first_student(method, roles)
    wanted = roles.old(update.batch.x_tau, update.batch.tau, update.batch.cond).x0
    assert torch.equal(update.batch.x0_old, wanted)
    train(method, roles, 1)
    assert decays == [0.0, 0.0, 0.001, 0.002, 0.002]  # it begins as the student
    later = first_student(method, roles).batch
    old = roles.old(later.x_tau, later.tau, later.cond).x0
    assert torch.equal(later.x0_old, old)
    assert (old - roles.student(later.x_tau, later.tau, later.cond).x0).abs().max() > 1e-4
    snapshot = tiny_roles()
    train(gdmd(snapshot), snapshot, 1)
    assert not snapshot.old_state()


def test_the_time_baseline_takes_away_what_the_score_owes_to_t_and_guidance() -> None:
    """r falls on both sides of 1/2 at every guidance, where the sample's score alone leaves whole guidances below."""
    means = {}
    for baseline in ("sample", "time"):
        roles = tiny_roles()
        method = gdmd(roles, score_baseline=baseline, scored_guidances=(1.0, 20.0))
        r = torch.stack([update.batch.r for update in updates(method, roles, role="student")])  # [E, B, G]
        means[baseline] = r.mean((0, 1))
    assert (means["time"] - 0.5).abs().max() < 0.15 < (means["sample"] - 0.5).abs().max()


def test_real_latents_enter_as_an_interpolation_with_the_noise() -> None:
    roles, real = tiny_roles(), torch.randn(4, 8, 8, 8)
    method = gdmd(roles, student_input="data")
    method.real_latents = lambda batch, draws: real
    r = method.rollout(prompts(), rng())
    assert torch.equal(r.x_tau, renoise(real, r.tau, rng().normal("noise", (8, 8, 8)), roles.schedule))
    torch.testing.assert_close(r.x0, roles.student(r.x_tau, r.tau, r.cond).x0.detach())


@pytest.mark.parametrize("options", [{"control": "constant"}, {"score_baseline": "time"}])
def test_a_restored_method_continues_identically(options: dict[str, Any]) -> None:
    options = {"old_policy": "ema", **options}
    roles, copy = tiny_roles(), tiny_roles()
    method = gdmd(roles, **options)
    train(method, roles, 2)
    saved = {name: value.clone() for name, value in method.state().items()}
    for role in ("student", "fake"):
        for name, parameter in copy.parameters(role).items():  # type: ignore[arg-type]
            parameter.data.copy_(roles.parameters(role)[name])  # type: ignore[index]
    copy.load_old_state({k: v.clone() for k, v in roles.old_state().items()})
    restored = gdmd(copy, **options)
    restored.load(saved)
    assert same(train(restored, copy, 1, start=2), train(method, roles, 1, start=2))
    assert same(restored.state(), method.state()) and same(copy.old_state(), roles.old_state())
    assert not same(saved, method.state())


def test_plain_dmd_refuses_the_state_of_another_method() -> None:
    with pytest.raises(ValueError, match="holds method state .'mean_r'., but this method has none"):
        dmd(tiny_roles()).load({"mean_r": torch.zeros(2)})
