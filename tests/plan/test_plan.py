"""``gdmd plan`` against a real run of the same recipe: weights exactly, FLOP and memory by measurement."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from diffusers import AutoencoderTiny
from tiny_rewards import prompt_batch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.methods.dmd2 import DMD2Config
from gdmd.config.methods.dmd_reward import DMDReFLConfig
from gdmd.config.methods.dmdr import DMDRConfig
from gdmd.config.methods.gdmd import GDMDConfig
from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.config.training import LoopConfig
from gdmd.config.validation import ValidationConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.methods.dmd import Dmd
from gdmd.methods.dmd_refl import DmdRefl, RewardedBatch
from gdmd.methods.scorer import Scorer
from gdmd.models.loading import FAMILIES, open_family
from gdmd.models.roles import DiffusersRoles
from gdmd.plan.cost_model import CLIP_H, CLIP_L, GIB, Gpu, ProcessCost, RoleTraffic, Sharded, gpu_of, scaling_row
from gdmd.plan.estimate import TrainingPlan, counts_of, plan
from gdmd.plan.fake_tensors import CPU_ATTENTION, fake_mode, fake_weights, measure
from gdmd.plan.meta_pipeline import meta_family
from gdmd.plan.model_configs import MODELS
from gdmd.plan.text import described
from gdmd.recipes.build import build
from gdmd.recipes.call_counts import count_calls
from gdmd.recipes.read import read_recipe
from gdmd.rewards.callable import CallableReward
from gdmd.training.adamw8bit import moment_bytes

GPU = gpu_of("h100")
_PLANS: dict[str, TrainingPlan] = {}


def recipe(folders: Path, name: str, method: Any = None, batch: int = 2, **model: Any) -> RunConfig:
    prompts = folders / "prompts.txt"
    prompts.write_text("\n".join(tiny.WORDS))
    return RunConfig(
        name="tiny",
        model=tiny.config(tiny.saved(folders, name), **model),
        method=method or DMDConfig(fake_updates=2, guidance=3.0, step_draw="batch"),
        loop=LoopConfig(steps=2, batch_size=batch),
        prompts={"file": str(prompts)},
        rewards=[{"kind": "callable", "target": "math:fsum"}],
    )


def planned(cfg: RunConfig) -> TrainingPlan:
    """The plan of a recipe, computed once per recipe."""
    key = cfg.model_dump_json()
    if key not in _PLANS:
        _PLANS[key] = plan(cfg, GPU, 0.4)
    return _PLANS[key]


def flop_of(work: Any) -> int:
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counted:
        work()
    return int(counted.get_total_flops())


def peak_of(work: Any) -> int:
    """Bytes that the allocator held at most beyond those at the start, by the profiler.

    Cycles that earlier tests left are collected first: freed while ``work`` runs, they would count as its own.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def numel(parameters: Any) -> int:
    return sum(weights.numel() for weights in parameters)


# ---------------------------------------------------------------- memory and FLOP


def test_attention_flop_and_memory() -> None:
    """Attention is counted by its products, and its matrix is never held."""
    with fake_mode():
        q, k, v = (torch.empty(2, 3, length, 16, requires_grad=True) for length in (500, 700, 700))
        attend = torch.nn.functional.scaled_dot_product_attention
        measured = measure(lambda: attend(q, k, v).sum().backward(), [q, k, v])
    assert measured.flop == (4 + 10) * 2 * 3 * 500 * 700 * 16
    assert measured.bytes < 4 * 2 * 3 * 500 * 700


