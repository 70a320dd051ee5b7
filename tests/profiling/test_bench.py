"""gdmd profile counts the calls that the algorithms make, against their own count, and leaves the method as it was."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gdmd.cli.app import main
from gdmd.config.describe import student_updates
from gdmd.config.load import load_config
from gdmd.config.run import RunConfig
from gdmd.data.prompts import PromptStream
from gdmd.profiling import bench
from gdmd.profiling.recorded_calls import recorded, replay
from gdmd.recipes.build import SHAPES, Components, method_of
from gdmd.recipes.pass_formulas import every_place, iteration_passes
from gdmd.shapes.captions import training_captions
from gdmd.shapes.latents import RenderedLatents
from gdmd.shapes.networks import ShapesDit, ShapesVae
from gdmd.shapes.rewards import ShapesPref
from gdmd.shapes.roles import ShapesCodec, ShapesRoles, ShapesTextEncoder
from gdmd.shapes.scorer_networks import build_net


def tiny(*overrides: str) -> bench.Bench:
    text = "{name: tiny, loop: {batch_size: 4, threads: 1}, method: {kind: gdmd}, rewards: [{kind: shapes_pref}]}"
    cfg = load_config(RunConfig, text, list(overrides))
    torch.manual_seed(0)
    judged = cfg.method.kind == "dmd2" and cfg.method.gan_weight > 0
    roles = ShapesRoles(ShapesDit(width=16, depth=1, heads=2), head_seed=0 if judged else None)
    codec, encoder, rewards = (
        ShapesCodec(ShapesVae(16)),
        ShapesTextEncoder(),
        (ShapesPref("p", build_net("shapes_pref")),),
    )
    stream = PromptStream(training_captions(), encoder, 4, cfg.loop.seed, cfg.method.prompt_group)
    method = method_of(cfg.method, roles, codec, rewards, SHAPES, RenderedLatents(codec))
    return bench.Bench(cfg, Components(roles, codec, encoder, rewards, method, stream))


def calls_of(measured: bench.Bench) -> dict[tuple[str, bool], tuple[int, int]]:
    return {(c["who"], c["backward"]): (c["calls"], c["samples"]) for c in bench.table(measured.calls)}


def test_the_calls_of_an_iteration_are_those_of_the_algorithm() -> None:
    gdmd = tiny("method.step_draw=batch")
    gdmd.round(0)
    calls = calls_of(gdmd)
    assert calls["fake", True] == calls["fake", False] == calls["student", True] == (4, 16)
    assert calls["teacher", False] == (4, 32)  # both passes of guidance in one call
    assert calls["decoder", False] == calls["p", False] == (5, 20)  # four targets and the sample


PAIRS = "method.images_per_prompt=2"
METHODS: dict[str, list[str]] = {
    "gdmd": [],
    "gdmd with an old policy": ["method.old_policy=ema", "method.group_size=2"],
    "gdmd without guidance and reward": ["method.guidance=1.0", "method.gamma=0"],
    "gdmd, one step for all": ["method.step_draw=batch"],
    "gdmd_tilted": ["method.kind=gdmd_tilted", "method.continuations=3"],
    "gdmd on data": ["method.student_input=data"],
    "dmd": ["method.kind=dmd"],
    "dmd with regression": ["method.kind=dmd", "method.regression_weight=0.2", "method.regression_steps=3"],
    "dmd2": ["method.kind=dmd2"],
    "dmd2 without its GAN": ["method.kind=dmd2", "method.gan_weight=0"],
    "dmdr, stage 1": ["method.kind=dmdr"],
    "dmdr, refl": ["method.kind=dmdr", "method.cold_start=0"],
    "dmdr, grpo": ["method.kind=dmdr", "method.cold_start=0", "method.strategy=grpo", PAIRS],
    "dmdr, dpo": ["method.kind=dmdr", "method.cold_start=0", "method.strategy=dpo", PAIRS],
    "dmd_refl": ["method.kind=dmd_refl", "method.student_updates=2"],
    "dmd_nft": ["method.kind=dmd_nft", "method.student_updates=2", PAIRS],
    "dmd_grpo": ["method.kind=dmd_grpo", "method.student_updates=2", PAIRS],
}


@pytest.mark.parametrize("name", METHODS)
def test_hooks_count_what_the_method_counts_itself(name: str) -> None:
    measured = tiny(*METHODS[name])
    measured.round(0)
    measured.trained(1)
    assert measured.counted == pytest.approx(measured.expected, abs=1e-6)
    assert measured.method.cost.updates == 2 * student_updates(measured.cfg.method)
    assert min(measured.times.networks) > 0 and len(measured.times.training) == 2


def test_the_papers_schedules_cost_what_their_algorithms_say() -> None:
    def mean(*overrides: str) -> float:
        method = tiny(*overrides).cfg.method
        return iteration_passes(method, 0, every_place(method)) / student_updates(method)

    assert mean() == pytest.approx(2.5 / 4 + 9) and mean("method.guidance=1") == pytest.approx(2.5 / 4 + 8)
    assert mean("method.kind=dmd") == pytest.approx(2.5 + 15 + 3 + 3)
    assert mean("method.kind=dmd2", "method.gan_weight=0") == pytest.approx(2.5 + 15 + 3 + 3)
    assert mean("method.kind=dmd2") == pytest.approx(2.5 + 5 * 9 + 3 + 3 + 3)


def test_a_summary_is_json_and_readable_and_times_are_positive() -> None:
    measured = bench.measure(tiny(), 1)
    json.dumps(measured, allow_nan=False)
    assert measured["passes_agree"] and measured["mean_passes_per_update"] == pytest.approx(9.625)
    for name in ("overhead", "images_per_s", "flop_per_update", "peak_memory_mib", "scoring_share", "iteration_s"):
        assert measured[name] > 0, name
    assert measured["student_updates_per_s"] == pytest.approx(measured["images_per_s"])  # batch 4, group 4
    assert measured["host_syncs_per_iteration"] is None
    text = bench.describe(measured)
    assert "agrees with the method's own" in text and "not measured: no GPU" in text
    assert "DIFFERS" in bench.describe(measured | {"passes_agree": False})


def test_flop_are_those_of_the_passes() -> None:
    """1 F for x0, then 8 F per student update; a backward leaves out the gradient of the network's input."""
    plain = ("method.student_steps=[1.0]", "method.gamma=0", "method.guidance=1")
    one, two = (tiny(*plain, f"method.group_size={size}").flop(0) for size in (1, 2))
    assert (2 * one - two) / one == pytest.approx(1 / 9, rel=0.1)


