"""The rewards' own gradient at finished ends, as a move of GDMD's targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_roles import Toy, ToyCodec, first_student, gdmd, prompts, rng, same, tiny_roles, train, updates
from torch import Tensor

from gdmd.config.load import ConfigError
from gdmd.config.methods.gdmd import GdmdConfig
from gdmd.methods.gdmd import StudentBatch
from gdmd.recipes.call_counts import tally
from gdmd.recipes.read import read_recipe

ON: dict[str, Any] = {
    "score_target": "continuation",
    "continuations": 3,
    "continuation_weight": 1.0,
    "weighting": "softmax",
    "group_size": 1,
    "normalize": False,
}
WEIGHT = 0.25
Z = torch.tensor([0.5, 2.0], dtype=torch.float64)


def targets(weight: float, *rewards: Toy, scale: Tensor | None = Z, **options: Any) -> tuple[Tensor, Any]:
    """x_tar of the first student update, and the method's ends; Z is set to ``scale`` before."""
    roles = tiny_roles()
    method = gdmd(roles, *rewards, **ON | {"reward_gradient": weight} | options)
    if scale is not None:
        one = torch.ones(len(rewards), dtype=torch.float64)
        method.scale.mean, method.scale.weight = scale[: len(rewards)].clone(), one
    with torch.no_grad():
        group = method._continue(method.rollout(prompts(), rng()), prompts(), rng())
    batch = first_student(method, roles).batch
    assert isinstance(batch, StudentBatch)
    return batch.x_tar, group


def slope(y: Tensor, channel: int, factor: float) -> Tensor:
    """d / dy of factor x mean over pixels of sigmoid(y_channel), by hand."""
    own = torch.zeros_like(y)
    bright = torch.sigmoid(y[:, channel])
    own[:, channel] = factor * bright * (1 - bright) / y[0, channel].numel()
    return own


def test_the_target_moves_up_the_mean_gradient_of_two_ends() -> None:
    """w N / 2 x mean over the two ends of d/dy mean_k R_k / Z_k, whatever the end that the target leans to."""
    rewards = (Toy(), Toy("other", 1, factor=3.0))
    plain, _ = targets(0.0, *rewards)
    moved, group = targets(WEIGHT, *rewards)
    y = group.ends.double()
    merit = [0.5 * (slope(y[:, k], 0, 1.0) / Z[0] + slope(y[:, k], 1, 3.0) / Z[1]) for k in (0, 1)]
    want = WEIGHT * y[0, 0].numel() / 2 * (merit[0] + merit[1]) / 2
    assert want.abs().max() > 0.05
    torch.testing.assert_close((moved - plain).double(), want[:, None].expand_as(moved).double(), rtol=1e-4, atol=1e-5)


def test_with_the_normalizer_the_move_is_divided_as_the_gradient_is() -> None:
    free = targets(WEIGHT, Toy())[0] - targets(0.0, Toy())[0]
    divided = targets(WEIGHT, Toy(), normalize=True)[0] - targets(0.0, Toy(), normalize=True)[0]
    n = (free.flatten(2).norm(dim=2) / divided.flatten(2).norm(dim=2))[:, :, None, None, None]
    torch.testing.assert_close(divided * n, free, rtol=1e-3, atol=1e-5)
    assert n.std() > 0  # each sample has its own


def test_a_step_on_the_loss_is_the_step_of_a_reward_loss_at_the_ends() -> None:
    """d/dx0 of the mean square to the moved target = that of DMD minus w x the reward's gradient."""
    (plain, _), (moved, group) = targets(0.0, Toy()), targets(WEIGHT, Toy())
    x0 = torch.zeros_like(plain[:, 0]).requires_grad_()
    grads = [
        torch.autograd.grad((x0 - x_tar[:, 0]).square().flatten(1).mean(1).sum(), x0)[0] for x_tar in (plain, moved)
    ]
    own = (slope(group.ends[:, 0], 0, 1.0) + slope(group.ends[:, 1], 0, 1.0)) / 2 / Z[0]
    torch.testing.assert_close(grads[0] - grads[1], WEIGHT * own.float(), rtol=1e-3, atol=1e-6)


