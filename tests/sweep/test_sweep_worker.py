"""What a sweep's worker counts: every network of a pipeline, even one that is created during training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
import torch
from torch import Tensor

from gdmd.config.methods.dmd2 import DMD2Config
from gdmd.config.run import RunConfig
from gdmd.config.training import LoopConfig
from gdmd.data.prompts import PromptStream
from gdmd.diffusion.rng import SampleRng
from gdmd.methods.dmd2 import Dmd2
from gdmd.models.loading import open_family
from gdmd.models.roles import DiffusersRoles
from gdmd.recipes.build import Components, build
from gdmd.recipes.call_counts import count_calls, forward_passes
from gdmd.runs.trained_on import trained_on
from gdmd.sweep.worker import counted, measured_line, pipeline_facts
from gdmd.training.role_state import role_states

BATCH = 2


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward."""
    return images.mean((1, 2, 3))


def passes(folder: Path, method: dict[str, Any], full: str, iterations: int = 2) -> tuple[float, RunConfig]:
    """The passes that are counted, per sample of the batch, and the config."""
    (folder / "prompts.txt").write_text("\n".join(tiny.WORDS[:2]))
    cfg = RunConfig.model_validate(
        {
            "name": "tiny",
            "model": tiny.config(tiny.save("sd15", folder / "sd15"), full=full).model_dump(),
            "method": {"student_steps": [1.0], "guidance": 3.0, **method},
            "prompts": {"file": str(folder / "prompts.txt")},
            "rewards": [{"kind": "callable", "target": "test_sweep_worker:brightness", "differentiable": True}],
            "loop": {"batch_size": BATCH, "threads": 1, "steps": iterations},
        }
    )
    return iterate(build(cfg), cfg), cfg


def iterate(components: Components, cfg: RunConfig) -> float:
    """The counted passes of the config's iterations, per sample of the batch."""
    method, states = counted(components), role_states(components.roles, cfg.loop)
    for step in range(cfg.loop.steps):
        prompts = components.stream.at(step)
        rng = SampleRng(0, step, prompts.index, prompts.host)
        for update in method.iteration(step, prompts, rng):
            states[update.role].apply(update)
    return method.cost.passes / BATCH


@pytest.mark.parametrize("full", ["none", "both"])
@pytest.mark.parametrize(
    "method",
    [
        {"kind": "gdmd", "group_size": 2, "old_policy": "ema"},
        {"kind": "dmdr", "cold_start": 8, "fake_updates": 2},
    ],
    ids=["old policy", "blended teacher"],
)
def test_every_network_is_counted(tmp_path: Path, method: dict[str, Any], full: str) -> None:
    found, cfg = passes(tmp_path, method, full)
    calls = count_calls(cfg)
    assert found / 2 / calls.updates["student"] == pytest.approx(forward_passes(calls, full))


def test_a_call_for_features_counts_as_its_share_of_a_pass(tmp_path: Path) -> None:
    """DMD2's GAN reads a UNet's features, whose calls stop after the mid block."""
    model = tiny.config(tiny.save("sd15", tmp_path / "sd15"), checkpointing=False)
    own = DMD2Config(fake_updates=2, guidance=3.0, student_steps=(1.0,))
    family = open_family(model)
    roles, shape = DiffusersRoles(family, head_seed=0), family.latent_shape
    method = Dmd2(own, roles, shape, family.native, lambda prompts, rng: rng.normal("real", shape), critic=roles.critic)
    stream = PromptStream([list(tiny.WORDS)], family.encoder, BATCH, 0, 1)
    cfg = RunConfig(
        name="gan", model=model, method=own, loop=LoopConfig(batch_size=BATCH, threads=1, steps=2), rewards=[]
    )
    found = iterate(Components(roles, family.codec, family.encoder, (), method, stream, shape), cfg) / 2
    assert family.feature_cost < 1
    assert found == pytest.approx(forward_passes(count_calls(cfg), "none", family.feature_cost))


def test_a_line_names_the_reward_behind_a_server(tmp_path: Path) -> None:
    """The page then marks the scorer of this name as trained on, and not as unseen."""
    found: Any = SimpleNamespace(correct=torch.tensor([True]), json=lambda: {"shapeseval": {"overall": 1.0}})
    rewards = [{"kind": "remote", "url": "http://127.0.0.1:1", "reward": "shapes_pref"}, {"kind": "shapes_clip"}]
    cfg = RunConfig.model_validate({"name": "x", "rewards": rewards, "loop": {}})
    assert measured_line(found, trained_on(cfg, tmp_path))["trained"] == [
        "remote shapes_pref",
        "shapes_pref",
        "shapes_clip",
    ]


def test_controls_and_algorithm_1_are_not_gdmd_in_the_goals(tmp_path: Path) -> None:
    """Each keeps its own method name, so no goal takes it for GDMD, even before GDMD's own row is finished."""
    model = tiny.config(tiny.save("sd3", tmp_path / "sd3"))
    shared = {"name": "x", "model": model, "prompts": {"file": "validation"}, "loop": {}, "rewards": [{"kind": "clip"}]}
    methods: dict[str, dict[str, Any]] = {
        "paper": {"kind": "gdmd"},
        "tilted": {"kind": "gdmd_tilted"},
        "shuffled": {"kind": "gdmd_tilted_shuffled"},
        "no reward": {"kind": "gdmd_tilted", "gamma": 0.0},
    }
    configs = {name: RunConfig.model_validate(shared | {"method": method}) for name, method in methods.items()}
    named = {name: pipeline_facts(cfg, "lora", 4)["pipeline"]["method"] for name, cfg in configs.items()}
    assert named == {"paper": "algorithm_1", "tilted": "gdmd", "shuffled": "gdmd_tilted_shuffled", "no reward": "dmd"}