def test_plan_equals_the_real_run(folders: Path) -> None:
    batch = 8
    cfg = recipe(folders, "sd3", batch=batch, checkpointing=True)
    estimate, components = planned(cfg), build(cfg, "cpu")
    roles, pipe = components.roles, components.roles.family.pipe
    student, fake = (numel(roles.parameters(role).values()) for role in ("student", "fake"))
    base = numel(weights for key, weights in roles.backbone.net.named_parameters() if ".lora_" not in key)
    counts = {"base model": base, "student": student, "fake": fake, "decoder": numel(pipe.vae.parameters())}
    assert {key: estimate.weights[key] for key in counts} == counts
    assert estimate.cost.static["student"] == 4 * student and estimate.cost.static["optimizer"] == 8 * (student + fake)
    encoders = [part for key, part in pipe.components.items() if key.startswith("text_encoder")]
    held = sum(numel({id(p): p for p in part.parameters()}.values()) for part in encoders)
    assert estimate.weights["text encoders"] == pytest.approx(held, rel=0.02)  # files also hold buffers

    cond = roles.family.blank_text(2 * batch)
    noise, t = torch.randn(2 * batch, *components.latent_shape), torch.rand(2 * batch)
    one = (noise[:1], t[:1], {key: value[:1] for key, value in cond.items()})
    with torch.no_grad():
        assert estimate.costs.forward["teacher"] == flop_of(lambda: roles.teacher(*one))
        peak = peak_of(lambda: roles.teacher(noise, t, cond))
    assert estimate.cost.forward(2 * batch) == pytest.approx(peak, rel=0.15)

    def update() -> None:
        part = {key: value[:batch] for key, value in cond.items()}
        roles.student(noise[:batch], t[:batch], part).x0.square().mean().backward()

    update()  # from here on the gradients exist, as they are counted separately
    assert estimate.costs.update["student"].flop == pytest.approx(flop_of(update), rel=0.01)
    assert estimate.costs.update["student"].bytes == pytest.approx(peak_of(update), rel=0.15)


@pytest.mark.parametrize("name", tiny.BUILD)
def test_meta_pipeline_equals_the_loaded_one(folders: Path, name: str) -> None:
    """Weights, conditioning shapes and FLOP of a forward pass are equal for every family."""
    cfg = tiny.config(tiny.saved(folders, name))
    loaded, meta = open_family(cfg), meta_family(cfg).family
    assert numel(meta.net.parameters()) == numel(loaded.net.parameters())
    blank, real = meta.blank_text(1), loaded.encoder.encode([tiny.WORDS[0]])
    assert {key: value.shape for key, value in real.items()} == {key: value.shape for key, value in blank.items()}
    at = torch.randn(1, *loaded.latent_shape), torch.tensor([0.5]), loaded.blank_text(1)
    with torch.no_grad():
        wanted = flop_of(lambda: loaded.predict(loaded.net, *at))
    with fake_mode(), torch.no_grad():
        fake_weights(meta.net)
        x_t, t = torch.empty(1, *meta.latent_shape), torch.ones(1)
        assert measure(lambda: meta.predict(meta.net, x_t, t, blank)).flop == wanted


def test_activation_checkpointing_is_reported_with_and_without(folders: Path) -> None:
    costs = planned(recipe(folders, "sd3", batch=8, checkpointing=True)).costs
    assert costs.with_checkpointing == max(update.bytes for update in costs.update.values()) < 0.9 * costs.without


def test_gan_head_is_planned_only_with_a_gan(folders: Path) -> None:
    method = DMD2Config(fake_updates=2, guidance=3.0, step_draw="batch")
    with_gan, without = (
        planned(recipe(folders, "sd3", method.model_copy(update={"gan_weight": weight}))) for weight in (1.0, 0.0)
    )
    assert "GAN head" not in without.weights and "GAN head" in described(with_gan, [])
    assert with_gan.weights["GAN head"] + with_gan.weights["fake"] == with_gan.cost.static["fake"] // 4
    feature_calls = 2 * method.fake_updates + 1  # real and student latents per fake update, and the student's x0
    assert with_gan.passes - without.passes == pytest.approx(feature_calls * 2)  # a frozen backbone: 1 + 1
    assert with_gan.total > without.total and with_gan.seconds > without.seconds


def test_feature_cost_of_the_published_unets() -> None:
    paths = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}
    assert {family.name for family in FAMILIES if family.feature_cost != 1} == set(paths)
    for name, path in paths.items():
        family = meta_family(DiffusersModel(path=path, height=512, width=512)).family
        at = (family.net, torch.empty(1, *family.latent_shape), torch.ones(1), family.blank_text(1))
        with fake_mode(), torch.no_grad():
            fake_weights(family.net)
            whole, part = (measure(partial(call, *at)).flop for call in (family.predict, family.features))
        assert part / whole == pytest.approx(family.feature_cost, abs=0.01), name


