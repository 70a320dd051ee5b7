"""What a GAN head costs: `gdmd plan` and `gdmd profile` against the calls that DMD2 makes on real families."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from gdmd.config.methods.dmd2 import Dmd2Config
from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.config.training import LoopConfig
from gdmd.data.prompts import PromptStream
from gdmd.diffusion.rng import SampleRng
from gdmd.methods.dmd2 import Dmd2
from gdmd.models.loading import FAMILIES, open_family
from gdmd.models.roles import DiffusersRoles
from gdmd.plan.cost_model import gpu_of
from gdmd.plan.estimate import Plan, plan
from gdmd.plan.fake_tensors import UNCOUNTED, fake_mode, hollow, measure
from gdmd.plan.meta_pipeline import meta_family
from gdmd.plan.text import described
from gdmd.profiling.bench import Bench, table
from gdmd.profiling.recorded_calls import replay
from gdmd.recipes.build import Components
from gdmd.recipes.call_counts import tally
from gdmd.types import PromptBatch

BATCH = 8
METHOD = Dmd2Config(fake_updates=2, guidance=3.0, step_draw="batch")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


def recipe(folders: Path, name: str, batch: int = BATCH, method: Dmd2Config = METHOD, **model: Any) -> RunConfig:
    folder = folders / name
    if not folder.exists():
        tiny.save(name, folder)
    loop = LoopConfig(steps=2, batch_size=batch, threads=1)
    return RunConfig(name="tiny", model=tiny.config(folder, **model), method=method, loop=loop, rewards=[])


@cache
def planned(cfg: str) -> Plan:
    return plan(RunConfig.model_validate_json(cfg), gpu_of("h100"), 0.4)


def judged(cfg: RunConfig) -> tuple[DiffusersRoles, Dmd2]:
    """The objects of a recipe on latents of noise in the place of real ones."""
    assert isinstance(cfg.model, DiffusersModel) and isinstance(cfg.method, Dmd2Config)
    family = open_family(cfg.model)
    roles, shape = DiffusersRoles(family, head_seed=0), family.latent_shape
    real = lambda prompts, rng: rng.normal("real", shape)  # noqa: E731
    return roles, Dmd2(cfg.method, roles, shape, family.native, real, critic=roles.critic)


def peak_of(work: Any) -> int:
    """Bytes that the allocator held at most beyond those at the start, as the profiler saw them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(("name", "model"), [("sdxl", {}), ("sd3", {"checkpointing": False, "full": "fake"})])
def test_flop_and_memory_of_both_updates_are_what_is_measured(folders: Path, name: str, model: dict[str, Any]) -> None:
    cfg = recipe(folders, name, **model)
    said, (roles, method) = planned(cfg.model_dump_json()), judged(cfg)
    blank = {key: value.contiguous() for key, value in roles.family.blank_text(BATCH).items()}
    prompts = PromptBatch(torch.arange(BATCH), ("",) * BATCH, torch.arange(BATCH), blank, blank)
    for update in method.iteration(0, prompts, SampleRng(0, 0, prompts.index)):

        def work() -> None:
            update.loss(update.batch).per_sample.mean().backward()  # noqa: B023

        work()  # the gradients are there from here on, as they are counted apart
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counted:
            work()
        assert said.costs.graded[update.role].flop == pytest.approx(counted.get_total_flops(), rel=0.01), update.role
        assert said.costs.graded[update.role].bytes == pytest.approx(peak_of(work), rel=0.15), update.role
    assert said.parts.graded == max(measured.bytes for measured in said.costs.graded.values())
    assert said.weights["GAN head"] == sum(p.numel() for p in roles.critic.head.parameters())  # type: ignore[union-attr]
    assert said.parts.static["fake"] == 4 * sum(p.numel() for p in roles.parameters("fake").values())
    assert said.weights["GAN head"] + said.weights["fake"] == said.parts.static["fake"] // 4
    assert "GAN head" in described(said, [])


def test_a_head_is_planned_only_where_there_is_one(folders: Path) -> None:
    with_gan = planned(recipe(folders, "sdxl").model_dump_json())
    without = planned(recipe(folders, "sdxl", method=METHOD.model_copy(update={"gan_weight": 0.0})).model_dump_json())
    assert "GAN head" not in without.weights and without.tally.read == 0
    assert with_gan.tally.read == 2 * METHOD.fake_updates + 1
    assert with_gan.passes - without.passes == pytest.approx(with_gan.tally.read * 2 * 0.43)  # a frozen trunk: 1 + 1
    assert with_gan.total > without.total and with_gan.seconds > without.seconds


@pytest.mark.parametrize(("name", "full"), [("sdxl", "none"), ("sdxl", "both"), ("sd3", "none")])
def test_bench_counts_what_the_method_counts_and_makes_the_calls_again(folders: Path, name: str, full: str) -> None:
    cfg = recipe(folders, name, batch=2, full=full, checkpointing=False)
    roles, method = judged(cfg)
    family = roles.family
    stream = PromptStream([list(tiny.WORDS)], family.encoder, 2, 0, 1)
    bench = Bench(cfg, Components(roles, family.codec, family.encoder, (), method, stream, family.latent_shape))
    bench.round(0)
    assert bench.counted == pytest.approx(bench.expected, abs=1e-6)
    said = {(call["who"], call["backward"]): call["samples"] for call in table(bench.calls)}
    updates = METHOD.fake_updates
    assert said["fake", True] == 2 * (updates + 2 * updates + 1) and said["student", True] == 2
    assert said["gan_head", True] == 2 * (2 * updates + 1)
    if name == "sdxl":
        net: Any = roles.fake.net.ready()
        ends: list[int] = []
        handle = net.conv_norm_out.register_forward_hook(lambda layer, given, answer: ends.append(len(answer)))
        replay([call for call in bench.calls if call.who == "fake" and call.backward], scoring=False)
        handle.remove()
        assert sum(ends) == 2 * updates  # those of the head end before


def test_what_a_call_for_features_costs_is_that_of_the_published_networks() -> None:
    standard = {
        "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    }
    assert {family.name for family in FAMILIES if family.feature_cost != 1} == set(standard)
    for name, path in standard.items():
        family = meta_family(DiffusersModel(path=path, height=512, width=512)).family
        at = (family.net, torch.empty(1, *family.latent_shape), torch.ones(1), family.blank_text(1))
        with fake_mode(), torch.no_grad():
            hollow(family.net)
            whole, part = (measure(partial(call, *at)).flop for call in (family.predict, family.features))
        assert part / whole == pytest.approx(family.feature_cost, abs=0.01), name


def test_the_tally_tells_the_heads_calls_from_the_others(folders: Path) -> None:
    counted = tally(recipe(folders, "sd3", batch=4))
    assert counted.read == 5 and counted.graded["fake"] == 2 + 5 and counted.graded["student"] == 1