def test_an_unscored_sample_and_the_first_step_have_no_move() -> None:
    plain, _ = targets(0.0, Toy(unscored=(2,)))
    moved, _ = targets(WEIGHT, Toy(unscored=(2,)))
    still = [torch.equal(moved[i], plain[i]) for i in range(4)]
    assert still == [False, False, True, False] and moved.isfinite().all()
    assert torch.equal(targets(WEIGHT, Toy(), scale=None)[0], targets(0.0, Toy(), scale=None)[0])


def test_scores_come_from_the_same_decoding_and_only_two_ends_are_differentiated() -> None:
    roles, codec = tiny_roles(), ToyCodec()
    method = gdmd(roles, codec=codec, **ON, reward_gradient=WEIGHT)
    list(updates(method, roles))
    assert [latents.requires_grad for latents in codec.shown] == [True, True, False]
    counted = tally(read_recipe("shapes_gdmd", ["method.reward_gradient=0.1"]))
    assert (counted.steered, counted.decoded) == (2, 6)


def test_the_shuffled_control_gives_every_sample_the_gradient_of_another() -> None:
    """The moves are those of the batch, none with its owner, and other owners in another step."""
    _, plain = targets(WEIGHT, Toy())
    _, mixed = targets(WEIGHT, Toy(), control="shuffled")
    apart = (mixed.pull[:, None] - plain.pull[None]).flatten(2).abs().sum(2)  # [to, from]
    source = apart.argmin(1)
    assert torch.equal(apart.min(1).values, torch.zeros(4)) and sorted(source.tolist()) == [0, 1, 2, 3]
    assert (source != torch.arange(4)).all()
    method = gdmd(tiny_roles(), **ON, reward_gradient=WEIGHT, control="shuffled")
    orders = [method._pass_on(torch.arange(4), prompts(), rng(step)) for step in range(8)]
    assert len({tuple(order.tolist()) for order in orders}) > 2
    assert torch.equal(orders[0], method._pass_on(torch.arange(4), prompts(), rng(0)))


def test_the_shuffled_control_of_one_sample_is_refused_before_it_trains() -> None:
    words = ["method.reward_gradient=0.1", "method.control=shuffled", "loop.batch_size=1"]
    with pytest.raises(ConfigError, match="the gradient of another, and loop.batch_size is 1; give 2 or more"):
        read_recipe("shapes_gdmd", words)
    assert read_recipe("shapes_gdmd", words[1:]).loop.batch_size == 1  # scores alone are shuffled over the group


def test_weight_zero_is_the_run_without_it_and_another_weight_is_not() -> None:
    runs = []
    for weight in (None, 0.0, WEIGHT):
        roles = tiny_roles()
        own = {} if weight is None else {"reward_gradient": weight}
        runs.append(train(gdmd(roles, **ON, **own), roles, steps=3))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_a_black_box_is_refused_only_where_its_gradient_is_wanted() -> None:
    box = Toy("box", differentiable=False)
    with pytest.raises(ValueError, match="gdmd with reward_gradient back-propagates its rewards, and box is not"):
        gdmd(tiny_roles(), box, **ON, reward_gradient=WEIGHT)
    gdmd(tiny_roles(), box, **ON)
    gdmd(tiny_roles(), box, **ON, reward_gradient=WEIGHT, gamma=0.0)  # no reward is used at all


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_target": "raw"}, "reward_gradient 0.1 is taken at finished ends"),
        ({"control": "constant"}, "control 'constant' does not reach reward_gradient 0.1.*or control 'shuffled'"),
        ({"control": "indicator"}, "control 'indicator' does not reach reward_gradient"),
    ],
)
def test_settings_that_do_not_go_with_it_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GdmdConfig.model_validate(ON | {"reward_gradient": 0.1} | options)
