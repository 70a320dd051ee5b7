"""The recipes of DMD, DMD2 and DMDR on the Shapes networks: six iterations are finite and move the student."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from gdmd.recipes.build import build
from gdmd.recipes.read import read_recipe
from gdmd.runs.run_folder import create, read_metrics
from gdmd.training.loop import train

SMALL = ["loop.steps=6", "loop.batch_size=4", "validation.every=0", "loop.log_every=1", "loop.threads=1"]
TWO_STAGES = ["method.cold_start=3", "method.anneal=3", "method.fake_updates=2", "method.images_per_prompt=2"]
RUNS = {
    "dmd2": ("dmd2", ["method.fake_updates=2"], {"loss/head", "loss/gan", "gan/real", "gan/student"}),
    "grpo": ("dmdr", [*TWO_STAGES, "method.strategy=grpo"], {"loss/rl", "advantage/size"}),
    "dpo": ("dmdr", [*TWO_STAGES, "method.strategy=dpo"], {"loss/rl", "reward/paired"}),
    "pairs": ("dmd", ["method.regression_weight=.25", "method.regression_steps=2"], {"loss/regression"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_six_iterations_train(name: str, tmp_path: Path) -> None:
    recipe, options, wanted = RUNS[name]
    cfg = read_recipe(recipe, [*SMALL, *options])
    components = build(cfg, "cpu")
    before = {key: value.detach().clone() for key, value in components.roles.parameters("student").items()}
    teacher = [value.clone() for value in components.roles.teacher.net.parameters()]
    run = create(tmp_path / "run", cfg.model_dump(mode="json"))
    assert train(components.method, components.roles, components.stream, cfg.loop, run).step == 6
    rows = read_metrics(tmp_path / "run")
    assert wanted <= set().union(*rows)
    losses = [value for row in rows for key, value in row.items() if key.startswith(("loss/", "grad_norm/"))]
    assert all(math.isfinite(value) for value in losses)
    after = components.roles.parameters("student")
    assert any(not torch.equal(before[key], value) for key, value in after.items())
    assert all(torch.equal(a, b) for a, b in zip(teacher, components.roles.teacher.net.parameters(), strict=True))


def test_gan_head_depends_on_seed() -> None:
    heads = []
    for seed in (0, 0, 1):
        roles = build(read_recipe("dmd2", [f"loop.seed={seed}"]), "cpu").roles
        heads.append(roles.parameters("fake")["gan_head.conv.weight"])
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    for recipe, options in (("dmd", []), ("dmd2", ["method.gan_weight=0"])):
        assert build(read_recipe(recipe, options), "cpu").roles.critic is None
