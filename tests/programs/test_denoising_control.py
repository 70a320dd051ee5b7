"""benchmarks/denoising.py at a tiny budget: the control of a turbo model's alignment, and a style LoRA that is distilled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from cli_world import run_gdmd

from benchmarks import denoising
from gdmd.diffusion.rng import SampleRng
from gdmd.losses.denoising import mean_square
from gdmd.recipes.build import build
from gdmd.recipes.read import read_recipe
from gdmd.runs import checkpoint
from gdmd.shapes.check import shapeseval
from gdmd.shapes.grammar import TASKS, catalog, fixed_rows
from gdmd.shapes.render import draw_scenes, render

SMALL = (
    "loop.batch_size=8",
    "model.lora_rank=4",
    "model.lora_alpha=4",
    "loop.warmup=0",
    "loop.ema=0",
    "loop.threads=1",
)
SMALL += ("validation.every=0", "loop.lr_schedule=constant", "eval.per_task=4", "eval.teacher_steps=4")


@pytest.mark.parametrize("name", ["flux2_klein", "sdxl"])
def test_loss_is_the_native_denoising_loss(name: str) -> None:
    components = build(read_recipe(f"shapes_{name}", SMALL), "cpu")
    control = denoising.Denoising(components)
    prompts = components.stream.at(0)
    (update,) = control.iteration(0, prompts, SampleRng(0, 0, prompts.index))
    batch, roles = update.batch, components.roles
    with torch.no_grad():
        found = roles.student(batch.x_t, batch.t, batch.cond)
    error = found.velocity - (batch.eps - batch.x0) if name == "flux2_klein" else found.eps - batch.eps
    torch.testing.assert_close(update.loss(batch).per_sample, mean_square(error))
    images = components.codec.decode(batch.x0).clamp(0, 1)
    rows = torch.tensor([catalog().row(text) for text in prompts.text])
    assert shapeseval(images, rows).float().mean() > 0.8 and update.role == "student"  # real images of their captions
    (other,) = denoising.Denoising(components, monochrome=True).iteration(0, prompts, SampleRng(0, 0, prompts.index))
    styled = components.codec.decode(other.batch.x0).clamp(0, 1)
    assert denoising.is_monochrome(styled).all() and denoising.is_monochrome(images).float().mean() < 0.5


def test_the_style_is_detectable() -> None:
    """Real renders have colors, but for the white objects among them; without colors their shapes are still read."""
    rows = fixed_rows("eval", 20)
    real = render(draw_scenes(rows, torch.Generator().manual_seed(0)))
    plain = real.amax(1, keepdim=True).expand_as(real)
    share = lambda images: denoising.is_monochrome(images).float().mean()  # noqa: E731
    assert share(real) < 0.1 and share(plain) == 1
    colorless = torch.isin(catalog().task[rows], torch.tensor([TASKS.index(name) for name in denoising.COLORLESS]))
    assert (
        shapeseval(plain, rows)[colorless].float().mean()
        > 0.95
        > 0.2
        > shapeseval(plain, rows)[~colorless].float().mean()
    )


def test_fine_tuned_turbo_model_and_a_style(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The control is an ordinary run; a LoRA of 40 updates, under which most images have no colors, reaches the teacher."""
    control, lora, styled = (tmp_path / name for name in ("control", "style", "styled"))
    words = ["shapes_sdxl", *SMALL, "model.student=shapes:sdxl", "loop.steps=2"]
    assert denoising.main(["train", *words, "--run", str(control)]) == 0
    saved: Any = checkpoint.load_newest(control / "checkpoints")
    assert any(bool(w.any()) for name, w in saved.part("student").items() if "lora_B" in name)
    assert not any(bool(w.any()) for name, w in saved.part("fake").items() if "lora_B" in name)
    run_gdmd("eval", "run", control, "--images", 1, "--json")
    assert json.loads(capsys.readouterr().out)["images"] == 24

    words = ["shapes_sdxl", *SMALL, "loop.steps=40", "loop.lr_student=3.0e-3", "loop.batch_size=16"]
    assert denoising.main(["train", *words, "--monochrome", "--run", str(lora)]) == 0
    run_gdmd("export", lora)
    options = (f"model.teacher_loras=[{lora / 'export'}]", "method.gamma=0", "loop.steps=1")
    run_gdmd("train", "shapes_sdxl", *SMALL, *options, "--run", styled, "--no-eval")
    capsys.readouterr()
    assert denoising.main(["style", str(styled)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["teacher"]["monochrome"] > 0.4 and found["student"]["monochrome"] > 0.4
    assert denoising.style(control)["teacher"]["monochrome"] < 0.2
