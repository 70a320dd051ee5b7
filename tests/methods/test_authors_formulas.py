"""The baselines' losses and samples against the formulas of their authors' code, written again in numpy float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tiny_roles import Toy, grouped, make, prompts, real_latents, rng, tiny_roles, train, updates
from torch import Tensor

from gdmd.config.methods.dmd_reward import DMDGRPOConfig, DMDNFTConfig
from gdmd.data.prompts import PromptStream
from gdmd.diffusion.rng import SampleRng
from gdmd.methods.rollouts import collect
from gdmd.shapes.roles import LATENT_SHAPE, ShapesRoles, ShapesTextEncoder
from gdmd.types import PromptBatch

STAGE_2: dict[str, dict[str, Any]] = {"dmd_refl": {}, "dmdr": {"cold_start": 0, "anneal": 0}}
BASELINES = ["dmd", "dmd2", "dmdr", "dmd_refl", "dmd_nft", "dmd_grpo"]


def array(value: Tensor) -> np.ndarray:
    return value.detach().double().numpy()


def halved_dmd(roles: ShapesRoles, batch: Any) -> np.ndarray:
    """0.5 mse(x0, x0 - grad) of their code, per sample."""
    x0 = roles.student(batch.x_tau, batch.tau, batch.cond).x0
    return 0.5 * ((array(x0) - array(batch.x_tar)) ** 2).mean((1, 2, 3))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def test_dmd2_weights_are_those_of_its_sdxl_script() -> None:
    """Student: 0.5 mse + 5e-3 softplus(-D), here doubled. Fake: mse + 1e-2 (softplus(D(fake)) + softplus(-D(real)))."""
    roles = tiny_roles(head=True)
    assert roles.critic is not None
    made = updates(make("dmd2", roles), roles)
    first = next(made)
    real, student = (
        array(roles.critic(one.x_t, one.t, first.batch.cond)) for one in (first.batch.real, first.batch.student)
    )
    v = array(roles.fake(first.batch.x_t, first.batch.t, first.batch.cond).velocity)
    denoise = ((v - array(first.batch.eps - first.batch.x0)) ** 2).mean((1, 2, 3))
    wanted = denoise + 1e-2 * (softplus(student) + softplus(-real))
    np.testing.assert_allclose(array(first.loss(first.batch).per_sample), wanted, rtol=1e-5)
    last = list(made)[-1]  # handed out before it was applied, so its batch is still right; the student moved
    x0 = roles.student(last.batch.x_tau, last.batch.tau, last.batch.cond).x0
    t = last.batch.t[:, None, None, None]
    logit = array(roles.critic((1 - t) * x0 + t * last.batch.eps, last.batch.t, last.batch.cond))
    theirs = halved_dmd(roles, last.batch) + 5e-3 * softplus(-logit)
    np.testing.assert_allclose(array(last.loss(last.batch).per_sample), 2 * theirs, rtol=1e-5)


@pytest.mark.parametrize("kind", STAGE_2)
def test_refl_weights_are_those_of_dmdrs_code(kind: str) -> None:
    """0.5 mse + 0.3 relu(0.7 - R_1) + 0.3 relu(0.7 - R_2), here doubled."""
    roles = tiny_roles()
    rewards = (Toy(), Toy("other", 1, factor=3.0, offset=-1.0))
    (update,) = updates(make(kind, roles, *rewards, **STAGE_2[kind]), roles, role="student")
    batch = update.batch
    shown = array(roles.student(batch.x_tau, batch.tau, batch.cond).x0)
    image = 1 / (1 + np.exp(-shown[:, :3]))
    first, second = image[:, 0].mean((1, 2)), 3 * image[:, 1].mean((1, 2)) - 1
    theirs = halved_dmd(roles, batch) + 0.3 * np.maximum(0.7 - first, 0) + 0.3 * np.maximum(0.7 - second, 0)
    np.testing.assert_allclose(array(update.loss(batch).per_sample), 2 * theirs, rtol=1e-5)


@dataclass
class Fixed:
    """Given scores."""

    scores: tuple[float, ...]
    name: str = "fixed"
    differentiable: bool = False

    def score(self, images: Tensor, batch: PromptBatch) -> Tensor:
        return torch.tensor(self.scores)


PICK = (0.82, 0.86, 0.79, 0.84, 0.91, 0.88, 0.90, 0.87)
CLIP = (0.31, 0.27, 0.33, 0.30, 0.24, 0.29, 0.22, 0.26)


@pytest.mark.parametrize("cfg", [DMDNFTConfig(images_per_prompt=4), DMDGRPOConfig(images_per_prompt=4)])
def test_rewards_are_added_before_they_are_normalized(cfg: Any) -> None:
    """multi_score and PerPromptStatTracker of DiffusionNFT and Flow-GRPO: (R - mean_prompt) / std_batch, R = sum_k R_k."""
    roles, batch = tiny_roles(), grouped()
    scorer = make(cfg.kind, roles, Fixed(PICK), Fixed(CLIP, "other")).scorer
    found = collect(roles.student, roles.schedule, scorer, cfg, batch, rng(0, batch), LATENT_SHAPE)
    total = np.array(PICK) + np.array(CLIP)
    mean = np.repeat([total[:4].mean(), total[4:].mean()], 4)
    np.testing.assert_allclose(array(found.advantage), (total - mean) / total.std(), rtol=1e-4)
    single = [(np.array(r) - np.repeat([np.mean(r[:4]), np.mean(r[4:])], 4)) / np.std(r) for r in (PICK, CLIP)]
    assert np.abs(array(found.advantage) - np.mean(single, 0)).max() > 0.1  # not each reward by its own spread


def test_nft_samples_come_from_the_old_policy() -> None:
    """x' = (1 - t') x0_old + t' n at noise level 1; r = clip(A, -5, 5) / 10 + 1/2."""
    roles = tiny_roles()
    method = make("dmd_nft", roles, images_per_prompt=4, fake_updates=1)
    train(method, roles, 3, batch=grouped())
    draws, batch = rng(3, grouped()), grouped()
    with torch.no_grad():
        x, steps = draws.normal("policy_noise", LATENT_SHAPE), (1.0, 0.75, 0.5, 0.25)
        for i, t in enumerate(steps):
            x0 = roles.old(x, torch.full((8,), t), batch.cond).x0
            if i < 3:
                x = (1 - steps[i + 1]) * x0 + steps[i + 1] * draws.normal("policy_rollout", LATENT_SHAPE, i + 1)
    (update,) = updates(method, roles, 3, "student", batch)
    torch.testing.assert_close(update.batch.x_s, x0, rtol=1e-4, atol=1e-5)
    brightness = (1 / (1 + np.exp(-array(x0)[:, 0]))).mean((1, 2))
    advantage = brightness - np.repeat([brightness[:4].mean(), brightness[4:].mean()], 4)
    wanted = np.clip(advantage / brightness.std(), -5, 5) / 10 + 0.5
    np.testing.assert_allclose(array(update.batch.r), wanted, atol=2e-3)


