"""The controls: what they replace, and that they keep everything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_roles import Toy, gdmd, make, plain_dmd, prompts, rng, scored, tilted, tiny_roles, updates

from gdmd.config.load import ConfigError
from gdmd.methods.gdmd_ablations import exchanged
from gdmd.recipes.read import read_recipe


def control(name: str, roles: Any, *rewards: Toy) -> Any:
    return make("gdmd_ablation", roles, *rewards, group_size=3, control=name)


def test_shuffled_r_belongs_to_other_samples() -> None:
    first, second, third = tiny_roles(), tiny_roles(), tiny_roles()
    plain, mixed = scored(gdmd(first), first), scored(control("shuffled", second), second)
    assert torch.equal(plain.flatten().sort().values, mixed.flatten().sort().values)
    assert not torch.equal(plain, mixed)
    assert torch.equal(scored(control("shuffled", third), third), mixed)


def test_constant_r_is_its_running_mean() -> None:
    first, second = tiny_roles(), tiny_roles()
    plain, constant = scored(gdmd(first), first), scored(control("constant", second), second)
    torch.testing.assert_close(constant, torch.full_like(constant, plain.mean().item()))
    method = control("constant", second)
    means = [float(method.running_mean(torch.tensor([v]))) for v in (0.2, 0.8)]
    assert means[0] == pytest.approx(0.2) and means[1] == pytest.approx((0.99 * 0.2 + 0.8) / 1.99)


def test_constant_r_leaves_unscored_samples_out() -> None:
    """After a step without any score the running mean still works."""
    roles = tiny_roles()
    reward = Toy(unscored=(0, 1, 2, 3))
    method = control("constant", roles, reward)
    assert scored(method, roles).isnan().all()
    reward.unscored = (1,)
    r = scored(method, roles, 1)
    assert r[:, 1].isnan().all() and r[:, [0, 2, 3]].isfinite().all()


def test_indicator_keeps_improving_targets_only() -> None:
    """Targets with r > 1/2 and unscored ones have weight lambda, the others 0."""
    roles, kept = tiny_roles(), []
    method = make("gdmd_ablation", roles, Toy(unscored=(3,)), group_size=3, control="indicator", dmd_weight=2.0)
    for update in updates(method, roles, role="student"):
        batch = update.batch
        keep = torch.where(batch.r.isnan(), True, batch.r > 0.5)
        assert torch.equal(update.loss(batch).per_sample, 2.0 * keep * plain_dmd(roles, batch))
        kept.append(keep)
    assert method.stats()["weight/mean"] == 2.0 * torch.stack(kept).float().mean()


def test_shuffled_tilt_keeps_the_rollouts() -> None:
    """The same finished rollouts, other weights, of mean one; only here the sample's own score matters."""
    roles = tiny_roles()
    r = tilted(roles).rollout(prompts(), rng())
    weights = []
    for kind in ("gdmd_tilted", "gdmd_tilted_shuffled"):
        method = tilted(roles, Toy(), kind=kind)
        finished = method.finish(r, prompts(), rng())
        weights.append((finished.y, method.weigh(finished, r, prompts(), rng())))
        assert ("reward/gain" in method.stats()) == (kind == "gdmd_tilted_shuffled")
    assert torch.equal(weights[0][0], weights[1][0]) and not torch.equal(weights[0][1], weights[1][1])
    torch.testing.assert_close(weights[1][1].mean((0, 1)), torch.ones(4))


def test_no_sample_keeps_its_shuffled_gradient() -> None:
    """The gradients are those of the batch, and go to other samples in another step."""
    roles = tiny_roles()
    found = []
    for kind in ("gdmd_tilted", "gdmd_tilted_shuffled"):
        method = tilted(roles, kind=kind, reward_gradient=0.25)
        method.scale.mean = method.scale.weight = torch.ones(1, dtype=torch.float64)  # Z = 1
        found.append(method.finish(method.rollout(prompts(), rng()), prompts(), rng()).gradient)
    apart = (found[1][:, None] - found[0][None]).flatten(2).abs().sum(2)  # [to, from]
    source = apart.argmin(1)
    assert torch.equal(apart.min(1).values, torch.zeros(4)) and sorted(source.tolist()) == [0, 1, 2, 3]
    assert (source != torch.arange(4)).all()
    orders = [exchanged(torch.arange(4), prompts(), rng(step)) for step in range(8)]
    assert len({tuple(order.tolist()) for order in orders}) > 2
    assert torch.equal(orders[0], exchanged(torch.arange(4), prompts(), rng(0)))


def test_one_sample_cannot_exchange_gradients() -> None:
    words = ["method.kind=gdmd_tilted_shuffled", "method.reward_gradient=0.1", "loop.batch_size=1"]
    with pytest.raises(ConfigError, match="the reward gradient of another, and loop.batch_size is 1; give 2 or more"):
        read_recipe("shapes_gdmd", words)
    assert read_recipe("shapes_gdmd", [words[0], words[2]]).loop.batch_size == 1  # scores are shuffled over the group


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gdmd", {"gamma": 0}, "dmd_weight 0 and gamma 0 leave the student no loss"),
        ("gdmd_ablation", {"control": "indicator"}, "'indicator' has no loss but L_DMD, whose dmd_weight is 0"),
        ("gdmd_tilted", {}, "dmd_weight"),
    ],
)
def test_a_student_without_a_loss_is_refused(kind: str, options: dict[str, Any], message: str) -> None:
    """AdamW would train on with a gradient of 0."""
    make(kind, tiny_roles(), **options)
    with pytest.raises(ValidationError, match=message):
        make(kind, tiny_roles(), dmd_weight=0, **options)


@pytest.mark.parametrize(("kind", "message"), [
    ("gdmd_ablation", "control 'shuffled' changes r, which gamma = 0 does not use"),
    ("gdmd_tilted_shuffled", "permutes scores, which gamma = 0 does not use"),
])  # fmt: skip
def test_controls_need_rewards(kind: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make(kind, tiny_roles(), gamma=0.0)
