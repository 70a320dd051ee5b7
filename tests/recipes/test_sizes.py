"""Training at several image sizes: one per iteration, drawn by (seed, step), with what follows it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from PIL import Image
from ranks import apart, linear_steps, run_ranks
from rich.console import Console
from torch import Tensor

from gdmd.config.image_source import read_source
from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.methods.dmd2 import DMD2Config
from gdmd.config.methods.gdmd import GDMDConfig
from gdmd.config.metric_keys import metric_keys
from gdmd.config.run import RunConfig
from gdmd.config.training import LoopConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.evaluation.compare import EvalOptions, preference
from gdmd.evaluation.health import health_panels
from gdmd.evaluation.validation import Validation
from gdmd.methods.sizes import drawn_size
from gdmd.models.loading import open_family
from gdmd.plan.cost_model import gpu_of
from gdmd.plan.estimate import plan
from gdmd.plan.text import described
from gdmd.programs.export import export_run
from gdmd.programs.latents import compute_latents
from gdmd.programs.train import TrainSettings, create_run
from gdmd.recipes.build import Components, build
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import Run, create, open_run, read_metrics
from gdmd.runs.validation_scores import labels, sizes_of
from gdmd.sources.draw import draw
from gdmd.training.distributed import SINGLE_PROCESS, DistributedContext
from gdmd.training.loop import train
from gdmd.training.progress import validation_line
from gdmd.types import PromptBatch

SIZES = ((32, 32), (32, 64), (64, 32))
QUIET = Console(file=io.StringIO())
SEED = 4
"""Of which the first steps draw sizes 0, 1, 0, 0, 2, 1."""


def brightness(images: Tensor, prompts: PromptBatch) -> Tensor:
    """A reward of images of any size."""
    return images[:, 0].mean((1, 2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pipelines")
    (place / "prompts.txt").write_text("\n".join(tiny.WORDS))
    return place


def recipe(folders: Path, name: str, steps: int, method: Any = None, **model: Any) -> RunConfig:
    return RunConfig(
        name="tiny",
        model=tiny.config(tiny.saved(folders, name), **({"sizes": SIZES} | model)),
        method=method or DMDConfig(fake_updates=1, guidance=3.0, step_draw="batch"),
        loop=LoopConfig(
            steps=steps,
            batch_size=2,
            lr_student=1e-2,
            lr_fake=1e-2,
            log_every=1,
            checkpoint_every=1,
            threads=1,
            ema=0.9,
            seed=SEED,
        ),
        prompts={"file": str(folders / "prompts.txt")},
        rewards=[{"kind": "callable", "target": "test_sizes:brightness"}],
        validation={"every": 0},
        eval={"teacher_steps": 2},
    )


def trained(cfg: RunConfig, run: Run, context: DistributedContext = SINGLE_PROCESS) -> Components:
    components = build(cfg, "cpu")
    train(components.method, components.roles, components.stream, cfg.loop, run, context=context)
    return components


def new_run(cfg: RunConfig, folder: Path) -> Run:
    return create(folder, cfg.model_dump(mode="json"))


def test_draws_are_uniform_and_follow_seed_and_step() -> None:
    drawn = [drawn_size(SEED, step, 3) for step in range(3000)]
    assert all(abs(drawn.count(size) - 1000) < 100 for size in range(3))  # 4 standard deviations
    assert drawn[:20] == [drawn_size(SEED, step, 3) for step in range(20)]
    assert drawn[:20] != [drawn_size(SEED + 1, step, 3) for step in range(20)]


@pytest.mark.parametrize(
    ("name", "method"),
    [("flux2_klein", GDMDConfig(group_size=2, guidance=3.0)), ("sdxl", DMDConfig(fake_updates=1, guidance=3.0))],
)
def test_every_tensor_of_an_iteration_has_its_size(folders: Path, name: str, method: Any) -> None:
    """Latents, student steps and micro-conditioning: as a run of this size alone has them at this step."""
    components = build(recipe(folders, name, 1, method), "cpu")
    drawn = [drawn_size(SEED, step, len(SIZES)) for step in range(6)]
    assert set(drawn) == {0, 1, 2}
    for step in (drawn.index(k) for k in range(3)):
        height, width = SIZES[drawn[step]]
        alone = build(recipe(folders, name, 1, method, sizes=(), height=height, width=width), "cpu")
        for one, other in zip(*(losses(own, step) for own in (components, alone)), strict=True):
            assert one.shape[-2:] == other.shape[-2:] == alone.latent_shape[1:]
            assert torch.equal(one, other)


def losses(components: Components, step: int) -> list[Tensor]:
    """x_tau, x0 or x_t of each update of an iteration, which is not applied."""
    prompts = components.stream.at(step)
    made = components.method.iteration(step, prompts, SampleRng(SEED, step, prompts.index, prompts.host))
    return [value for update in made for value in vars(update.batch).values() if getattr(value, "ndim", 0) == 4]


def test_resume_is_bit_exact(folders: Path, tmp_path: Path) -> None:
    """The kept pairs of noise and ODE sample have the sizes of the steps in which they were made."""
    own = {
        "regression_weight": 0.25,
        "regression_steps": 2,
        "regression_batches": 2,
        "fake_updates": 1,
        "guidance": 3.0,
    }
    cfg = recipe(folders, "qwen_image", 4, DMDConfig(**own))
    whole = trained(cfg, new_run(cfg, tmp_path / "whole"))
    half = cfg.model_copy(update={"loop": cfg.loop.model_copy(update={"steps": 2})})
    run = new_run(cfg, tmp_path / "halves")
    trained(half, run)
    halves = trained(cfg, run)
    for role in ("student", "fake"):
        wanted, found = (own.roles.parameters(role) for own in (whole, halves))
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    kept = {tuple(value.shape[-2:]) for key, value in whole.method.state().items() if key.endswith("noise")}
    assert len(kept) == 2 == len({drawn_size(SEED, step, 3) for step in range(2)})


def test_two_ranks_are_one_process(folders: Path, tmp_path: Path) -> None:
    cfg = recipe(folders, "flux2_klein", 3)

    def work(context: DistributedContext) -> None:
        with linear_steps():
            context.on_main(lambda: str(new_run(cfg, tmp_path / "two").path))
            trained(cfg, open_run(tmp_path / "two"), context)

    assert [ended.code for ended in run_ranks(work, tmp_path)] == [0, 0]
    with linear_steps():
        trained(cfg, new_run(cfg, tmp_path / "one"))
    one, two = (checkpoint.load_newest(tmp_path / place / "checkpoints") for place in ("one", "two"))
    assert one is not None and two is not None
    start = {key: value.detach() for key, value in build(cfg, "cpu").roles.parameters("student").items()}
    assert apart(one.part("student"), two.part("student"), start) < 1e-3


@pytest.mark.parametrize("name", ["sdxl", "z_image"])
def test_gan_reads_real_latents_of_the_same_size(folders: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "images").mkdir()
    for number, text in enumerate(tiny.WORDS[:3]):
        Image.effect_noise((70, 75), 90 + number).convert("RGB").save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text(text)
    method = DMD2Config(fake_updates=1, guidance=3.0, gan_weight=1.0, head_weight=1.0)
    tree = recipe(folders, name, 4, method).model_dump(mode="json")
    real = {"source": [str(tmp_path / "images")], "latents": str(tmp_path / "latents")}
    cfg = RunConfig.model_validate(tree | {"real_data": real, "prompts": {}, "rewards": []})
    with pytest.raises(ValueError, match="run `gdmd latents` with this recipe"):
        build(cfg, "cpu")
    counts = compute_latents(cfg, QUIET, "cpu")["sizes"]
    assert [(row["height"], row["width"], row["encoded"]) for row in counts] == [(*size, 3) for size in SIZES]
    components = trained(cfg, new_run(cfg, tmp_path / "run"))
    assert set(losses(components, 1)[0].shape[-2:]) == {16, 32}
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 4 and all(0 < row["gan/real"] < 1 for row in rows)


def test_validation_samples_and_card_have_every_size(folders: Path, tmp_path: Path) -> None:
    cfg, run = recipe(folders, "flux2_klein", 1, GDMDConfig(group_size=1, guidance=3.0)), tmp_path / "run"
    checks = {"every": 1, "prompts": tiny.WORDS[:2], "images": 2}
    cfg = RunConfig.model_validate(cfg.model_dump(mode="json") | {"validation": checks})
    create_run(cfg, run, ["gdmd", "train"], TrainSettings(QUIET, evaluation=False))
    assert [0 < row["validation/test_sizes:brightness"] < 1 for row in read_metrics(run)] == [True, True]
    check_scores_of_each_size(folders, read_metrics(run), checks, tmp_path)
    grid = Image.open(run / "grids" / "step_000001.png")
    assert grid.height > 2 * (32 + 32 + 64) and grid.width > 4 * 64  # a row per prompt and size: two and two images
    card = export_run(run)[-1].read_text()
    assert all(f"| test_sizes:brightness{size} | 0." in card for size in ("", "/32x32", "/32x64", "/64x32"))
    assert card.count("| trained on |") == 4
    assert "| image sizes (height x width) | 32 x 32, 32 x 64, 64 x 32 |" in card and "height=32, width=32" in card
    options = EvalOptions(str(folders / "prompts.txt"), images=1, scorers=("test_sizes:brightness",), device="cpu")
    for given, shown in ((",height=64", False), ("", True)):  # the card says height=32
        shutil.rmtree(run / "preference", ignore_errors=True)
        preference(read_source(f"{run}{given}"), options, run / "preference", print)
        assert ("1 images each" in export_run(run)[-1].read_text()) is shown
    for given, size in (("", (32, 32)), (",height=64", (32, 64)), (",width=64", (64, 32))):
        draw(read_source(f"{run}{given}"), ["two red dogs"], 1, 0, tmp_path / "a.png", 1)
        assert all(whole > side for whole, side in zip(Image.open(tmp_path / "a.png").size, size, strict=True))
    with pytest.raises(ValueError, match="trained at height=32,width=32, height=32,width=64, .*; give one of them"):
        draw(read_source(f"{run},height=64,width=64"), ["two red dogs"], 1, 0, tmp_path / "a.png", 1)


def check_scores_of_each_size(folders: Path, rows: list[Any], checks: dict[str, Any], place: Path) -> None:
    """Those of student and teacher before the first update, as a run of this size alone has them; and their means."""
    label, own = "validation/test_sizes:brightness", {}
    for height, width in SIZES:
        cfg = recipe(
            folders, "flux2_klein", 1, GDMDConfig(group_size=1, guidance=3.0), sizes=(), height=height, width=width
        )
        cfg = RunConfig.model_validate(cfg.model_dump(mode="json") | {"validation": checks})
        alone = Validation(cfg, build(cfg, "cpu"))(0, place / "step_000000.png")
        for key, value in alone.items():
            own[f"{key}/{height}x{width}"] = value
    assert len(own) == 6 and len(set(own.values())) == 6
    assert {key: rows[0][key] for key in own} == pytest.approx(own, abs=1e-6)
    for row in rows:
        each = [row[f"{label}/{height}x{width}"] for height, width in SIZES]
        assert row[label] == pytest.approx(sum(each) / 3, abs=1e-6)
    assert labels(rows) == ["test_sizes:brightness"] and sizes_of(rows, "test_sizes:brightness") == [
        "32x32",
        "32x64",
        "64x32",
    ]
    panel = health_panels(rows, ["test_sizes:brightness"])[0]
    assert all(f"test_sizes:brightness (trained){size}<" in panel.svg for size in ("", ", 32x32", ", 32x64", ", 64x32"))
    assert "brightness 0." in validation_line(1, rows[1]) and "32x64" not in validation_line(1, rows[1])


def test_best_metric_of_one_size(folders: Path) -> None:
    known = metric_keys(recipe(folders, "flux2_klein", 1, GDMDConfig(group_size=1), sizes=SIZES))
    assert not any(key.startswith("validation/") for key in known)  # validation.every = 0
    tree = recipe(folders, "flux2_klein", 1, GDMDConfig(group_size=1)).model_dump(mode="json")
    known = metric_keys(RunConfig.model_validate(tree | {"validation": {"every": 1}}))
    assert {"validation/test_sizes:brightness", "validation/test_sizes:brightness/64x32"} < set(known)


def test_plan_counts_the_largest_size(folders: Path) -> None:
    card = gpu_of("rtx4090")
    several, largest, small = (
        plan(recipe(folders, "sd3", 1, sizes=sizes, height=height), card, 0.4)
        for sizes, height in ((SIZES, 32), ((), 64), ((), 32))
    )
    assert several.total >= plan(recipe(folders, "sd3", 1, sizes=(), width=64), card, 0.4).total
    assert several.seconds == largest.seconds > small.seconds
    assert "the largest of 3 sizes, 32 x 64, batch 2" in described(several, [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sizes": [[64, 64]]}, "sizes is for several image sizes, got only 64 x 64; set height and width"),
        ({"sizes": [[32, 32], [32, 32]]}, "may list each size once"),
        ({"sizes": [[64, 32], [32, 64]]}, "must contain height x width = 32 x 32.*set height=64 and width=32"),
        ({"sizes": [[32, 32], [30, 32]]}, "multiple of 8"),
    ],
)
def test_wrong_sizes_are_refused(folders: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.config(folders, **given)


def test_all_sizes_that_do_not_fit_are_named(folders: Path) -> None:
    recipe(folders, "sd3", 1)
    sizes = ((72, 72), (32, 32), (32, 80))
    with pytest.raises(ValueError, match="network has positions") as caught:
        open_family(tiny.config(folders / "sd3", height=72, width=72, sizes=sizes))
    found = [line.partition(": the network has positions for 64")[0] for line in str(caught.value).splitlines()]
    assert found == ["model.height = 72", "model.width = 72", "model.sizes has 32 x 80, and model.width = 80"]
    assert json.loads(tiny.config(folders / "sd3", sizes=SIZES).model_dump_json())["sizes"] == [list(s) for s in SIZES]
