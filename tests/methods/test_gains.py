"""Construction gain, realized gain and the spread of rewards inside a group, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_roles import Toy, dmd, gdmd, make, prompts, same, tilted, tiny_roles, train, updates
from torch import Tensor

from gdmd.methods.base import Constructed
from gdmd.methods.gains import gains_hook
from gdmd.methods.score_stats import group_spread, optimality_stats
from gdmd.types import Cond, Prediction


class Identity:
    """Latents are images."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3]

    def encode(self, images: Tensor) -> Tensor:
        return images


@pytest.mark.parametrize("make_method", [gdmd, tilted])
def test_gains_in_units_of_z(monkeypatch: pytest.MonkeyPatch, make_method: type) -> None:
    """x0 is gray 0.3, x_tar 0.5 and the new x0 0.36; rewards 1 and 10 times the gray, Z 0.5 and 2: means 0.7 and 0.21."""
    roles = tiny_roles()
    method = make_method(roles, Toy(factor=1.0), Toy(name="ten", factor=10.0, unscored=(2,)))
    for _ in updates(method, roles):
        pass
    rollout = method.constructed.rollout
    gray = [torch.full_like(rollout.x0, value) for value in (0.3, 0.5, 0.36)]
    object.__setattr__(rollout, "x0", gray[0])
    method.constructed = Constructed(rollout, gray[1], prompts())
    method.scale.load({"scale.mean": torch.tensor([0.5, 2.0]).double(), "scale.weight": torch.ones(2).double()})
    object.__setattr__(method.scorer, "codec", Identity())

    def student(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        assert x_t is rollout.x_tau and t is rollout.tau
        return Prediction(gray[2], gray[2])

    monkeypatch.setattr(roles, "student", student)
    found = gains_hook(method)()
    assert found["gain/construction"] == pytest.approx((0.2 / 0.5 + 2.0 / 2.0) / 2, rel=1e-5)
    assert found["gain/realized"] == pytest.approx((0.06 / 0.5 + 0.6 / 2.0) / 2, rel=1e-4)


@pytest.mark.parametrize("kind", ["gdmd", "constant", "shuffled", "indicator"])
def test_target_of_algorithm_1_is_where_its_losses_are_least(kind: str) -> None:
    """The mean gradient of the eta student losses with respect to x0 is 0 there, also with an EMA old policy."""
    roles = tiny_roles()
    own = {"kind": "gdmd"} if kind == "gdmd" else {"kind": "gdmd_ablation", "control": kind}
    options = {"gamma": 0.7, "beta": 0.8, "dmd_weight": 0.9, "old_policy": "ema", "scored_step": 1.0, "group_size": 3}
    method = make(roles=roles, **own, **options)
    batches = [update for update in updates(method, roles) if update.role == "student"]
    x0 = method.constructed.x_tar.clone().requires_grad_()
    losses = []
    for update in batches:
        roles.student = lambda *_: Prediction(x0, x0)
        losses.append(update.loss(update.batch).per_sample.sum())
    (gradient,) = torch.autograd.grad(sum(losses), x0)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("make_method", [gdmd, tilted])
def test_measuring_changes_nothing(make_method: type) -> None:
    """Same weights and the same statistics of the scores with a measurement after each iteration."""
    ends, stats = [], []
    for measured in (True, False):
        roles = tiny_roles()
        method = make_method(roles)
        for step in range(2):
            train(method, roles, 1, step)
            if measured:
                found = gains_hook(method)()
                assert all(math.isfinite(value) for value in found.values()) and len(found) == 2
                assert gains_hook(method)() == found
        ends.append({role: dict(roles.parameters(role)) for role in ("student", "fake")})
        stats.append(method.scorer.stats())
    assert all(same(ends[0][role], ends[1][role]) for role in ends[0]) and same(*stats)


def test_nothing_is_measured_without_rewards() -> None:
    for build in (dmd, lambda roles: gdmd(roles, gamma=0.0), lambda roles: tilted(roles, gamma=0.0)):
        roles = tiny_roles()
        method = build(roles)
        assert gains_hook(method)() == {}
        train(method, roles, 1)
        assert gains_hook(method)() == {}


def test_spread_of_rewards_inside_a_group() -> None:
    """Two groups of three; one score is missing. n - 1 in every variance."""
    nan = math.nan
    own = torch.tensor([[[1.0, 10.0], [2.0, nan], [3.0, 14.0]]])  # [R, K, B]
    found = group_spread([Toy()], own)
    assert found["reward/brightness/group_std"] == pytest.approx((1.0 + math.sqrt(8)) / 2)
    whole = torch.tensor([1.0, 2.0, 3.0, 10.0, 14.0]).std().item()
    assert found["reward/group_share"] == pytest.approx((1.0 + math.sqrt(8)) / 2 / whole)
    constant = group_spread([Toy()], torch.ones(1, 3, 2))
    assert constant["reward/brightness/group_std"] == 0 and math.isnan(constant["reward/group_share"])


def test_one_target_has_no_spread() -> None:
    roles = tiny_roles()
    method = gdmd(roles, group_size=1)
    train(method, roles, 1)
    assert not any("group_" in key for key in method.stats())
    method = tilted(roles, group_size=1)
    train(method, roles, 1)
    assert "reward/group_share" in method.stats()


def test_shares_of_r_are_those_of_scored_targets() -> None:
    r = torch.tensor([[0.0, 1.0, 0.3, 0.7, torch.nan, torch.nan, torch.nan, torch.nan]])
    stats = optimality_stats([Toy()], torch.zeros(1, 1, 8), torch.zeros(1, 8), r, r)
    assert stats["weight/share_below_half"] == stats["weight/share_clipped"] == 0.5
    assert [stats[f"histogram/r_{k}"].item() for k in range(10)] == [0.25, 0, 0, 0.25, 0, 0, 0, 0.25, 0, 0.25]
