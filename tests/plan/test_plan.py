"""`gdmd plan` against what is really there: weights exactly, FLOP and memory by running the same recipe."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from gdmd.config.methods.dmd import DmdConfig
from gdmd.config.methods.dmd_reward import DmdReflConfig
from gdmd.config.methods.dmdr import DmdrConfig
from gdmd.config.methods.gdmd import GdmdConfig
from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.config.training import LoopConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.models.roles import DiffusersRoles
from gdmd.plan.cost_model import CLIP_H, CLIP_L, GIB, Gpu, gpu_of
from gdmd.plan.estimate import Plan, plan
from gdmd.plan.fake_tensors import UNCOUNTED, fake_mode, measure
from gdmd.plan.meta_pipeline import meta_family
from gdmd.plan.model_configs import MODELS
from gdmd.plan.networks import networks_of
from gdmd.plan.text import described
from gdmd.recipes.build import Components, build
from gdmd.recipes.call_counts import tally
from gdmd.recipes.read import read_recipe
from gdmd.training.adamw8bit import moment_bytes
from gdmd.types import Role

GPU = gpu_of("h100")
_MADE: dict[str, Plan] = {}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


def recipe(folders: Path, name: str, method: Any = None, batch: int = 2, **model: Any) -> RunConfig:
    folder = folders / name
    if not folder.exists():
        tiny.save(name, folder)
    prompts = folders / "prompts.txt"
    prompts.write_text("\n".join(tiny.WORDS))
    return RunConfig(
        name="tiny",
        model=tiny.config(folder, **model),
        method=method or DmdConfig(fake_updates=2, guidance=3.0, step_draw="batch"),
        loop=LoopConfig(steps=2, batch_size=batch),
        prompts={"file": str(prompts)},
        rewards=[{"kind": "callable", "target": "math:fsum"}],
    )


def planned(cfg: RunConfig) -> Plan:
    """Made once for every recipe."""
    key = cfg.model_dump_json()
    if key not in _MADE:
        _MADE[key] = plan(cfg, GPU, 0.4)
    return _MADE[key]


def numel(components: Components, role: Role) -> int:
    return sum(weights.numel() for weights in components.roles.parameters(role).values())


def flop_of(work: Any) -> int:
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counted:
        work()
    return int(counted.get_total_flops())


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


def test_attention_is_counted_by_its_products_without_its_matrix() -> None:
    with fake_mode():
        q, k, v = (torch.empty(2, 3, length, 16, requires_grad=True) for length in (500, 700, 700))
        attend = torch.nn.functional.scaled_dot_product_attention
        measured = measure(lambda: attend(q, k, v).sum().backward(), [q, k, v])
    assert measured.flop == (4 + 10) * 2 * 3 * 500 * 700 * 16
    assert measured.bytes < 4 * 2 * 3 * 500 * 700


@pytest.mark.parametrize("name", tiny.BUILD)
def test_weights_and_flop_are_those_of_the_loaded_pipeline(folders: Path, name: str) -> None:
    cfg = recipe(folders, name)
    said, components = planned(cfg), build(cfg, "cpu")
    net = components.roles.backbone.net
    trunk = sum(weights.numel() for key, weights in net.named_parameters() if ".lora_" not in key)
    decoder = sum(weights.numel() for weights in components.roles.family.pipe.vae.parameters())
    assert {key: said.weights[key] for key in ("trunk", "student", "fake", "decoder")} == {
        "trunk": trunk,
        "student": numel(components, "student"),
        "fake": numel(components, "fake"),
        "decoder": decoder,
    }
    assert said.parts.static["student"] == 4 * numel(components, "student")
    assert said.parts.static["optimizer"] == 8 * (numel(components, "student") + numel(components, "fake"))
    encoders = [part for key, part in components.roles.family.pipe.components.items() if key.startswith("text_encoder")]
    held = sum(weights.numel() for part in encoders for weights in {id(p): p for p in part.parameters()}.values())
    assert said.weights["text encoders"] == pytest.approx(held, rel=0.02)  # buffers are in the files as well
    cond = components.roles.family.blank_text(1)
    real = components.encoder.encode([tiny.WORDS[0]])
    assert {key: value.shape for key, value in real.items()} == {key: value.shape for key, value in cond.items()}
    noise = torch.randn(1, *components.latent_shape)
    with torch.no_grad():
        flop = flop_of(lambda: components.roles.teacher(noise, torch.tensor([0.5]), cond))
    assert said.costs.forward["teacher"] == flop


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("sdxl", {"checkpointing": True}),
        ("sd3", {"checkpointing": True}),
        ("sd3", {"checkpointing": False}),
        ("sd3", {"checkpointing": True, "full": "both"}),
        ("shapes", {}),
    ],
)
def test_memory_and_flop_of_an_update_are_what_is_measured(folders: Path, name: str, model: dict[str, Any]) -> None:
    batch = 8
    cfg = (
        read_recipe("gdmd_paper", [f"loop.batch_size={batch}"])
        if name == "shapes"
        else recipe(folders, name, batch=batch, **model)
    )
    said, components = planned(cfg), build(cfg, "cpu")
    cond = components.encoder.null(batch) if name == "shapes" else components.roles.family.blank_text(batch)
    noise, t = torch.randn(batch, *components.latent_shape), torch.rand(batch)

    def update() -> None:
        components.roles.student(noise, t, cond).x0.square().mean().backward()

    update()  # the gradients are there from here on, as they are counted apart
    assert said.costs.graded["student"].flop == pytest.approx(flop_of(update), rel=0.01)
    assert said.costs.graded["student"].bytes == pytest.approx(peak_of(update), rel=0.15)
    with torch.no_grad():
        peak = peak_of(lambda: components.roles.teacher(torch.cat([noise] * 2), torch.cat([t] * 2), _twice(cond)))
    assert said.parts.chunk == (math.inf if name == "shapes" else 8)
    assert said.parts.forward(2 * batch) == pytest.approx(peak, rel=0.15)


def _twice(cond: Any) -> dict[str, torch.Tensor]:
    return {key: value[:1].expand(2 * len(value), *value.shape[1:]) for key, value in cond.items()}


def test_activation_checkpointing_is_shown_with_and_without(folders: Path) -> None:
    on, off = (planned(recipe(folders, "sd3", batch=8, checkpointing=choice)).costs for choice in (True, False))
    assert on.with_checkpointing is not None and off.with_checkpointing is not None
    assert on.with_checkpointing == off.with_checkpointing < 0.9 * on.without
    assert on.without == pytest.approx(off.without, rel=0.15)


def test_passes_are_those_of_the_algorithm() -> None:
    for name, expected in (("gdmd_paper", 2.5 / 4 + 3 + 2 + 1 + 3), ("dmd", 2.5 + 15 + 2 + 1 + 3)):
        assert planned(read_recipe(name)).passes == pytest.approx(expected, rel=0.02)
    method = GdmdConfig(group_size=4, step_draw="batch")
    adapters = {"model": {"kind": "diffusers", "path": "a/b"}, "method": method, "rewards": [{"kind": "clip"}]}
    cfg = RunConfig(name="x", loop=LoopConfig(steps=40, batch_size=4), **adapters)
    counted = tally(cfg)
    assert counted.updates == {"student": 4, "fake": 4} and counted.decoded == 5 and counted.widest == 2


def test_every_method_is_counted_through_its_own_stages() -> None:
    cfg = read_recipe("dmdr", ["loop.batch_size=4"])
    assert isinstance(cfg.method, DmdrConfig) and cfg.loop.steps == 2 * cfg.method.cold_start
    counted = tally(cfg)
    assert (counted.decoded, counted.steered) == (0.5, 0.5)  # tilted in its first half, ReFL in its second
    assert tally(read_recipe("dmd2", ["loop.batch_size=4"])).graded["fake"] == 5 + 10 + 1  # head: real and student


def test_the_real_method_makes_as_many_passes_as_counted() -> None:
    cfg = read_recipe("shapes_smoke", ["loop.batch_size=8", "method.step_draw=sample"])
    components, calls = build(cfg, "cpu"), []
    for who in ("student", "fake", "teacher"):
        net = getattr(components.roles, who).net
        net.register_forward_hook(lambda net, given, answer, who=who: calls.append((who, len(answer))))
    prompts = components.stream.at(0)
    for update in components.method.iteration(0, prompts, SampleRng(0, 0, prompts.index)):
        update.loss(update.batch)
    counted = tally(cfg)
    for who in ("fake", "teacher"):
        assert sum(rows for name, rows in calls if name == who) / 8 == counted.passes[who] + counted.graded[who]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 859_520_964),
        ("stabilityai/stable-diffusion-3-medium-diffusers", 2_028_328_000),
        ("black-forest-labs/FLUX.1-dev", 11_901_408_320),
        ("black-forest-labs/FLUX.2-dev", 32_223_281_152),
        ("black-forest-labs/FLUX.2-klein-base-4B", 3_875_544_576),
        ("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", 1_604_641_952),
    ],
)
def test_the_published_models_have_their_published_sizes(name: str, weights: int) -> None:
    opened = meta_family(DiffusersModel(path=name))
    assert sum(own.numel() for own in opened.family.net.parameters()) == weights
    assert all(own.device.type == "meta" for own in opened.family.net.parameters())


def test_an_unknown_hub_id_is_planned_by_its_family_or_refused() -> None:
    with pytest.raises(ValueError, match="set model.family"):
        meta_family(DiffusersModel(path="somebody/own-model"))
    opened = meta_family(DiffusersModel(path="somebody/own-model", family="sd15"))
    assert "the standard model of family sd15" in opened.source
    with pytest.raises(ValueError, match="is of family sdxl, but model.family = sd3"):
        meta_family(DiffusersModel(path="stabilityai/stable-diffusion-xl-base-1.0", family="sd3"))
    assert {model.family for model in MODELS.values()} == set(tiny.BUILD)


def test_adapters_are_made_on_the_hollow_network_without_memory() -> None:
    family = meta_family(DiffusersModel(path="stable-diffusion-v1-5/stable-diffusion-v1-5", lora_rank=8)).family
    weights = DiffusersRoles(family).parameters("student").values()
    assert {own.device.type for own in weights} == {"meta"} and sum(own.numel() for own in weights) > 1e6


def test_it_says_what_does_not_fit_and_what_to_change(folders: Path) -> None:
    small = Gpu("tiny", 1.0, 1.001, 10.0)
    said = plan(recipe(folders, "sd3", GdmdConfig(group_size=2), batch=16), small, 0.5)
    text = described(said, [])
    assert not said.fits and "it does NOT fit" in text and "loop.micro_batch=1" in text
    assert "not counted, size unknown here: math:fsum" in text
    assert planned(recipe(folders, "sd3")).fits
    assert said.total == max(said.parts.total(16), said.embedding) > GIB


def test_rewards_that_wait_on_the_cpu_are_counted_one_at_a_time_unless_they_are_back_propagated(folders: Path) -> None:
    plain = recipe(folders, "sd3", GdmdConfig(group_size=2))
    here, away = ([{"kind": kind, "offload": on} for kind in ("clip", "hps")] for on in (False, True))
    held, visits = (plan(RunConfig.model_validate(plain.model_dump() | {"rewards": r}), GPU, 0.4) for r in (here, away))
    clip, hps = 4 * CLIP_L.weights, 4 * CLIP_H.weights
    assert held.parts.static["rewards"] == clip + hps and visits.parts.static["rewards"] == 0
    assert visits.parts.picture - held.parts.picture == hps
    assert held.total - visits.total == pytest.approx(clip, rel=0.01)
    own = DmdReflConfig(fake_updates=1).model_dump()
    steered = plan(RunConfig.model_validate(plain.model_dump() | {"rewards": away, "method": own}), GPU, 0.4)
    assert steered.parts.static["rewards"] == clip + hps


def test_moments_of_8_bits_are_counted(folders: Path) -> None:
    cfg = recipe(folders, "sd3", full="student")
    small = cfg.model_copy(update={"loop": cfg.loop.model_copy(update={"optimizer": "adamw8bit"})})
    wide, narrow = (planned(one).parts.static["optimizer"] for one in (cfg, small))
    own = networks_of(cfg).roles
    numbers = [p.numel() for role in ("student", "fake") for p in own.parameters(role).values()]
    assert wide == 8 * sum(numbers)
    assert narrow == sum(moment_bytes(n) for n in numbers) < wide


def test_the_scaling_table_follows_its_formulas(folders: Path) -> None:
    said = planned(recipe(folders, "sd3", batch=8))
    one, two, many = said.scaling([1, 2, 512])
    assert one.ddp_traffic == one.fsdp_traffic == 0 and one.ddp_efficiency == 1
    own = 4 * said.weights["student"]
    assert two.ddp_traffic * 1e9 == pytest.approx(2 * 0.5 * own * (1 + 2))  # one student update, two of the fake
    assert (one.batch, two.batch, many.batch) == (8, 8, 512)
    assert many.ddp_gib < one.ddp_gib and 0 < many.ddp_efficiency <= two.ddp_efficiency < 1
    assert all(
        (row.fsdp_gib, row.fsdp_traffic) == (row.ddp_gib, row.ddp_traffic) for row in (two, many)
    )  # nothing is cut


def test_the_scaling_table_of_full_copies_cuts_and_gathers_them(folders: Path) -> None:
    said = planned(recipe(folders, "sd3", batch=8, full="both"))
    one, two, many = said.scaling([1, 2, 512])
    assert many.fsdp_gib < two.fsdp_gib < one.fsdp_gib + 0.01 and two.fsdp_gib < two.ddp_gib
    assert two.fsdp_traffic > two.ddp_traffic > 0 and 0 < many.fsdp_efficiency < many.ddp_efficiency < 1


def test_hybrid_sharding_is_in_the_table_where_there_are_whole_nodes_and_something_is_cut(folders: Path) -> None:
    said = planned(recipe(folders, "sd3", batch=8, full="both"))
    inside, broken, two = said.scaling([8, 12, 16])
    assert inside.hybrid is None and broken.hybrid is None and two.hybrid is not None
    copies = 4 * said.weights["student"]
    assert two.hybrid.between * 1e9 == pytest.approx(2 / 2 * copies / 8 * (1 + 2))  # a shard per update of both
    assert two.hybrid.inside == pytest.approx(inside.fsdp_traffic) and two.hybrid.between < two.fsdp_traffic
    assert two.hybrid.efficiency > two.fsdp_efficiency and two.hybrid.gib > two.fsdp_gib
    assert "replicas across nodes" in described(said, [two]) and "replicas" not in described(said, [inside])
    assert all(row.hybrid is None for row in planned(recipe(folders, "sd3", batch=8)).scaling([16]))


def test_the_program_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    from gdmd.cli.app import app

    app(["plan", "shapes_smoke", "loop.batch_size=4", "--gpus", "table", "--json"], standalone_mode=False)
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] and len(said["scaling"]) == 10 and said["weights"]["trunk"] == 786984
    for wrong, why in ((["--gpus", "many"], "is no number"), (["--gpu", "h10"], "did you mean 'h100'")):
        with pytest.raises(ValueError, match=why):
            app(["plan", "shapes_smoke", *wrong], standalone_mode=False)
