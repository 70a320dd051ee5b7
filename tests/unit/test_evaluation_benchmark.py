"""benchmarks/step.py counts the calls that Algorithm 1 makes, and leaves the networks as they were."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gdmd.backbones.shapes import ShapesCodec, ShapesRoles, ShapesTextEncoder
from gdmd.backbones.shapes_nets import ShapesDit, ShapesVae
from gdmd.config.load import load_config
from gdmd.config.run import RunConfig
from gdmd.data.prompts import PromptStream, training_captions
from gdmd.recipes.build import Lab, _method
from gdmd.rewards.shapes import ShapesPref
from gdmd.rewards.shapes_nets import build_net


@pytest.fixture(scope="module")
def step() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "step.py"
    spec = importlib.util.spec_from_file_location("benchmark_step", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_step"] = module
    spec.loader.exec_module(module)
    return module


def tiny(overrides: list[str]) -> tuple[Lab, RunConfig]:
    text = "{name: tiny, loop: {batch_size: 8}, method: {kind: gdmd}, rewards: [{kind: shapes_pref}]}"
    cfg = load_config(RunConfig, text, overrides)
    roles, codec = ShapesRoles(ShapesDit(width=16, depth=1, heads=2)), ShapesCodec(ShapesVae(16))
    encoder, rewards = ShapesTextEncoder(), (ShapesPref("shapes_pref", build_net("shapes_pref")),)
    stream = PromptStream(training_captions(), encoder, cfg.loop.batch_size, cfg.loop.seed)
    return Lab(roles, codec, encoder, rewards, _method(cfg, roles, codec, rewards), stream), cfg


def test_the_calls_of_an_iteration_are_those_of_the_algorithm(step: ModuleType) -> None:
    lab, cfg = tiny(["method.step_draw=batch"])
    measured = step.measure(lab, cfg, 1)
    calls = {(c["who"], c["backward"]): (c["calls"], c["samples"]) for c in measured["calls"]}
    assert calls["fake", True] == calls["fake", False] == calls["student", True] == (4, 32)
    assert calls["teacher", False] == (4, 64)  # both passes of guidance in one call
    assert calls["decoder", False] == calls["shapes_pref", False] == (5, 40)  # four targets and the sample
    assert measured["expected_passes"] == pytest.approx(9.625)
    assert 9.25 <= measured["passes_per_student_update"] <= 10
    assert measured["ratio"] > 0 and measured["peak_rss_mib"] > 0
    json.dumps(measured, allow_nan=False)
    assert "passes per student update" in step.describe(measured)


def test_without_guidance_and_rewards_fewer_passes_are_made(step: ModuleType) -> None:
    lab, cfg = tiny(["method.guidance=1.0", "method.gamma=0.0"])
    measured = step.measure(lab, cfg, 1)
    assert {c["who"] for c in measured["calls"]} == {"student", "fake", "teacher"}
    assert measured["expected_passes"] == pytest.approx(8.625)


def test_measuring_leaves_weights_and_methods_as_they_were(step: ModuleType) -> None:
    lab, cfg = tiny([])
    before = {k: v.detach().clone() for k, v in lab.roles.parameters("student").items()}
    step.measure(lab, cfg, 1)
    assert all(torch.equal(before[k], v) and v.grad is None for k, v in lab.roles.parameters("student").items())
    assert "decode" not in vars(lab.codec) and "score" not in vars(lab.rewards[0])
    assert not lab.roles.student.net._forward_hooks
