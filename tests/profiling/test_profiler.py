"""``gdmd profile`` counts the calls that the algorithms make, adds up, and leaves the method as it was."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gdmd.cli.app import main
from gdmd.config.load import load_config
from gdmd.config.run import RunConfig
from gdmd.data.prompts import PromptStream
from gdmd.profiling.profiler import SECTIONS, Profiler, call_table, describe, measure, role_networks, sync_warnings
from gdmd.recipes.build import SHAPES, Components, method_of
from gdmd.recipes.read import read_recipe
from gdmd.shapes.grammar import training_captions
from gdmd.shapes.latents import RenderedLatents
from gdmd.shapes.networks import ShapesDit, ShapesVae
from gdmd.shapes.rewards import ShapesPref
from gdmd.shapes.roles import ShapesCodec, ShapesRoles, ShapesTextEncoder
from gdmd.shapes.scorer_networks import build_net
from gdmd.types import PromptBatch


def tiny(*overrides: str) -> Profiler:
    text = "{name: tiny, loop: {batch_size: 4, threads: 1}, method: {kind: gdmd}, rewards: [{kind: shapes_pref}]}"
    cfg = load_config(RunConfig, text, list(overrides))
    torch.manual_seed(0)
    gan = cfg.method.kind == "dmd2" and cfg.method.gan_weight > 0
    roles = ShapesRoles(ShapesDit(width=16, depth=1, heads=2), head_seed=0 if gan else None)
    codec, encoder = ShapesCodec(ShapesVae(16)), ShapesTextEncoder()
    rewards = (ShapesPref("p", build_net("shapes_pref")),) if cfg.method.rewarded else ()
    stream = PromptStream(training_captions(), encoder, 4, cfg.loop.seed, cfg.method.prompt_group)
    method = method_of(cfg.method, roles, codec, rewards, SHAPES, RenderedLatents(codec))
    return Profiler(cfg, Components(roles, codec, encoder, rewards, method, stream))


def calls_of(profiler: Profiler) -> dict[tuple[str, bool], tuple[int, int]]:
    return {(c["who"], c["backward"]): (c["calls"], c["samples"]) for c in call_table(profiler.calls[-1])}


def test_calls_of_gdmd() -> None:
    gdmd = tiny("method.step_draw=batch")
    gdmd.round(0)
    calls = calls_of(gdmd)
    assert calls["fake", True] == calls["fake", False] == calls["student", True] == (4, 16)
    assert calls["teacher", False] == (4, 32)  # both passes of guidance in one call


PAIRS = "method.images_per_prompt=2"
METHODS: dict[str, list[str]] = {
    "gdmd": [],
    "gdmd without guidance and reward": ["method.guidance=1.0", "method.gamma=0"],
    "gdmd_tilted": ["method.kind=gdmd_tilted", "method.continuations=3"],
    "dmd": ["method.kind=dmd"],
    "dmd2": ["method.kind=dmd2"],
    "dmdr": ["method.kind=dmdr", "method.cold_start=0"],
    "dmd_refl": ["method.kind=dmd_refl", "method.student_updates=2"],
    "dmd_nft": ["method.kind=dmd_nft", "method.student_updates=2", PAIRS],
    "dmd_grpo": ["method.kind=dmd_grpo", "method.student_updates=2", PAIRS],
}


@pytest.mark.parametrize("name", METHODS)
def test_hooks_count_what_the_dry_run_counts(name: str) -> None:
    """They agree up to the rollout's length, which is random: 0 or 1 step before the last one."""
    profiler = tiny(*METHODS[name], "method.student_steps=[1.0,0.5]", "loop.steps=64")
    for step in range(2):
        profiler.round(step)
    found = profiler.summary()
    rollout = (3 if name == "gdmd_tilted" else 1) / found["student_updates_per_iteration"]
    assert found["passes_per_update"] == pytest.approx(found["expected_passes_per_update"], abs=0.5 * rollout + 1e-6)
    assert found["section_s"]["network calls"] > 0 and found["section_s"]["backward passes"] > 0


def test_summary_is_json_and_its_sections_add_up() -> None:
    measured = measure(tiny(), 1)
    json.dumps(measured, allow_nan=False)
    for name in ("overhead", "images_per_s", "flop_per_update", "peak_memory_mib", "scoring_share", "iteration_s"):
        assert measured[name] > 0, name
    assert list(measured["section_s"]) == list(SECTIONS) and min(measured["section_s"].values()) > 0
    assert measured["student_updates_per_s"] == pytest.approx(measured["images_per_s"])  # batch 4, group 4
    assert measured["host_syncs_per_iteration"] is None
    assert "no GPU" in describe(measured) and "decoder and rewards" in describe(measured)


def test_flop_are_those_of_the_passes() -> None:
    """1 F for x0, then 8 F per student update; a backward omits the gradient of the network's input."""
    plain = ("method.student_steps=[1.0]", "method.gamma=0", "method.guidance=1")
    one, two = (tiny(*plain, f"method.group_size={size}").flop(0) for size in (1, 2))
    assert (2 * one - two) / one == pytest.approx(1 / 9, rel=0.1)


def test_profiling_leaves_the_method_and_its_networks_as_they_were() -> None:
    profiler, backward = tiny(), torch.autograd.backward
    method: Any = profiler.components.method
    scorer = method.scorer
    profiler.round(0)
    assert method.scorer is scorer and torch.autograd.backward is backward
    assert not any(net._forward_hooks or net._forward_pre_hooks for net, _ in role_networks(profiler.components.roles))


def test_rewards_that_cannot_be_timed_are_an_error() -> None:
    profiler = tiny()
    del profiler.components.method.scorer  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="scorer"):
        profiler.round(0)


