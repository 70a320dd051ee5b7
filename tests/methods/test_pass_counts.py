"""Costs and divergence of a method, measured from outside, against what the algorithms say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pass_formulas import every_place, iteration_passes
from tiny_roles import LR, ToyCodec, apply, dmd, gdmd, prompts, rng, same, tiny_roles, weights
from torch import Tensor

from gdmd.config.run import RunConfig
from gdmd.methods.pass_counter import CountedMethod, without_cost
from gdmd.recipes.call_counts import count_calls, dry_run, forward_passes
from gdmd.recipes.read import read_recipe
from gdmd.shapes.roles import LATENT_SHAPE, ShapesRoles
from gdmd.sweep.divergence import divergence, fixed_states, realized_change, student_gradient
from gdmd.types import Method, PromptBatch

ONE_STEP = {"student_steps": (1.0,)}
BATCH = len(prompts())


def counted(method: Method, roles: ShapesRoles) -> CountedMethod:
    return CountedMethod(method, [getattr(roles, name).net for name in ("student", "fake", "teacher", "old")])


def run(method: CountedMethod, roles: ShapesRoles, steps: int = 1) -> CountedMethod:
    for step in range(steps):
        for update in method.iteration(step, prompts(), rng(step)):
            apply(update, roles)
    return method


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("guidance", "teacher"), [(5.0, 2), (1.0, 1)])
def test_passes_of_gdmd_are_those_of_the_algorithm(group: int, guidance: float, teacher: int) -> None:
    """x0 once, then eta times: fake 3 (a backward is two), teacher 2 or 1, fake 1, student 3."""
    roles = tiny_roles()
    method = run(counted(gdmd(roles, group_size=group, guidance=guidance, **ONE_STEP), roles), roles)
    assert method.cost.passes == BATCH * (1 + group * (3 + teacher + 1 + 3))
    assert method.cost.updates == group and method.cost.seconds > 0


def test_passes_of_dmd() -> None:
    """Five fake score updates, each on a separate rollout, and one student update."""
    for samples, rollouts in (("fresh", 5), ("shared", 1)):
        roles = tiny_roles()
        method = run(counted(dmd(roles, fake_samples=samples, **ONE_STEP), roles), roles, steps=2)
        assert method.cost.passes == 2 * BATCH * (rollouts + 5 * 3 + 2 + 1 + 3)
        assert method.cost.updates == 2


def test_a_rollout_costs_one_pass_per_step() -> None:
    roles = tiny_roles()
    method = run(counted(dmd(roles, fake_updates=1), roles), roles)
    depth = int(rng().integer("tau", 4).sum())
    assert method.cost.passes == depth + BATCH * (1 + 3 + 2 + 1 + 3)


def test_counting_changes_nothing() -> None:
    """Counted training equals plain training; calls outside an iteration are not counted."""
    plain, watched = tiny_roles(), tiny_roles()
    for step in range(2):
        for update in gdmd_iteration(plain, step):
            apply(update, plain)
    method = run(counted(gdmd(watched), watched), watched, steps=2)
    before = method.cost.passes
    watched.student(torch.zeros(1, *LATENT_SHAPE), torch.ones(1), {"tokens": prompts().cond["tokens"][:1]})
    assert method.cost.passes == before
    assert same(weights(plain), weights(watched))


def gdmd_iteration(roles: ShapesRoles, step: int) -> Any:
    """A fresh method each step would forget Z, so one is kept per roles object."""
    method = _METHODS.setdefault(id(roles), gdmd(roles))
    return method.iteration(step, prompts(), rng(step))


_METHODS: dict[int, Any] = {}


def test_the_sums_survive_a_restart_with_the_state_of_the_method() -> None:
    roles = tiny_roles()
    before = run(counted(gdmd(roles), roles), roles)
    again = counted(gdmd(roles), roles)
    again.load(before.state())
    assert again.cost == before.cost
    assert same(dict(again.method.state()), dict(before.method.state()))
    assert without_cost(before.state()).keys() == before.method.state().keys()


@dataclass
class Partial:
    """Targets are far better (or worse) than the sample, which is scored last: every r is clipped to 1 (or 0)."""

    targets: int
    better: float
    name: str = "partial"
    differentiable: bool = False
    calls: int = field(default=0)

    def score(self, images: Tensor, batch: PromptBatch) -> Tensor:
        self.calls += 1
        return images.mean((1, 2, 3)) + (self.better if self.calls <= self.targets else 0.0)


@pytest.mark.parametrize(("better", "cosine", "weight"), [(1e4, 1.0, 2.0), (-1e4, -1.0, 0.0)])
def test_the_cosine_is_the_sign_of_2r_minus_1(better: float, cosine: float, weight: float) -> None:
    """r = 1: the gradient doubles (w = lambda + gamma beta (2r - 1)); r = 0: the reward undoes the step."""
    roles = tiny_roles()
    options: dict[str, Any] = {"group_size": 2, "guidance": 1.0}
    full = student_gradient(gdmd(roles, Partial(2, better), **options), roles, 0, prompts(), rng())
    plain = student_gradient(gdmd(roles, gamma=0.0, **options), roles, 0, prompts(), rng())
    found = divergence(full, plain)
    assert found.cosine == pytest.approx(cosine, abs=1e-4)
    assert found.weight == pytest.approx(weight, abs=1e-4) and found.ratio == pytest.approx(1.0, abs=1e-4)


def test_measuring_gradients_applies_nothing() -> None:
    """Without a reward there is no direction: the cosine is NaN."""
    roles = tiny_roles()
    before = weights(roles)
    plain = student_gradient(dmd(roles), roles, 0, prompts(), rng())
    assert same(before, weights(roles)) and plain.norm() > 0
    assert math.isnan(divergence(plain, plain).cosine)
    assert divergence(plain, plain).weight == pytest.approx(1.0)


def test_realized_change() -> None:
    """Per student update, in units of the spread."""
    roles, codec = tiny_roles(), ToyCodec()
    fixed = fixed_states(roles, prompts(), rng(), (1.0, 0.5), LATENT_SHAPE)
    assert set(fixed.tau.tolist()) <= {1.0, 0.5}
    score: Callable[[Tensor], dict[str, Tensor]] = lambda x0: {"mean": codec.decode(x0).mean((1, 2, 3)).detach()}  # noqa: E731
    assert realized_change(lambda: 3, roles, fixed, score) == {"mean": 0.0}

    def climb() -> int:
        """Two steps up the score itself."""
        parameters = list(roles.parameters("student").values())
        for _ in range(2):
            x0 = roles.student(fixed.x_tau, fixed.tau, fixed.cond).x0
            for p, g in zip(parameters, torch.autograd.grad(x0[:, :3].mean(), parameters), strict=True):
                p.data.add_(LR * g)
        return 2

    before = score(roles.student(fixed.x_tau, fixed.tau, fixed.cond).x0)["mean"]
    change = realized_change(climb, roles, fixed, score)["mean"]
    after = score(roles.student(fixed.x_tau, fixed.tau, fixed.cond).x0)["mean"]
    assert change == pytest.approx(float((after - before).mean() / before.std()) / 2, rel=1e-4) and change > 0


GROUPS = {"images_per_prompt": 4}
COSTS: dict[str, dict[str, Any]] = {
    "gdmd": {"kind": "gdmd"},
    "gdmd, old policy": {"kind": "gdmd", "old_policy": "ema"},
    "gdmd, no guidance or reward": {"kind": "gdmd", "guidance": 1.0, "gamma": 0.0},
    "gdmd, one step for all": {"kind": "gdmd", "step_draw": "batch"},
    "gdmd on data": {"kind": "gdmd", "student_input": "data"},
    "gdmd_tilted": {"kind": "gdmd_tilted", "continuations": 3, "reward_gradient": 0.1},
    "gdmd_tilted, extra fake updates": {"kind": "gdmd_tilted", "group_size": 1, "extra_fake_updates": 2},
    "dmd": {"kind": "dmd"},
    "dmd, shared samples": {"kind": "dmd", "fake_samples": "shared"},
    "dmd, regression": {"kind": "dmd", "regression_weight": 0.2, "regression_steps": 3},
    "dmd2": {"kind": "dmd2"},
    "dmd2, no GAN": {"kind": "dmd2", "gan_weight": 0.0},
    "dmdr, stage 1": {"kind": "dmdr"},
    "dmdr, refl": {"kind": "dmdr", "cold_start": 0},
    "dmdr, states of its rollout": {"kind": "dmdr", "renoise_x0": False},
    "dmdr, grpo": {"kind": "dmdr", "cold_start": 0, "strategy": "grpo", **GROUPS},
    "dmdr, dpo": {"kind": "dmdr", "cold_start": 0, "strategy": "dpo", **GROUPS},
    "dmd_refl": {"kind": "dmd_refl", "student_updates": 2},
    "dmd_nft": {"kind": "dmd_nft", "student_updates": 2, **GROUPS},
    "dmd_grpo": {"kind": "dmd_grpo", "student_updates": 2, **GROUPS},
}


@pytest.mark.parametrize("name", COSTS)
def test_dry_run_is_the_closed_form(name: str) -> None:
    cfg = RunConfig.model_validate({"name": "x", "method": COSTS[name], "loop": {"batch_size": 4, "steps": 8}})
    expected = sum(iteration_passes(cfg.method, step, every_place(cfg.method)) for step in range(2)) / 2
    runs = [dry_run(cfg, range(2), first) for first in range(len(cfg.method.student_steps))]
    counted = [forward_passes(run) * run.updates["student"] for run in runs]
    assert sum(counted) / len(counted) == pytest.approx(expected)


@pytest.mark.parametrize(("batches", "steps", "solved"), [(2, 8, 2 / 8), (8, 3000, 8 / 3000), (8, 4, 1.0), (0, 8, 1.0)])
def test_kept_pairs_are_solved_once(batches: int, steps: int, solved: float) -> None:
    """The mean over a whole run: its first iterations solve the pairs, 2 x 3 calls of the teacher each."""
    method = {"kind": "dmd", "regression_weight": 0.2, "regression_steps": 3, "regression_batches": batches}
    cfg = RunConfig.model_validate({"name": "x", "method": method, "loop": {"batch_size": 4, "steps": steps}})
    counts = count_calls(cfg)
    assert counts.passes["teacher"] == pytest.approx(2 + 6 * solved)
    assert counts.calls["teacher"] == pytest.approx(1 + 3 * solved)
    solving, settled = (iteration_passes(cfg.method, step, every_place(cfg.method)) for step in (0, max(batches, 1)))
    mean = solved * solving + (1 - solved) * settled
    assert forward_passes(counts) * counts.updates["student"] == pytest.approx(mean)


def test_costs_of_the_papers_schedules() -> None:
    """Per student update: x0 and its depth, once per batch; fake score 3, teacher 2 or 1, fake score 1, student 3."""
    for recipe, words, cost in (
        ("gdmd_paper", [], 2.5 / 4 + 9),
        ("gdmd_paper", ["method.guidance=1"], 2.5 / 4 + 8),
        ("dmd", [], 5 * 2.5 + 15 + 3 + 3),
        ("dmd", ["method.fake_samples=shared"], 2.5 + 15 + 3 + 3),
        ("dmd2", ["method.gan_weight=0"], 5 * 2.5 + 15 + 3 + 3),
        ("dmd2", [], 5 * 2.5 + 5 * 9 + 3 + 3 + 3),
        ("shapes_dmd", [], 2.5 / 4 + 3 + 3 + 3),
    ):
        counts = count_calls(read_recipe(recipe, ["loop.batch_size=4", *words]))
        assert forward_passes(counts) == pytest.approx(cost)