def test_nft_samples_differ_from_the_students() -> None:
    """The old policy's samples differ from the student's once the student has moved away from its EMA."""
    roles = tiny_roles()
    method = make("dmd_nft", roles, images_per_prompt=4, fake_updates=1)
    train(method, roles, 3, batch=grouped())
    args = (roles.schedule, method.scorer, method.cfg, grouped(), rng(3, grouped()), LATENT_SHAPE)
    old, own = (collect(policy, *args).trajectory.x0 for policy in (roles.old, roles.student))
    assert not torch.allclose(old, own, atol=1e-5)


# ---------------------------------------------------------------- fresh samples


def stream(group: int = 1) -> PromptStream:
    texts = ["a circle", "a red square", "two rings", "a circle and a square", "three rings", "a blue square"]
    return PromptStream([texts], ShapesTextEncoder(), 8, 1, group)


def fake_batches(kind: str, **options: Any) -> list[Any]:
    """Every batch of iteration 2: the fake score's, then the student's."""
    roles = tiny_roles(head=kind == "dmd2")
    grouped_kind = {"images_per_prompt": 4} if kind in ("dmd_nft", "dmd_grpo") else {}
    method = make(kind, roles, fake_updates=3, **grouped_kind, **options)
    batch = stream(method.cfg.prompt_group).at(2)
    return [update.batch for update in updates(method, roles, 2, batch=batch)]


@pytest.mark.parametrize("kind", BASELINES)
def test_every_fake_update_has_prompts_noise_and_rollout_of_its_own(kind: str) -> None:
    *fakes, student = fake_batches(kind)
    group = 4 if kind in ("dmd_nft", "dmd_grpo") else 1
    tokens = [stream(group).at(2, draw=i).cond["tokens"] for i in range(3)]
    for batch, own in zip(fakes, tokens, strict=True):
        assert torch.equal(batch.cond["tokens"], own)
    assert torch.equal(student.cond["tokens"], tokens[0]) and not torch.equal(tokens[0], tokens[1])
    for i, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.isclose(fakes[i].x0, fakes[other].x0).flatten(1).all(1).any()


@pytest.mark.parametrize("kind", BASELINES)
def test_shared_samples_change_the_other_fake_updates_only(kind: str) -> None:
    *shared, student = fake_batches(kind, fake_samples="shared")
    *fresh, own = fake_batches(kind)
    assert all(torch.equal(batch.x0, shared[0].x0) for batch in shared)
    assert torch.equal(fresh[0].x0, shared[0].x0) and torch.equal(own.x_tau, student.x_tau)
    assert all(torch.equal(a.t, b.t) and torch.equal(a.eps, b.eps) for a, b in zip(fresh, shared, strict=True))


def test_rollout_of_a_fake_update() -> None:
    """A fake update learns from a rollout of independent draws, with the weights before the student's update."""
    roles = tiny_roles()
    method = make("dmd", roles, fake_updates=2, student_steps=(1.0,))
    batch = stream().at(2)
    _, second, _ = (update.batch for update in updates(method, roles, 2, batch=batch))
    other = stream().at(2, draw=1)
    noise = SampleRng(11, 2, batch.index, scope="fake_samples/1/").normal("noise", LATENT_SHAPE)
    before = tiny_roles()
    torch.testing.assert_close(second.x0, before.student(noise, torch.ones(8), other.cond).x0)


def test_real_latents_of_the_head_are_fresh() -> None:
    """The GAN head sees the real latents of each update's own prompts."""
    fakes = fake_batches("dmd2", gan_low=0.0, gan_high=1e-6)[:-1]
    seen = [batch.real.x_t for batch in fakes]  # nearly without noise
    for i, x_t in enumerate(seen):
        draws = rng(2, stream().at(2))
        wanted = real_latents(stream().at(2, draw=i), draws.scoped(f"fake_samples/{i}") if i else draws)
        torch.testing.assert_close(x_t, wanted, rtol=1e-4, atol=1e-4)


def test_statistics_are_those_of_the_students_batch() -> None:
    found = []
    for samples in ("fresh", "shared"):
        roles = tiny_roles()
        method = make("dmd", roles, fake_updates=2, fake_samples=samples)
        for _ in updates(method, roles, batch=prompts()):
            pass
        found.append(method.stats()["latent/std"])
    assert torch.equal(*found)
