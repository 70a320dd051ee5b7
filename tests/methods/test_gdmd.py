"""GDMD as an algorithm (arXiv 2604.19009, Algorithm 1): what its group, scores and weights do to real updates."""

from __future__ import annotations

import pytest
import torch
from tiny_roles import (
    Toy,
    ToyCodec,
    cut,
    dmd,
    first_student,
    gdmd,
    grouped,
    make,
    plain_dmd,
    prompts,
    rng,
    scored,
    student_gradient,
    tiny_roles,
    train,
    updates,
    watch,
)

from gdmd.diffusion.schedule import renoise
from gdmd.losses.dmd import normalizer
from gdmd.losses.gdmd import step_weight
from gdmd.methods.gdmd import Group, NapoBatch
from gdmd.types import Update

ETA = 3


def test_constant_reward_is_dmd_on_policy() -> None:
    """r = 1/2: the RL gradient is zero."""
    first, second = tiny_roles(), tiny_roles()
    update = first_student(gdmd(first, Toy(factor=0.0, offset=3.0)), first)
    assert torch.equal(update.batch.r, torch.full_like(update.batch.r, 0.5))
    plain = student_gradient(first_student(gdmd(second, gamma=0.0), second), second)
    torch.testing.assert_close(student_gradient(update, first), plain, rtol=1e-4, atol=1e-6)