def test_the_rewards_of_a_recipe_without_reward_loss_are_not_loaded() -> None:
    cfg = read_recipe("shapes_dmd", ["loop.batch_size=2", "loop.threads=1"])
    assert cfg.rewards and not cfg.method.rewarded
    profiler = Profiler(cfg, device="cpu")
    profiler.round(0)
    assert profiler.components.rewards == () and calls_of(profiler)["student", True] == (4, 8)


def test_host_syncs_are_counted_by_line() -> None:
    def work() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at x.cpp:1)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    ((line, number),) = sync_warnings(work).items()
    assert number == 3 and line.split("/")[-1].startswith("test_profiler.py:")


def test_time_and_memory_are_those_of_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's functions refer to the current device, which is the first GPU, unless they are given another."""
    profiler, asked = tiny(), list[Any]()
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: asked.append(device) or 2**20)
    profiler.device = torch.device("cuda", 1)
    profiler.round(0)
    assert profiler.peak()[0] == 1.0 and len(asked) > 8 and set(asked) == {(torch.device("cuda", 1),)}


def test_profile_command(capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["profile", *words])
        return stopped.value.code, capsys.readouterr().out

    assert run("no_such_recipe")[0] == 2 and run("shapes_smoke", "--iterations", "0")[0] == 2
    small = ("loop.batch_size=2", "method.group_size=1", "loop.threads=1")
    code, text = run("shapes_smoke", *small, "--iterations", "1", "--json")
    assert code == 0 and json.loads(text)["recipe"] == "shapes_smoke"


# ---------------------------------------------------------------- adapters on a shared backbone


def brightness(images: Tensor, prompts: PromptBatch) -> Tensor:
    """A reward."""
    return images.mean((1, 2, 3))


def of_pipeline(folder: Path, family: str, method: dict[str, Any], **model: Any) -> Profiler:
    """A tiny pipeline of the family with a batch of two."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    import tiny_pipelines

    (folder / "prompts.txt").write_text("\n".join(tiny_pipelines.WORDS[:2]))
    pipeline = tiny_pipelines.save(family, folder / family)
    cfg = {
        "name": "adapters",
        "model": tiny_pipelines.config(pipeline, **model).model_dump(),
        "method": {"kind": "gdmd", **method},
        "prompts": {"file": str(folder / "prompts.txt")},
        "rewards": [{"kind": "callable", "target": "test_profiler:brightness", "differentiable": True}],
        "loop": {"batch_size": 2, "threads": 1},
    }
    return Profiler(RunConfig.model_validate(cfg))


@pytest.mark.parametrize(("family", "full"), [("sd15", "none"), ("sd15", "student"), ("z_image", "none")])
def test_calls_of_adapters_are_told_apart(tmp_path: Path, family: str, full: str) -> None:
    """z_image returns a list; a backward through the frozen backbone is 1 F, through a trained copy 2 F."""
    method = {"group_size": 2, "gamma": 0.0, "student_steps": [1.0], "guidance": 3.0}
    profiler = of_pipeline(tmp_path, family, method, full=full)
    profiler.round(0)
    calls = {key: samples for key, (_, samples) in calls_of(profiler).items()}
    assert calls["fake", True] == calls["student", True] == calls["fake", False] == 4
    assert calls["teacher", False] == 8 and calls["student", False] == 2
    passes = sum(call.passes for call in profiler.calls[0]) / 2
    assert passes == 1 + 2 * (2 + 2 + 1 + (3 if full == "student" else 2))


@pytest.mark.parametrize("full", ["none", "both"])
def test_calls_of_a_blended_teacher(tmp_path: Path, full: str) -> None:
    """DMDR's real score is such a teacher; with full copies it is a network that every iteration creates."""
    method = {"kind": "dmdr", "cold_start": 10**6, "fake_updates": 2, "student_steps": [1.0], "guidance": 3.0}
    profiler = of_pipeline(tmp_path, "sd15", method, full=full)
    for step in range(2):
        profiler.round(step)
    found = profiler.summary()
    assert found["passes_per_update"] == pytest.approx(found["expected_passes_per_update"])
    assert ("teacher", False) in calls_of(profiler) or full == "none"  # an adapter's calls are those of the fake score


def test_feature_calls_of_a_gan_head(tmp_path: Path) -> None:
    """On a UNet, feature calls stop after the mid block and cost a share of a forward pass."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    import tiny_pipelines

    from gdmd.config.methods.dmd2 import DMD2Config
    from gdmd.config.training import LoopConfig
    from gdmd.methods.dmd2 import Dmd2
    from gdmd.models.loading import open_family
    from gdmd.models.roles import DiffusersRoles

    model = tiny_pipelines.config(tiny_pipelines.save("sd15", tmp_path / "sd15"), checkpointing=False)
    cfg = DMD2Config(fake_updates=2, guidance=3.0, student_steps=(1.0,))
    family = open_family(model)
    roles, shape = DiffusersRoles(family, head_seed=0), family.latent_shape
    method = Dmd2(cfg, roles, shape, family.native, lambda prompts, rng: rng.normal("real", shape), critic=roles.critic)
    stream = PromptStream([list(tiny_pipelines.WORDS)], family.encoder, 2, 0, 1)
    run = RunConfig(name="gan", model=model, method=cfg, loop=LoopConfig(batch_size=2, threads=1), rewards=[])
    profiler = Profiler(run, Components(roles, family.codec, family.encoder, (), method, stream, shape))
    for step in range(2):
        profiler.round(step)
    calls = calls_of(profiler)
    assert calls["fake, features", True] == calls["gan_head", True] == (5, 10)  # real and student latents, then x0
    assert calls["fake", True] == (2, 4) and calls["student", True] == (1, 2)
    found = profiler.summary()
    assert found["passes_per_update"] == pytest.approx(found["expected_passes_per_update"])
