"""A student that starts from a turbo model or with a LoRA, and a teacher with LoRAs, on the shipped miniatures."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
from cli_world import run_gdmd
from random_loras import pipeline, write_lora
from safetensors.torch import load_file, save_file
from stock_pipelines import UNIFORM, stock_images, trainers_images
from torch import Tensor, nn

from gdmd import ConfigError, DistillationTrainer, DMDConfig, TrainingConfig, load_student
from gdmd.cli.app import main
from gdmd.config.image_source import SourceConfig
from gdmd.config.metric_keys import metric_keys
from gdmd.config.model import DiffusersModel, LoraFile
from gdmd.config.run import RunConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.sampling import few_step_sample
from gdmd.export.front_matter import front_matter
from gdmd.export.pipeline import student_scheduler
from gdmd.io import RunError
from gdmd.models.loading import open_family
from gdmd.models.lora_files import fuse_loras, lora_factors
from gdmd.models.packing import in_patches
from gdmd.models.roles import DiffusersRoles
from gdmd.models.student_start import check_alike, open_start
from gdmd.plan.cost_model import GPUS
from gdmd.plan.estimate import plan
from gdmd.plan.networks import Costs
from gdmd.recipes.build import build
from gdmd.recipes.inputs import check_start
from gdmd.recipes.open_run import open_named, open_student
from gdmd.recipes.read import read_recipe
from gdmd.recipes.run_folders import config_of
from gdmd.runs.run_folder import read_metrics
from gdmd.shapes.grammar import catalog, fixed_rows
from gdmd.sources.pipelines import open_export
from gdmd.training.warm_start import check_model

SETTINGS = (
    "method={kind: dmd, fake_updates: 1, guidance: 3.0}",
    "model.lora_rank=4",
    "model.lora_alpha=8",
    "loop.batch_size=4",
    "loop.lr_student=3.0e-3",
    "loop.lr_schedule=constant",
    "loop.warmup=0",
    "loop.ema=0.5",
    "validation.every=0",
    "loop.threads=1",
)
CAPTIONS = catalog().texts(fixed_rows("eval", 1))[:3]
SHIFT = 2.0
"""Of the turbo SD3's scheduler; the base's is 3."""


def recipe(name: str, *more: str) -> RunConfig:
    return read_recipe(f"shapes_{name}", [*SETTINGS, *more])


def denoiser(pipe: Any) -> nn.Module:
    net: nn.Module = pipe.components.get("unet") or pipe.transformer
    return net


@pytest.fixture(scope="module")
def turbo(folders: Path) -> Callable[[str], Path]:
    """A few-step pipeline of a miniature: a short run's merged export, as somebody else's checkpoint."""

    def made(name: str) -> Path:
        folder = folders / f"{name}-checkpoint"
        if not folder.exists():
            run = folders / f"{name}-run"
            run_gdmd("train", f"shapes_{name}", *SETTINGS, "loop.steps=3", "--run", run, "--no-eval")
            run_gdmd("export", run, "--merged", "-o", folder)
            (folder / "gdmd_export.json").unlink()
            file = folder / "scheduler" / "scheduler_config.json"
            config = json.loads(file.read_text())
            file.write_text(json.dumps(config | ({"shift": SHIFT} if name == "sd3" else {})))
        return folder

    return made


@pytest.fixture(scope="module")
def loras(folders: Path) -> Mapping[str, Path]:
    """A style and a few-step LoRA of the SDXL miniature, one with kohya's keys on convolutions, too; and one of SD3."""
    return {
        "style": write_lora(folders / "style.safetensors", "sdxl", 1, ("to_q", "to_k", "conv1"), kohya=True),
        "few-step": write_lora(folders / "few-step.safetensors", "sdxl", 2, ("to_k", "to_v", "ff.net.2")),
        "sd3": write_lora(folders / "sd3.safetensors", "sd3", 3, ("attn.to_q", "ff.net.2"), ("transformer",)),
    }


def noises_of(roles: DiffusersRoles) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return [torch.randn(len(CAPTIONS), *roles.family.latent_shape, generator=drawn) for _ in UNIFORM]