def test_offloaded_rewards_are_counted_one_at_a_time(folders: Path) -> None:
    """With gradient they stay on the device until the backward pass through all of them."""
    plain = recipe(folders, "sd3", GDMDConfig(group_size=2)).model_dump()
    away = [{"kind": kind, "offload": True} for kind in ("clip", "hps")]
    clip, hps = 4 * CLIP_L.weights, 4 * CLIP_H.weights
    visiting = plan(RunConfig.model_validate(plain | {"rewards": away}), GPU, 0.4)
    assert visiting.cost.static["rewards"] == 0 and visiting.cost.visiting == hps
    phase = "decoding and rewards"
    assert hps < visiting.cost.peaks(4)[phase] < hps + clip
    gradient = plain | {"rewards": away, "method": DMDReFLConfig(fake_updates=1).model_dump()}
    together = plan(RunConfig.model_validate(gradient), GPU, 0.4).cost
    assert together.static["rewards"] == 0 and clip + hps < together.peaks(4)[phase] < clip + 2 * hps


@pytest.mark.parametrize("checkpointing", [True, False])
def test_reward_inside_the_students_update(folders: Path, checkpointing: bool) -> None:
    """ReFL: the graph of the student's forward pass waits while decoder and reward are back-propagated."""
    batch = 8
    cfg = recipe(folders, "sd3", DMDReFLConfig(fake_updates=1), batch=batch, checkpointing=checkpointing)
    roles = DiffusersRoles(open_family(cfg.model))  # type: ignore[arg-type]
    brightness = CallableReward(lambda images, prompts: images.mean((1, 2, 3)), "brightness", differentiable=True)
    scorer, shape = Scorer(roles.family.codec, [brightness]), roles.family.latent_shape
    refl = DmdRefl(cfg.method, roles, shape, "velocity", scorer=scorer)  # type: ignore[arg-type]
    x, cond = torch.randn(2, batch, *shape), roles.family.blank_text(batch)
    given = RewardedBatch(x[0], torch.full((batch,), 0.5), cond, x[1], prompt_batch(["a dog"] * batch))

    def update() -> None:
        refl.rewarded_loss(given).per_sample.mean().backward()
        for weights in roles.parameters("student").values():
            weights.grad = None

    update()
    peaks = planned(cfg).cost.peaks(batch)
    assert peaks["decoding and rewards"] - batch * planned(cfg).cost.scoring == pytest.approx(peak_of(update), rel=0.15)
    cost = planned(cfg).cost
    assert 0 < sum(cost.graph) < sum(cost.update)


def test_validation_decodes_with_the_models_own_decoder(folders: Path) -> None:
    """It does so in a run without rewards, too, and in one whose rewards see the images of a tiny decoder."""
    phase, cfg = "validation images", recipe(folders, "sd3")
    rewarded = planned(recipe(folders, "sd3", GDMDConfig(group_size=2)))
    assert planned(cfg).cost.peaks(2)[phase] == rewarded.cost.decoding > 0 == planned(cfg).cost.decoding
    unseen = cfg.model_copy(update={"validation": ValidationConfig(every=0)})
    assert phase not in planned(unseen).cost.peaks(2)

    blocks = dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1, 1))
    blocks |= dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (4, 4))
    AutoencoderTiny(latent_channels=4, **blocks).save_pretrained(folders / "taesd")
    tiny_decoder = {"scoring_decoder": str(folders / "taesd")}
    rough = recipe(folders, "sd3", GDMDConfig(group_size=2), **tiny_decoder)
    assert planned(rough).cost.peaks(2)[phase] == planned(cfg).cost.peaks(2)[phase] > planned(rough).cost.decoding > 0
    checked = rough.model_copy(update={"validation": ValidationConfig(every=0)})
    assert planned(checked).cost.peaks(2)[phase] == planned(cfg).cost.peaks(2)[phase]

    away = ValidationConfig(scorers=({"kind": "clip", "offload": True},))
    scored = planned(cfg.model_copy(update={"validation": away})).cost
    assert scored.static["rewards"] == 0
    assert scored.peaks(2)[phase] == 4 * CLIP_L.weights + 2 * scored.scoring > planned(cfg).cost.peaks(2)[phase]


def test_adamw8bit_state_is_counted(folders: Path) -> None:
    cfg = recipe(folders, "sd3", full="student")
    cfg = cfg.model_copy(update={"loop": cfg.loop.model_copy(update={"optimizer": "adamw8bit"})})
    roles = DiffusersRoles(meta_family(cfg.model).family)  # type: ignore[arg-type]
    numbers = [p.numel() for role in ("student", "fake") for p in roles.parameters(role).values()]  # type: ignore[arg-type]
    assert planned(cfg).cost.static["optimizer"] == sum(map(moment_bytes, numbers)) < 8 * sum(numbers)