def test_measuring_leaves_the_method_its_scorer_and_no_hooks() -> None:
    measured = tiny()
    scorer, net = measured.components.method.scorer, measured.components.roles.student.net
    hooks = list(net._forward_hooks)
    with recorded(measured.components.method, bench.watched(measured.components.roles)) as calls:
        measured.gradients(0, measured.components.stream.at(0))
    before = {k: v.detach().clone() for k, v in measured.components.roles.parameters("student").items()}
    replay(calls, scoring=False)
    replay(calls, scoring=True)
    assert measured.components.method.scorer is scorer and list(net._forward_hooks) == hooks
    assert all(
        torch.equal(before[k], v) and v.grad is None for k, v in measured.components.roles.parameters("student").items()
    )


def test_a_scorer_is_recorded_whatever_the_method_calls_it() -> None:
    components = tiny().components
    prompts = components.stream.at(0)
    method: Any = SimpleNamespace(judge=components.method.scorer)
    with recorded(method, []) as calls:
        method.judge(torch.zeros(len(prompts), *components.latent_shape), prompts)
    assert [call.who for call in calls][0] == "decoder" and all(call.scoring for call in calls) and len(calls) > 1
    assert method.judge is components.method.scorer


def test_waiting_for_the_gpu_is_counted_by_the_line_that_waits() -> None:
    def work() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at x.cpp:1)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    ((place, number),) = bench.waits(work).items()
    assert number == 3 and place.split("/")[-1].startswith("test_bench.py:")


def test_the_program_says_what_it_measures_and_knows_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["profile", *words])
        printed = capsys.readouterr()
        return stopped.value.code, printed.out, printed.err

    code, text, _ = run("--help")
    assert code == 0 and "gdmd profile shapes" in text.split("Examples:")[1]
    assert run("no_such_recipe")[0] == 2 and run("shapes_smoke", "--iterations", "0")[0] == 2
    code, text, _ = run(
        "shapes_smoke", "loop.batch_size=2", "method.group_size=1", "loop.threads=1", "--iterations", "1", "--json"
    )
    assert code == 0 and json.loads(text)["recipe"] == "shapes_smoke" and json.loads(text)["passes_agree"]


def test_methods_are_compared_in_one_run_by_ratios_to_gdmd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "methods.py"
    spec = importlib.util.spec_from_file_location("benchmark_methods", path)
    assert spec is not None and spec.loader is not None
    methods = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_methods"] = methods
    spec.loader.exec_module(methods)
    report = tmp_path / "deep" / "methods.json"
    assert methods.main(["--only", "dmd", "--batch", "2", "--rounds", "1", "--out", str(report)]) == 0
    gdmd, dmd = json.loads(report.read_text())["rows"]
    assert gdmd["updates_per_second_relative"] == 1 and 0 < dmd["updates_per_second_relative"] < 1
    assert gdmd["passes_agree"] and dmd["passes_agree"] and dmd["mean_passes_per_update"] == 23.5
    assert "| DMD (5 : 1) |" in capsys.readouterr().out