def test_first_update_is_w_times_the_dmd_gradient() -> None:
    """w = lambda + gamma beta (2r - 1) for each sample."""
    roles = tiny_roles()
    update = first_student(gdmd(roles, gamma=0.7, beta=0.6), roles)
    w = step_weight(update.batch.r, 1.0, 0.7, 0.6)
    assert w.std() > 0.01
    for k in range(len(w)):
        own = Update("student", update.loss, cut(update.batch, k, k + 1))
        plain = student_gradient(own, roles, lambda batch: plain_dmd(roles, batch))
        torch.testing.assert_close(student_gradient(own, roles), w[k] * plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("collection", ["t", "fake", "all"])
def test_collection_modes(collection: str) -> None:
    """t: the last fake score at eta times; fake: one draw seen by every fake score; all: both vary."""
    roles, size = tiny_roles(), len(prompts())
    diary = watch(roles)
    kinds, trained = [], []
    for update in updates(gdmd(roles, collection=collection), roles):
        if update.role == "student":
            break
        kinds.append((len(diary), "update"))
        trained.append(update.batch)
    calls = [(place, call) for place, call in enumerate(diary) if call.name == "teacher"]
    kinds += [(place, "score") for place, _ in calls]
    order = [kind for _, kind in sorted(kinds)]
    assert order == (["update"] * ETA + ["score"] * ETA if collection == "t" else ["update", "score"] * ETA)
    for place, call in calls:  # both scores answer at the same x_t, and the fake score is the one just updated
        assert diary[place + 1].name == "fake" and torch.equal(diary[place + 1].x_t, call.x_t[:size])
    times = {tuple(call.t[:size].tolist()) for _, call in calls}
    assert len(times) == (1 if collection == "fake" else ETA)
    answers = [diary[place + 1].x0 for place, _ in calls]
    assert not torch.equal(answers[0], answers[1]) and not torch.equal(answers[1], answers[2])
    assert not torch.equal(trained[0].t, trained[1].t) and not torch.equal(trained[0].eps, trained[1].eps)
    assert not any(torch.equal(batch.t, call.t[:size]) for batch in trained for _, call in calls)


def test_permuting_the_group_permutes_r() -> None:
    """The sum of the gradients stays the same."""
    roles, order = tiny_roles(), [2, 0, 1]
    batch, method = prompts(), gdmd(roles)
    r, group = method.rollout(batch, rng()), Group()
    for i in range(ETA):
        method.collect(group, r, batch, rng(), i)
    permuted = Group([group.x_tar[i] for i in order], [group.scores[i] for i in order])
    one, two = (gdmd(roles).weigh(own, r, batch, rng()) for own in (group, permuted))
    torch.testing.assert_close(two, one[order])
    assert one.std() > 0.01
    sums = []
    for optimal, own in ((one, group), (two, permuted)):
        batches = [NapoBatch(r.x_tau, r.tau, r.cond, own.x_tar[i], r.x0, optimal[i]) for i in range(ETA)]
        gradients = [student_gradient(Update("student", method.napo_student_loss, each), roles) for each in batches]
        sums.append(torch.stack(gradients).sum(0))
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [0.25, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_reward_sees_the_scored_step(step: float, normalize: bool) -> None:
    """x0 - s grad, then x0; the loss regresses to x0 - grad in any case."""
    roles, codec, size = tiny_roles(), ToyCodec(), len(prompts())
    diary = watch(roles)
    options = {"scored_step": step, "guidance": 3.0, "group_size": 1, "normalize": normalize}
    update = first_student(gdmd(roles, codec=codec, **options), roles)
    place = next(k for k, call in enumerate(diary) if call.name == "teacher")
    cond, uncond = diary[place].x0.split(size)
    x0_real, x0_fake, x0 = uncond + 3 * (cond - uncond), diary[place + 1].x0, update.batch.x_old
    grad = (x0_fake - x0_real) / (normalizer(x0, x0_real) if normalize else 1)
    torch.testing.assert_close(update.batch.x_tar, x0 - grad)
    torch.testing.assert_close(codec.shown[0], x0 - step * grad)
    assert len(codec.shown) == 2 and torch.equal(codec.shown[1], x0)


def test_scored_step_0_is_the_limit_of_small_steps() -> None:
    """The gains per step length and r agree, for two rewards; step 0 decodes x0 only."""
    rewards = Toy(), Toy("other", 1, factor=5.0)
    found = {}
    for step in (0.0, 0.01):
        roles, codec = tiny_roles(), ToyCodec()
        method = gdmd(roles, *rewards, codec=codec, scored_step=step)
        r = scored(method, roles)
        found[step] = r, method.stats()["reward/gain"] / (step or 1), len(codec.shown)
    assert found[0.0][2] == 1 and found[0.01][2] == ETA + 1
    torch.testing.assert_close(found[0.0][1], found[0.01][1], rtol=0.02, atol=0)
    torch.testing.assert_close(found[0.0][0], found[0.01][0], rtol=0, atol=0.01)
    assert found[0.0][0].std() > 0.05


def test_z_is_the_root_mean_square_of_the_gains() -> None:
    """Two rewards in different units; the same step improves one and worsens the other."""
    roles, batch = tiny_roles(), prompts()
    method = gdmd(roles, Toy(), Toy("other", 1), group_size=2)
    gain = torch.tensor([[3.0, 1.0], [-0.1, 0.2]])[:, :, None].expand(2, 2, 4)  # [R, eta, B]
    method.gains = lambda *_: (torch.full((2, 4), 7.0), gain)  # type: ignore[method-assign]
    r = method.weigh(Group(), method.rollout(batch, rng()), batch, rng())
    z = gain.square().mean((1, 2)).sqrt()
    torch.testing.assert_close(method.scale.value(), z)
    torch.testing.assert_close(r, 0.5 + 0.5 * (gain / z[:, None, None]).mean(0).clamp(-1, 1))
    torch.testing.assert_close(method.stats()["reward/gain"], gain.mean())


def test_black_boxes_need_a_scored_step() -> None:
    box = Toy("checker", differentiable=False)
    with pytest.raises(ValueError, match="gdmd with scored_step 0 back-propagates its rewards, and checker is not"):
        gdmd(tiny_roles(), box, scored_step=0.0)
    gdmd(tiny_roles(), box)
    gdmd(tiny_roles(), box, scored_step=0.0, gamma=0.0)  # no reward is used at all


def test_student_updates_keep_targets_and_recompute_x0() -> None:
    roles = tiny_roles()
    diary = watch(roles)
    seen = []
    for update in updates(gdmd(roles), roles, role="student"):
        update.loss(update.batch)
        seen.append((update.batch.x_tau, update.batch.x_old, diary[-1].x0.detach()))
    assert len(seen) == ETA and torch.equal(seen[0][2], seen[0][1])
    assert all(torch.equal(s[0], seen[0][0]) and torch.equal(s[1], seen[0][1]) for s in seen)
    assert not torch.equal(seen[1][2], seen[0][2]) and not torch.equal(seen[2][2], seen[1][2])


@pytest.mark.parametrize("kind", ["gdmd", "dmd_nft"])
def test_ema_old_policy(kind: str) -> None:
    """It starts as the student, and its decay grows by 1e-3 per student update."""
    roles, decays = tiny_roles(), []
    follow = roles.follow
    roles.follow = lambda decay: (decays.append(decay), follow(decay))[1]  # type: ignore[method-assign]
    own = {"gdmd": {"old_policy": "ema", "group_size": 3}, "dmd_nft": {"fake_updates": 3, "student_updates": 3}}[kind]
    method = make(kind, roles, **own)
    method.old.limit = 0.002
    train(method, roles, 1, batch=grouped(8))
    assert decays == [0.0, 0.001, 0.002, 0.002]
    if kind == "gdmd":
        later = first_student(method, roles).batch
        old = roles.old(later.x_tau, later.tau, later.cond).x0
        assert torch.equal(later.x_old, old)
        assert (old - roles.student(later.x_tau, later.tau, later.cond).x0).abs().max() > 1e-4
        snapshot = tiny_roles()
        train(gdmd(snapshot), snapshot, 1)
        assert not snapshot.old_state()


def test_dmd_gradients_come_from_the_last_fakes() -> None:
    roles = tiny_roles()
    diary = watch(roles)
    kinds = []
    for update in updates(dmd(roles, fake_updates=4, student_updates=2), roles):
        kinds.append((update.role, sum(call.name == "teacher" for call in diary)))
    assert kinds == [("fake", 0), ("fake", 0), ("fake", 0), ("fake", 1), ("student", 2), ("student", 2)]


def test_real_latents_are_interpolated_with_noise() -> None:
    roles, real = tiny_roles(), torch.randn(4, 8, 8, 8)
    method = gdmd(roles, student_input="data")
    method.real_latents = lambda batch, draws: real
    r = method.rollout(prompts(), rng())
    assert torch.equal(r.x_tau, renoise(real, r.tau, rng().normal("noise", (8, 8, 8)), roles.schedule))
    torch.testing.assert_close(r.x0, roles.student(r.x_tau, r.tau, r.cond).x0.detach())


def test_dmd_rejects_the_state_of_another_method() -> None:
    with pytest.raises(ValueError, match="holds method state .'mean_r'., but this method has none"):
        dmd(tiny_roles()).load({"mean_r": torch.zeros(2)})
