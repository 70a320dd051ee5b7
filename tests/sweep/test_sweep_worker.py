"""What a sweep's worker counts: every network of a pipeline, also one that is created during the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from torch import Tensor

from gdmd.config.run import RunConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.recipes.build import build
from gdmd.recipes.call_counts import count_calls, forward_passes
from gdmd.sweep.worker import counted
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
    components = build(cfg)
    method_of, states = counted(components), role_states(components.roles, cfg.loop)
    for step in range(iterations):
        prompts = components.stream.at(step)
        rng = SampleRng(0, step, prompts.index, prompts.host)
        for update in method_of.iteration(step, prompts, rng):
            states[update.role].apply(update)
    return method_of.cost.passes / BATCH, cfg


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