def test_pairs_that_dmd_keeps(folders: Path) -> None:
    """The plan counts as many bytes as the method holds after the iterations that solve the pairs."""
    method = DMDConfig(
        fake_updates=1, step_draw="batch", regression_weight=0.2, regression_steps=1, regression_batches=2
    )
    cfg = recipe(folders, "sd3", method, batch=4)
    components = build(cfg, "cpu")
    assert isinstance(components.method, Dmd)
    for step in range(2):
        prompts = components.stream.at(step)
        components.method.pairs.at(step, prompts, SampleRng(0, step, prompts.index))
    held = sum(one.numel() * one.element_size() for one in components.method.pairs.state().values())
    assert planned(cfg).cost.static["kept pairs"] == held > 0
    longer = cfg.model_copy(update={"loop": cfg.loop.model_copy(update={"steps": 1})})
    assert planned(longer).cost.static["kept pairs"] == held // 2
    assert planned(recipe(folders, "sd3")).cost.static["kept pairs"] == 0


def test_mixture_of_dmdr_is_a_third_copy(folders: Path) -> None:
    method = DMDRConfig(cold_start=1, anneal=2, step_draw="batch", overlap=0.25)
    plain = method.model_copy(update={"overlap": 0.0})
    full, without = (planned(recipe(folders, "sd3", own, full="fake")) for own in (method, plain))
    more = full.cost.peaks(2)["sampling and scores"] - without.cost.peaks(2)["sampling and scores"]
    roles = DiffusersRoles(open_family(full.cfg.model))  # type: ignore[arg-type]
    assert more == 4 * numel(roles.parameters("fake").values())
    tables = 2 * 4 * numel(roles.backbone.net.buffers())  # of positions, which no plan counts, and while it is computed
    assert peak_of(lambda: roles.blended_teacher(0.1)) == pytest.approx(more + tables, rel=0.02)
    adapters = planned(recipe(folders, "sd3", method))
    assert adapters.cost.mixture == 0


# ---------------------------------------------------------------- calls per iteration


def test_passes_are_those_of_the_algorithm() -> None:
    for name, expected in (("gdmd_paper", 2.5 / 4 + 3 + 2 + 1 + 3), ("dmd", 5 * 2.5 + 15 + 2 + 1 + 3)):
        assert planned(read_recipe(name)).passes == pytest.approx(expected, rel=0.02)


def test_methods_are_counted_in_all_of_their_stages() -> None:
    cfg = read_recipe("dmdr", ["loop.batch_size=4"])
    assert isinstance(cfg.method, DMDRConfig) and cfg.loop.steps == 2 * cfg.method.cold_start
    counted = count_calls(cfg)
    assert (counted.decoded, counted.decoded_with_grad) == (0.5, 0.5)  # tilted in its first half, ReFL in its second
    assert (
        count_calls(read_recipe("dmd2", ["loop.batch_size=4"])).with_grad["fake"] == 5 + 10 + 1
    )  # head: real and student


def test_a_short_last_stage_and_its_reference_are_counted() -> None:
    """DPO copies the student once, in the first iteration of its stage, which a dry run may leave out."""
    stage = ["loop.batch_size=8", "loop.steps=400", "method.strategy=dpo"]
    for cold_start in (0, 200, 398):
        assert count_calls(read_recipe("dmdr", [*stage, f"method.cold_start={cold_start}"])).old_policy
    assert not count_calls(read_recipe("dmdr", [*stage, "method.cold_start=400"])).old_policy


def test_the_real_method_makes_the_counted_calls() -> None:
    cfg = read_recipe("shapes_smoke", ["loop.batch_size=8", "method.step_draw=sample"])
    components, calls = build(cfg, "cpu"), []
    for who in ("student", "fake", "teacher"):
        net = getattr(components.roles, who).net
        net.register_forward_hook(lambda net, given, answer, who=who: calls.append((who, len(answer))))
    prompts = components.stream.at(0)
    for update in components.method.iteration(0, prompts, SampleRng(0, 0, prompts.index)):
        update.loss(update.batch)
    counted = count_calls(cfg)
    for who in ("fake", "teacher"):
        assert sum(rows for name, rows in calls if name == who) / 8 == counted.passes[who] + counted.with_grad[who]