def difference(roles: Any, pipe: Any, patch: pytest.MonkeyPatch, *, bound: bool = False) -> float:
    """Largest difference of the student's images from those of a stock pipeline, in [0, 1]."""
    noises = noises_of(roles)
    drawn = stock_images(pipe, roles, noises, patch, CAPTIONS, bound=bound)
    return float((drawn - trainers_images(roles, noises, CAPTIONS)).abs().max())


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
@pytest.mark.parametrize("full", ["none", "both"])
def test_student_starts_as_the_turbo_model(
    name: str,
    full: str,
    turbo: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cfg = recipe(name, f"model.student={turbo(name)}", f"model.full={full}")
    components = build(cfg, "cpu")
    roles: Any = components.roles
    assert difference(roles, pipeline(name, turbo(name)), monkeypatch) <= 1e-5
    assert "adds no noise" not in caplog.text  # a merged export has the student's scheduler
    if name == "sd3":
        assert components.student_steps == pytest.approx([SHIFT * u / (1 + (SHIFT - 1) * u) for u in UNIFORM])
    noise, t = noises_of(roles)[0], torch.full((len(CAPTIONS),), 0.6)
    cond = roles.family.encoder.encode(CAPTIONS)
    with torch.no_grad():
        teacher, fake, student = (roles.__dict__[role](noise, t, cond).x0 for role in ("teacher", "fake", "student"))
        roles.follow(0.0)
        old = roles.old(noise, t, cond).x0
    base = build(recipe(name), "cpu").roles.teacher(noise, t, cond).x0
    assert torch.equal(teacher, base) and torch.allclose(fake, teacher, atol=1e-6)
    assert torch.allclose(old, student, atol=1e-6) and not torch.allclose(student, teacher, atol=0.05)


@pytest.fixture(scope="module")
def euler(folders: Path, turbo: Callable[[str], Path]) -> Callable[[str], Path]:
    """The same pipelines with the deterministic schedulers of published ones."""

    def made(name: str) -> Path:
        folder = folders / f"{name}-euler"
        if not folder.exists():
            shutil.copytree(turbo(name), folder)
            pipe = pipeline(name, folder)
            kind = diffusers.DDIMScheduler if name == "sdxl" else diffusers.FlowMatchEulerDiscreteScheduler
            own = {"timestep_spacing": "trailing", "set_alpha_to_one": True} if name == "sdxl" else {}
            pipe.scheduler = kind.from_config(pipe.scheduler.config, **own, stochastic_sampling=False)
            pipe.save_pretrained(folder)
        return folder

    return made


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux2_klein"])
def test_first_images_are_those_of_the_turbo_pipelines_own_call(
    name: str, euler: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The call has its own scheduler and 4 steps; SD3's call has different times, which the note names."""
    words = [f"model.student={euler(name)}", "method.student_sampler=ode"]
    if name == "sd3":
        build(recipe(name, *words), "cpu")
        (steps,) = re.findall(r"(method.student_steps=\[.*?\]) are its times", caplog.text)
        words.append(steps)
        caplog.clear()
    components = build(recipe(name, *words), "cpu")
    assert "the first images differ" not in caplog.text
    roles: Any = components.roles
    noises, pipe = noises_of(roles), pipeline(name, euler(name))
    pipe.set_progress_bar_config(disable=True)
    given = {"sdxl": {"guidance_scale": 0.0}, "sd3": {"guidance_scale": 0.0}, "flux2_klein": {"guidance_scale": 1.0}}
    own = {"max_sequence_length": roles.family.cfg.max_tokens} if name != "sdxl" else {}
    start = in_patches(noises[0]) if name == "flux2_klein" else noises[0]
    size = {"height": 32, "width": 32, "num_inference_steps": 4, "output_type": "pt"}
    drawn = pipe(prompt=list(CAPTIONS), latents=start, **size, **given[name], **own).images
    cond = roles.family.encoder.encode(CAPTIONS)
    x0 = few_step_sample(roles.student, noises[0], components.student_steps, cond, never, roles.schedule, "ode")
    assert float((roles.family.codec.decode(x0).clamp(0, 1) - drawn).abs().max()) <= 1e-4


def never(i: int) -> Tensor:
    raise AssertionError(f"a deterministic sampler drew noise for step {i}")


def test_deterministic_student_from_training_to_its_exports(
    euler: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA on an Euler-sampled turbo model; ``gdmd sample``'s source, the pipelines and the exports draw its images."""
    run, options = tmp_path / "run", (f"model.student={euler('sdxl')}", "method.student_sampler=ode")
    run_gdmd("train", "shapes_sdxl", *SETTINGS, *options, "loop.steps=2", "--run", run, "--no-eval")
    cfg = config_of(run)
    key = "student/moved"  # from the teacher, which says nothing about a student that starts elsewhere
    assert not any(key in row for row in read_metrics(run)) and key not in metric_keys(cfg)
    starts = {"student": None}, {"student": None, "student_lora": LoraFile(path="a")}
    models = [cfg.model.model_copy(update=changes) for changes in starts]
    as_teacher = [cfg.model_copy(update={"model": one}).starts_as_teacher for one in (cfg.model, *models)]
    assert as_teacher == [False, True, False]
    run_gdmd("export", run)
    roles = opened(run)
    noises = noises_of(roles)
    wanted = trainers_images(roles, noises, CAPTIONS, "ode")
    card = (run / "export" / "README.md").read_text()
    assert "The scheduler is deterministic (Euler, DDIM)" in card and "DPMSolverMultistepScheduler" in card
    source = open_export(SourceConfig(name="it", where=str(run / "export"))).pipe
    for pipe in (by_the_card(run / "export"), source, load_student(run), load_student(run / "export")):
        drawn = stock_images(pipe, roles, noises, monkeypatch, CAPTIONS)
        assert float((drawn - wanted).abs().max()) <= 1e-4
    _, components, sampler, _ = open_named(str(run))
    rng = SampleRng(0, 0, torch.arange(len(CAPTIONS)))
    noise = rng.normal("eval_noise", components.latent_shape)
    own: Any = components.roles
    x0 = few_step_sample(
        own.student, noise, components.student_steps, own.family.encoder.encode(CAPTIONS), never, own.schedule, "ode"
    )
    assert torch.equal(sampler.latents(CAPTIONS, rng), x0)


@pytest.mark.parametrize("full", ["none", "student"])
def test_student_starts_with_a_lora(full: str, loras: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    options = (
        f"model.teacher_loras=[{{path: {loras['style']}, weight: 0.7}}]",
        f"model.student_lora={loras['few-step']}",
    )
    roles: Any = build(recipe("sdxl", *options, f"model.full={full}", "model.fake_from=student"), "cpu").roles
    pipe = pipeline("sdxl")
    pipe.load_lora_weights(str(loras["style"]), adapter_name="style")
    pipe.load_lora_weights(str(loras["few-step"]), adapter_name="turbo")
    pipe.set_adapters(["style", "turbo"], [0.7, 1.0])
    pipe.scheduler = student_scheduler(roles.start, UNIFORM)
    assert difference(roles, pipe, monkeypatch) <= 1e-5
    roles.student = roles.fake
    assert difference(roles, pipe, monkeypatch) <= 1e-5
    pipe.set_adapters(["style"], [0.7])
    roles.student = roles.teacher
    assert difference(roles, pipe, monkeypatch) <= 1e-5


@pytest.mark.parametrize(("name", "lora"), [("sdxl", "style"), ("sdxl", "few-step"), ("sd3", "sd3")])
def test_fused_as_by_diffusers(name: str, lora: str, loras: Mapping[str, Path]) -> None:
    ours, theirs = pipeline(name), pipeline(name)
    before = {key: value.clone() for key, value in denoiser(ours).state_dict().items()}
    fuse_loras(ours, [lora_factors(ours, LoraFile(path=str(loras[lora]), weight=0.7))])
    theirs.load_lora_weights(str(loras[lora]))
    theirs.fuse_lora(lora_scale=0.7)
    theirs.unload_lora_weights()
    found, wanted = (denoiser(pipe).state_dict() for pipe in (ours, theirs))
    assert all(torch.allclose(found[key], wanted[key], atol=1e-5) for key in wanted)
    assert sum(not torch.allclose(found[key], before[key], atol=1e-3) for key in wanted) >= 4


@pytest.fixture(scope="module")
def styled(folders: Path, loras: Mapping[str, Path]) -> Path:
    """A run of two steps of the SDXL miniature with a style and a few-step LoRA."""
    run, style = folders / "styled", f"model.teacher_loras=[{{path: {loras['style']}, weight: 0.7}}]"
    options = (style, f"model.student_lora={loras['few-step']}")
    run_gdmd(
        "train",
        "shapes_sdxl",
        *SETTINGS,
        *options,
        "loop.steps=2",
        "loop.checkpoint_every=1",
        "--run",
        run,
        "--no-eval",
    )
    return run


def opened(run: Path) -> Any:
    return open_student(config_of(run), run)[0].roles


def by_the_card(export: Path) -> Any:
    """The pipeline of the model card's example, on the CPU."""
    (code,) = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.S)
    names: dict[str, Any] = {}
    on_cpu = str(code).replace("torch.bfloat16", "torch.float32").replace('.to("cuda")', "")
    exec(on_cpu.replace("THIS_FOLDER", str(export)), names)
    return names["pipe"]


@pytest.mark.parametrize("options", [(), ("--no-loras",), ("--merged",)])
def test_exports_with_and_without_the_loras(
    options: tuple[str, ...], styled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    run_gdmd("export", styled, *options, "-o", folder)
    roles = opened(styled)
    assert difference(roles, by_the_card(folder), monkeypatch) <= 1e-4
    assert difference(roles, open_export(SourceConfig(name="it", where=str(folder))).pipe, monkeypatch) <= 1e-4
    said = "not contained: load them first, as above" if "--no-loras" in options else "contained in these weights"
    row = f"| LoRAs | style.safetensors (0.7), few-step.safetensors (1): {said} |"
    card = (folder / "README.md").read_text()
    assert row in card and "| LoRA | few-step.safetensors | fill in; its terms bind this student |" in card


def test_export_on_the_turbo_model(
    turbo: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, options = tmp_path / "run", (f"model.student={turbo('sd3')}", "loop.steps=2")
    run_gdmd("train", "shapes_sd3", *SETTINGS, *options, "--run", run, "--no-eval")
    run_gdmd("export", run)
    pipe = by_the_card(run / "export")
    assert pipe.scheduler.config.shift == SHIFT
    assert difference(opened(run), pipe, monkeypatch) <= 1e-4
    pipe.unload_lora_weights()
    assert difference(opened(run), pipe, monkeypatch) > 1e-2
    card = (run / "export" / "README.md").read_text()
    assert "| teacher | shapes:sd3 |" in card and "`base_model`: the hub id of sd3-checkpoint" in card
    assert "base_model: org/turbo\n" in front_matter(recipe("sd3", "model.student=org/turbo"), {}, None, lora=True)


@pytest.mark.parametrize(("start", "full"), [("student_lora", "none"), ("student", "student")])
def test_student_as_a_pipeline(
    start: str,
    full: str,
    turbo: Callable[[str], Path],
    loras: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pipelines of the trainer, its run and its export; training with stored text embeddings."""
    started = {"student_lora": str(loras["few-step"])} if start == "student_lora" else {"student": str(turbo("sdxl"))}
    given = {**started, "teacher_loras": [{"path": str(loras["style"]), "weight": 0.7}]}
    overrides: dict[str, Any] = {f"model.{key}": value for key, value in given.items()}
    overrides |= {"model.full": full, "model.embeddings": str(tmp_path / "embeddings")}
    run, export = tmp_path / "run", tmp_path / "export"
    overrides |= {"loop.batch_size": 4, "loop.threads": 1, "loop.warmup": 0, "loop.ema": 0.5, "validation.every": 0}
    overrides |= {"eval.per_task": 1, "eval.images": 1, "eval.teacher_steps": 2}
    args = TrainingConfig(
        output_dir=run, max_steps=2, learning_rate=3e-3, lr_scheduler_type="constant", overrides=overrides
    )
    trainer = DistillationTrainer("shapes:sdxl", DMDConfig(fake_updates=1), args=args)
    trainer.train()
    trainer.save_lora(export)
    roles = opened(run)
    roles.family.encoder = build(recipe("sdxl"), "cpu").encoder
    roles.start.encoder = roles.family.encoder
    for pipe in (trainer.pipeline, load_student(run), load_student(export)):
        assert difference(roles, pipe, monkeypatch, bound=True) <= 1e-4
    assert difference(roles, pipeline("sdxl"), monkeypatch) > 1e-2


def test_resume_is_bit_exact_with_a_moved_lora(
    styled: Path, loras: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    halves, moved = tmp_path / "halves", tmp_path / "moved.safetensors"
    shutil.copytree(styled, halves)
    shutil.rmtree(halves / "checkpoints" / "step_000002")
    shutil.copy(loras["style"], moved)
    options = (f"model.teacher_loras=[{{path: {moved}, weight: 0.7}}]",)
    run_gdmd("train", "--resume", halves, *options, "--no-eval")
    assert "model.teacher_loras.0.path moved" in capsys.readouterr().err
    for part in ("student", "fake", "ema"):
        wanted, found = (
            load_file(run / "checkpoints" / "step_000002" / f"{part}.safetensors") for run in (styled, halves)
        )
        first = load_file(halves / "checkpoints" / "step_000001" / f"{part}.safetensors")
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
        assert any(not torch.equal(first[key], found[key]) for key in wanted)
    shutil.copy(loras["few-step"], moved)
    with pytest.raises(SystemExit) as end:
        main(["train", "--resume", str(halves), *options, "loop.steps=3", "--no-eval"])
    assert end.value.code
    assert "model.teacher_loras.0.path" in "".join(capsys.readouterr())


def test_start_from_a_run_with_other_loras(styled: Path, loras: Mapping[str, Path]) -> None:
    other = recipe("sdxl", f"loop.start_from={styled}")
    with pytest.raises(ValueError, match="model.student_lora is 'a LoRA of weight 1.0' there and None here"):
        check_model(str(styled), other.model_dump(mode="json"))
    swapped = (
        f"model.teacher_loras=[{{path: {loras['few-step']}, weight: 0.7}}]",
        f"model.student_lora={loras['style']}",
    )
    with pytest.raises(RunError, match=r"another base model. model.teacher_loras.0.path"):
        check_start(recipe("sdxl", f"loop.start_from={styled}", *swapped))


def test_only_trained_weights_require_gradients(turbo: Callable[[str], Path]) -> None:
    components = build(recipe("sdxl", f"model.student={turbo('sdxl')}"), "cpu")
    roles: Any = components.roles
    nets = roles.backbone_nets()
    trained = {id(w) for role in ("student", "fake") for w in roles.parameters(role).values()}
    assert len(nets) == 2 and not set(map(id, roles.parameters("student").values())) & set(
        map(id, nets[0].parameters())
    )
    assert all(w.requires_grad == (id(w) in trained) for net in nets for w in net.parameters())


def broken(file: Path, to: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    save_file(change(load_file(file)), to)
    return to


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "shapes:sd3"}, r"model.student 'shapes:sd3' is a StableDiffusion3Pipeline .sd3., but the teacher"),
        ({"student": "nowhere/at/all"}, r"model.student 'nowhere/at/all': there is no such folder"),
        ({"student_lora": "SD3"}, r"sd3.safetensors' changes no layer of a StableDiffusionXLPipeline"),
        ({"teacher_loras": ("PARTIAL",)}, r"only 2\d of its 2\d layers are in a .*Give a LoRA of this model$"),
        (
            {"student_lora": "TEXT"},
            r"model.student_lora .*also changes the text encoders .1 layers., but student, teacher",
        ),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], message: str, loras: Mapping[str, Path], tmp_path: Path) -> None:
    extra = torch.ones(2, 2)
    few, other = loras["few-step"], "unet.mid_block.nothing.to_q"
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    files = {
        "SD3": lambda: loras["sd3"],
        "PARTIAL": lambda: broken(few, tmp_path / "partial.safetensors", lambda t: t | _layer(other, extra)),
        "TEXT": lambda: broken(few, tmp_path / "text.safetensors", lambda t: t | _layer(text, torch.ones(32, 32))),
    }
    given = json.loads(json.dumps(changes))
    for name, file in files.items():
        given = json.loads(json.dumps(given).replace(f'"{name}"', json.dumps(str(file()))))
    size = read_recipe("shapes_sdxl", []).model
    model = DiffusersModel(**{**size.model_dump(), **given})
    with pytest.raises(ValueError, match=message):
        open_start(open_family(model))


def _layer(name: str, value: Tensor) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": value.clone(), f"{name}.lora_B.weight": value.clone()}


def test_student_of_another_noise_schedule() -> None:
    family = open_family(read_recipe("shapes_sdxl", []).model)  # type: ignore[arg-type]
    start = copy.copy(family)
    start.schedule = replace(family.schedule, beta_end=0.02)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="has another noise schedule .betas. than the teacher 'shapes:sdxl'"):
        check_alike(family, start)


def test_loras_and_a_quantized_base(loras: Mapping[str, Path]) -> None:
    with pytest.raises(
        ConfigError, match="quantization = int8 cannot be used with student_lora, because a LoRA is fused"
    ):
        recipe("sdxl", "model.quantization=int8", f"model.student_lora={loras['style']}")


@pytest.fixture(scope="module")
def costs() -> Costs:
    """The costs of the SDXL miniature's calls, which take seconds to measure."""
    return plan(recipe("sdxl"), GPUS["rtx4090"], 0.4).costs


@pytest.mark.parametrize(
    ("full", "quantization", "networks"), [("none", "none", 2), ("none", "int8", 2), ("student", "none", 1)]
)
def test_plan_counts_the_second_frozen_network(full: str, quantization: str, networks: int, costs: Costs) -> None:
    settings = (f"model.full={full}", f"model.quantization={quantization}")
    plain, started = (
        plan(recipe("sdxl", *settings, *more), GPUS["rtx4090"], 0.4, costs).cost.static["base model"]
        for more in ((), ("model.student=shapes:sdxl",))
    )
    assert started == networks * plain
