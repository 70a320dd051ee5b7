"""DMD2, DMDR and DMD with regression through the training loop: an interrupted run is the uninterrupted one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_roles import Toy, ToyCodec, tiny_roles
from torch import Tensor

from gdmd.config.methods.dmd import DmdConfig
from gdmd.config.methods.dmd2 import Dmd2Config
from gdmd.config.methods.dmdr import DmdrConfig
from gdmd.config.training import LoopConfig
from gdmd.data.prompts import PromptStream
from gdmd.diffusion.rng import SampleRng
from gdmd.methods.dmd import Dmd
from gdmd.methods.dmd2 import Dmd2
from gdmd.methods.dmdr import Dmdr
from gdmd.methods.scorer import Scorer
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import create, open_run, read_metrics
from gdmd.shapes.roles import LATENT_SHAPE, ShapesRoles, ShapesTextEncoder
from gdmd.training.loop import train
from gdmd.types import Method, PromptBatch

TEXTS = ["a circle", "a red square", "two rings", "a circle and a square"]
CONFIGS = [
    Dmd2Config(fake_updates=2),
    DmdrConfig(fake_updates=2, cold_start=2, anneal=4, margin=2.0),
    DmdrConfig(fake_updates=2, cold_start=1, strategy="grpo", images_per_prompt=2),
    DmdrConfig(fake_updates=2, cold_start=1, strategy="dpo", images_per_prompt=2),
    DmdConfig(fake_updates=2, regression_weight=0.25, regression_steps=2, regression_batches=2),
]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def real_latents(batch: PromptBatch, rng: SampleRng) -> Tensor:
    return 2 + rng.normal("real", LATENT_SHAPE)


def world(cfg: Any) -> tuple[Method, ShapesRoles, PromptStream]:
    """Fresh tiny networks and the method on them."""
    roles = tiny_roles()
    if isinstance(cfg, Dmd2Config):
        roles = ShapesRoles(roles.teacher.net, head_seed=3)
        method: Method = Dmd2(cfg, roles, LATENT_SHAPE, "velocity", real_latents).attach(roles.critic)
    elif isinstance(cfg, DmdrConfig):
        method = Dmdr(cfg, roles, LATENT_SHAPE, "velocity").attach(Scorer(ToyCodec(), (Toy(),)), roles.blended_teacher)
    else:
        method = Dmd(cfg, roles, LATENT_SHAPE, "velocity")
    return method, roles, PromptStream([TEXTS], ShapesTextEncoder(), 4, 1, cfg.prompt_group)


def run(cfg: Any, folder: Path, steps: int) -> None:
    """Train to ``steps`` iterations, going on where the folder's run stopped."""
    loop = LoopConfig(
        steps=steps, batch_size=4, lr_student=1e-3, lr_fake=1e-3, log_every=1, grid_every=0, threads=1, seed=1
    )
    opened = open_run(folder) if folder.exists() else create(folder, {"loop": loop.model_dump(mode="json")})
    method, roles, stream = world(cfg)
    train(method, roles, stream, loop, opened)


def ended(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    saved = checkpoint.load_newest(folder / "checkpoints")
    assert saved is not None
    tensors = {f"{part}/{name}": value for part, named in saved.tensors.items() for name, value in named.items()}
    return tensors, [{k: v for k, v in row.items() if k != "speed/images_per_s"} for row in read_metrics(folder)]


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: f"{cfg.kind}_{getattr(cfg, 'strategy', '')}")
def test_a_run_that_stopped_and_went_on_equals_the_uninterrupted_run(cfg: Any, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(cfg, whole, 4)
    run(cfg, parts, 3)
    run(cfg, parts, 4)
    first, rows = ended(whole)
    second, others = ended(parts)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert rows == others
    assert any(name.startswith("fake/gan_head.") for name in first) == isinstance(cfg, Dmd2Config)
    assert any(name.startswith("optim_fake/exp_avg/gan_head.") for name in first) == isinstance(cfg, Dmd2Config)