@pytest.mark.parametrize(
    ("words", "decoded", "with_grad", "backwards"),
    [
        (["method.scored_step=0.3"], 3, 0, 0),  # x0 and the targets of a group of 2
        (["method.scored_step=0"], 0, 1, 2),  # x0 once, and one backward pass per reward
        (["method={kind: gdmd_tilted, continuations: 3, reward_gradient: 0.1}"], 1, 2, 2),
        (["method={kind: gdmd_tilted, continuations: 3, reward_gradient: 0.1}", "loop.micro_batch=2"], 1, 2, 2),
        (["method={kind: dmd_refl, fake_updates: 1, margin: 1.5}"], 0, 1, 1),  # of the mean of the rewards
    ],
)
def test_the_real_method_makes_the_counted_decoder_passes(
    words: list[str], decoded: int, with_grad: int, backwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = read_recipe("shapes_smoke", ["loop.batch_size=4", "validation.every=0", *words])
    components, seen, reached = build(cfg, "cpu"), {True: 0, False: 0}, list[int]()
    decode = components.codec.decode

    def watched(latents: torch.Tensor) -> torch.Tensor:
        images = decode(latents)
        seen[images.requires_grad] += len(images)
        if images.requires_grad:
            images.register_hook(lambda gradient: reached.append(len(gradient)))
        return images

    monkeypatch.setattr(components.codec, "decode", watched)
    prompts = components.stream.at(0)
    for update in components.method.iteration(0, prompts, SampleRng(0, 0, prompts.index)):
        update.loss(update.batch)
    counted = count_calls(cfg)
    assert (counted.decoded, counted.decoded_with_grad) == (decoded, with_grad) == (seen[False] / 4, seen[True] / 4)
    assert counted.decoder_backwards == backwards == sum(reached) / 4
    assert max(reached, default=0) == (cfg.loop.micro_batch or 4) * (with_grad > 0)


@pytest.mark.parametrize("micro_batch", [0, 2])
@pytest.mark.parametrize("rewards", [1, 2])
def test_reward_gradients_are_planned_by_micro_batch(folders: Path, rewards: int, micro_batch: int) -> None:
    """The graph of a micro-batch is kept until the last reward's backward pass."""
    batch = 8
    cfg = recipe(folders, "sd3", GDMDConfig(group_size=2, scored_step=0.0), batch=batch)
    loop = cfg.loop.model_copy(update={"micro_batch": micro_batch})
    estimate = plan(cfg.model_copy(update={"loop": loop, "rewards": cfg.rewards * rewards}), GPU, 0.4)
    brightness = CallableReward(lambda images, prompts: images.mean((1, 2, 3)), "brightness", differentiable=True)
    family = open_family(cfg.model)  # type: ignore[arg-type]
    scorer, prompts = Scorer(family.codec, [brightness] * rewards, micro_batch), prompt_batch(["a dog"] * batch)
    work = partial(scorer.gradients, torch.randn(batch, *family.latent_shape), prompts)
    assert estimate.cost.flop["decoding and rewards"] * batch == pytest.approx(flop_of(work), rel=0.01)
    assert estimate.cost.peaks(batch)["decoding and rewards"] == pytest.approx(peak_of(work), rel=0.15)


# ---------------------------------------------------------------- hub models


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 859_520_964),
        ("stabilityai/stable-diffusion-3-medium-diffusers", 2_028_328_000),
        ("black-forest-labs/FLUX.1-dev", 11_901_408_320),
        ("black-forest-labs/FLUX.2-dev", 32_223_281_152),
        ("black-forest-labs/FLUX.2-klein-base-4B", 3_875_544_576),
        ("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", 1_604_641_952),
        ("Qwen/Qwen-Image-2.1", 7_115_124_736),
        ("krea/Krea-2-Raw", 12_820_073_036),
    ],
)
def test_known_models_have_their_published_sizes(name: str, weights: int) -> None:
    family = meta_family(DiffusersModel(path=name)).family
    assert numel(family.net.parameters()) == weights
    assert all(p.device.type == "meta" for p in family.net.parameters())


def test_unknown_hub_ids_need_a_family() -> None:
    with pytest.raises(ValueError, match="set model.family"):
        meta_family(DiffusersModel(path="somebody/own-model"))
    opened = meta_family(DiffusersModel(path="somebody/own-model", family="sd15"))
    assert "the standard model of family sd15" in opened.source
    with pytest.raises(ValueError, match="is of family sdxl, but model.family = sd3"):
        meta_family(DiffusersModel(path="stabilityai/stable-diffusion-xl-base-1.0", family="sd3"))
    assert {model.family for model in MODELS.values()} == set(tiny.BUILD)


