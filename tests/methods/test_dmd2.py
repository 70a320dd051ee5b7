"""DMD2 and DMD1's regression as algorithms: who learns from what, and what is left of them at weight 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_roles import dmd, make, prompts, real_latents, rng, same, tiny_roles, updates, watch
from torch import Tensor

from gdmd.config.methods.dmd2 import DMD2Config
from gdmd.diffusion.batches import cut
from gdmd.diffusion.sampling import ode_sample, times
from gdmd.losses.dmd import dmd_loss
from gdmd.losses.gan import discriminator_loss, generator_loss
from gdmd.methods.dmd import PairedBatch
from gdmd.methods.dmd2 import Dmd2
from gdmd.shapes.networks import ShapesDit
from gdmd.shapes.roles import LATENT_SHAPE, ShapesRoles


def dmd2(roles: ShapesRoles, **options: Any) -> Dmd2:
    return make("dmd2", roles, **options)


def head(roles: ShapesRoles) -> dict[str, Tensor]:
    assert roles.critic is not None
    return dict(roles.critic.head.named_parameters())


def test_five_updates_of_the_fake_precede_one_of_the_student() -> None:
    roles = tiny_roles(head=True)
    diary = watch(roles)
    made = [(update.role, sum(call.name == "teacher" for call in diary)) for update in updates(dmd2(roles), roles)]
    assert made == [("fake", 0)] * 5 + [("student", 1)]


def test_gan_gradient_reaches_head_and_fake_only() -> None:
    """The head and the fake score's backbone learn from the GAN; nothing else does."""
    roles = tiny_roles(head=True)
    update = next(updates(dmd2(roles, head_weight=1.0), roles))
    frozen = [*roles.teacher.net.parameters(), *roles.parameters("student").values()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    backbone = roles.parameters("fake")["blocks.0.qkv.weight"]
    batch, loss = update.batch, update.loss(update.batch)
    denoise = loss.stats["loss/fake"]
    torch.testing.assert_close(loss.per_sample.detach(), denoise + loss.stats["loss/head"])
    loss.per_sample.mean().backward()
    with_gan = backbone.grad.clone()  # type: ignore[union-attr]
    assert all(weights.grad is not None and weights.grad.any() for weights in head(roles).values())
    assert all(parameter.grad is None for parameter in frozen)
    backbone.grad = None
    dmd2(roles).fake_loss(batch).per_sample.mean().backward()
    assert not torch.allclose(with_gan, backbone.grad)  # type: ignore[arg-type]


def test_the_student_follows_a_frozen_head() -> None:
    roles = tiny_roles(head=True)
    method = dmd2(roles, gan_weight=1.0)
    update = next(updates(method, roles, role="student"))
    batch = update.batch
    update.loss(batch).per_sample.mean().backward()
    others = [*roles.parameters("fake").values(), *roles.teacher.net.parameters()]
    assert all(parameter.grad is None for parameter in others)
    assert all(parameter.requires_grad for parameter in roles.parameters("fake").values())
    x0 = roles.student(batch.x_tau, batch.tau, batch.cond).x0
    t = batch.t[:, None, None, None]
    assert roles.critic is not None
    logit = roles.critic((1 - t) * x0 + t * batch.eps, batch.t, batch.cond)
    wanted = dmd_loss(x0, batch.x_tar) + generator_loss(logit)
    torch.testing.assert_close(update.loss(batch).per_sample, wanted, rtol=1e-5, atol=1e-6)
    parameters = list(roles.parameters("student").values())
    for parameter, grad in zip(parameters, torch.autograd.grad(wanted.mean(), parameters), strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


def test_a_student_update_moves_the_logit_toward_real() -> None:
    roles = tiny_roles(head=True)
    method = dmd2(roles, gan_weight=1.0)
    update = next(updates(method, roles, role="student"))
    before = update.loss(update.batch).stats["loss/gan"].mean()
    for parameter in roles.parameters("student").values():
        (grad,) = torch.autograd.grad(update.loss(update.batch).per_sample.mean(), parameter)
        parameter.data.sub_(1e-3 * grad)
    assert update.loss(update.batch).stats["loss/gan"].mean() < before


def test_the_head_tells_real_latents_from_the_students() -> None:
    roles = tiny_roles(head=True)
    method = dmd2(roles, head_weight=1.0, gan_high=0.5)
    fakes = [update.loss(update.batch).stats for step in range(12) for update in updates(method, roles, step, "fake")]
    gaps = [(stats["gan/real"] - stats["gan/student"]).mean().item() for stats in fakes]
    assert gaps[-1] > gaps[0] + 0.2
    assert discriminator_loss(torch.tensor(9.0), torch.tensor(-9.0)) < 1e-3


def test_head_sees_independent_noise() -> None:
    """Real and student latents get independent, fresh noise in each update."""
    roles = tiny_roles(head=True)
    seen = [update.batch for update in updates(dmd2(roles, gan_low=0.2, gan_high=0.7), roles, role="fake")]
    clocks = torch.stack([t for batch in seen for t in (batch.real.t, batch.student.t, batch.t)])  # [15, B]
    assert all(len(own.unique()) == len(own) for own in clocks.T)
    assert all(0.2 < t < 0.7 for batch in seen for t in (*batch.real.t, *batch.student.t))
    t = seen[0].real.t[:, None, None, None]
    eps = (seen[0].real.x_t - (1 - t) * real_latents(prompts(), rng())) / t
    assert 0.8 < eps.std() < 1.2


def test_head_belongs_to_the_fake_and_its_seed() -> None:
    """Its weights are parameters of the fake score and depend on its seed only."""
    state = torch.random.get_rng_state()
    first, second = tiny_roles(head=True), tiny_roles(head=True)
    assert {name for name in first.parameters("fake") if name.startswith("gan_head.")} == {
        f"gan_head.{name}" for name in head(first)
    }
    assert same(head(first), head(second))
    torch.random.set_rng_state(state)
    before = torch.random.get_rng_state()
    ShapesRoles(ShapesDit(width=32, depth=1), head_seed=5)
    other = ShapesRoles(ShapesDit(width=32, depth=1), head_seed=6)
    assert not same(head(first), head(other)) and not torch.equal(before, torch.random.get_rng_state())
    assert not any(name.startswith("gan_head.") for name in tiny_roles().parameters("fake"))


def test_a_gan_without_a_head_or_without_real_latents_is_refused() -> None:
    roles = tiny_roles()
    with pytest.raises(ValueError, match="these roles have no head"):
        dmd2(roles)
    judged = tiny_roles(head=True)
    with pytest.raises(ValueError, match="no real latents"):
        Dmd2(DMD2Config(), judged, LATENT_SHAPE, "velocity", critic=judged.critic)
    with pytest.raises(ValueError, match="a head that is never trained"):
        DMD2Config(head_weight=0.0)


REGRESSION = {"regression_weight": 0.25, "regression_steps": 3}


def test_regression_on_ode_pairs() -> None:
    """It is added to L_DMD, on pairs from the teacher's ODE."""
    roles = tiny_roles()
    method = dmd(roles, guidance=1.0, **REGRESSION)
    update = next(updates(method, roles, role="student"))
    batch = update.batch
    assert isinstance(batch, PairedBatch)
    solved = ode_sample(roles.teacher, batch.pairs.noise, times(3), prompts().cond, roles.schedule)
    torch.testing.assert_close(batch.pairs.x0_ode, solved)
    x0 = roles.student(batch.pairs.noise, torch.ones(4), prompts().cond).x0
    wanted = method.student_loss(batch).per_sample + 0.25 * (x0 - solved).square().mean((1, 2, 3))
    torch.testing.assert_close(update.loss(batch).per_sample, wanted)
    parts = [update.loss(cut(batch, k, k + 1, 4)).per_sample for k in range(4)]
    torch.testing.assert_close(torch.cat(parts), wanted, rtol=1e-4, atol=1e-6)


def test_the_pairs_are_those_of_the_guided_teacher() -> None:
    roles = tiny_roles()
    one, five = (dmd(roles, guidance=g, **REGRESSION).pairs.at(0, prompts(), rng()) for g in (1.0, 5.0))
    assert torch.equal(one.noise, five.noise) and not torch.allclose(one.x0_ode, five.x0_ode, atol=1e-3)


def test_pairs_are_kept_or_fresh() -> None:
    """Kept pairs are solved once and used in turn, fresh ones are solved every time."""
    roles = tiny_roles()
    diary = watch(roles)
    kept = dmd(roles, regression_batches=2, **REGRESSION).pairs
    pairs = [kept.at(step, prompts(), rng(step)) for step in range(5)]
    assert sum(call.name == "teacher" for call in diary) == 2 * 3
    for one, other in ((0, 2), (0, 4), (1, 3)):
        assert torch.equal(pairs[one].noise, pairs[other].noise) and torch.equal(pairs[one].x0_ode, pairs[other].x0_ode)
    assert not torch.equal(pairs[0].noise, pairs[1].noise)
    fresh = dmd(roles, regression_batches=0, **REGRESSION).pairs
    noises = [fresh.at(step, prompts(), rng(step)).noise for step in range(3)]
    assert not torch.equal(noises[0], noises[2]) and not fresh.state()