def test_adapters_on_the_meta_device() -> None:
    family = meta_family(DiffusersModel(path="stable-diffusion-v1-5/stable-diffusion-v1-5", lora_rank=8)).family
    weights = DiffusersRoles(family).parameters("student").values()
    assert {p.device.type for p in weights} == {"meta"} and numel(weights) > 1e6


# ---------------------------------------------------------------- several GPUs, and the command


def test_traffic_between_gpus_follows_its_formulas() -> None:
    size = 10**9
    adapters, copy = RoleTraffic(size, 3), RoleTraffic(size, 3, True, calls=2, rows=2, calls_with_grad=1, losses=1)
    assert adapters.ddp(1) == adapters.fsdp(1, 4, 8, 0) == 0
    assert adapters.ddp(4) == adapters.fsdp(4, 4, 8, 0) == 2 * 0.75 * size * 3  # a ring all-reduce per update
    assert copy.fsdp(4, 4, 8, 0) == 0.75 * size * (2 + 2 + 1)  # two calls, one with gradient, one reduction
    assert copy.fsdp(4, 8, 4, 2) == 0.75 * size * (4 + 2 * 4 + 1)  # calls in chunks, micro-batches of 2


def test_scaling_table() -> None:
    cost = ProcessCost({"student": 8 * GIB}, GIB, (0, 0), 2, 8, 0, (0, 0), 0, 0, 0, {"passes": 1e12})
    role, sharded = RoleTraffic(GIB, 1, True, calls=1, losses=1), Sharded(8 * GIB, GIB, GIB // 8, 8, 0)
    rows = [scaling_row(cost, [role], sharded, 4, count, GPU, 0.4) for count in (1, 2, 8)]
    assert [row.batch for row in rows] == [4, 4, 8]  # at least one sample per GPU
    assert rows[0].ddp_gib == rows[0].fsdp_gib == 10 and rows[0].ddp_efficiency == rows[0].fsdp_efficiency == 1
    assert [row.fsdp_gib for row in rows[1:]] == [10 - 4.5 + 0.125, 10 - 9 * 7 / 8 + 0.125]
    assert 0 < rows[2].ddp_efficiency < rows[1].ddp_efficiency < 1
    update = replace(
        cost, update=(0, GIB)
    )  # of 4 samples on one GPU, of 1 on 4 GPUs, where a micro-batch of 3 is not full
    for micro, gibs in ((0, (14, 11)), (3, (13, 11))):
        assert [replace(update, micro=micro).total(samples) / GIB for samples in (4, 1)] == list(gibs)
    assert counts_of(None) == [] and counts_of("table") == [1, 2, 4, 8] and counts_of("3") == [3]


@pytest.mark.parametrize("method", ["dmd", "dmd_refl, margin: 1.5"])
def test_an_update_on_several_gpus_is_that_of_their_share_of_the_batch(method: str) -> None:
    recipes = (read_recipe("shapes", [f"loop.batch_size={batch}", f"method={{kind: {method}}}"]) for batch in (64, 8))
    eight, one = (max(planned(cfg).cost.peaks(8).values()) for cfg in recipes)
    assert eight == pytest.approx(one, rel=0.03)


def test_what_does_not_fit_gets_hints(folders: Path) -> None:
    small = Gpu("tiny", 1.0, 1.001, 10.0, 10.0)
    estimate = plan(recipe(folders, "sd3", GDMDConfig(group_size=2), batch=16), small, 0.5)
    text = described(estimate, estimate.scaling([2]))
    assert not estimate.fits and "it does NOT fit" in text and "loop.micro_batch=1" in text
    assert "not counted, size unknown: math:fsum" in text and "FSDP GiB" in text
    assert estimate.total == max(estimate.cost.total(16), estimate.embedding) > GIB


def test_plan_command(capsys: pytest.CaptureFixture[str]) -> None:
    from gdmd.cli.app import app

    app(["plan", "shapes_smoke", "loop.batch_size=4", "--gpus", "table", "--json"], standalone_mode=False)
    printed = json.loads(capsys.readouterr().out)
    assert printed["fits"] and len(printed["scaling"]) == 4 and printed["weights"]["base model"] == 786984
    for wrong, why in (
        (["--gpus", "many"], "must be an integer in 1..8"),
        (["--gpus", "9"], "several nodes are not estimated"),
        (["--gpu", "h10"], "did you mean 'h100'"),
    ):
        with pytest.raises(ValueError, match=why):
            app(["plan", "shapes_smoke", *wrong], standalone_mode=False)
