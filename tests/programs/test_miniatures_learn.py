"""A short training run from each shipped miniature learns; half a minute each on one core."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from gdmd.diffusion.generate import Sampler, images_of
from gdmd.recipes.build import build
from gdmd.recipes.open_run import student_row, teacher_row
from gdmd.recipes.read import read_recipe
from gdmd.runs.run_folder import create
from gdmd.shapes.check import shapeseval, summarize
from gdmd.shapes.grammar import catalog, fixed_rows
from gdmd.training.loop import train

SETTINGS = (
    # all that matters is set here: tuning the recipes must not move this test
    "method={kind: gdmd_tilted, group_size: 1, continuations: 2, guidance: 5.0, normalize: false}",
    "model.lora_rank=32",
    "model.lora_alpha=32",
    "loop.steps=60",
    "loop.batch_size=16",
    "loop.lr_student=1.0e-3",
    "loop.lr_fake=3.0e-3",
    "loop.warmup=5",
    "loop.lr_schedule=cosine",
    "loop.ema=0.0",
    "validation.every=0",
    "loop.threads=1",
)
PER_TASK, IMAGES = 20, 2  # captions of each of six tasks, and images of each: 240


def gain(name: str, seed: int, run: Path, *more: str) -> float:
    """ShapesEval of a new student minus that of the teacher's 4 plain steps, which cost the same, from the same noise."""
    cfg = read_recipe(name, [*SETTINGS, f"loop.seed={seed}", *more])
    components = build(cfg, "cpu")
    rows = fixed_rows("eval", PER_TASK).repeat_interleave(IMAGES)
    texts = catalog().texts(rows)

    def overall(sampler: Sampler) -> float:
        images = images_of(sampler, components, texts, seed=0)
        return summarize(shapeseval(images, rows), catalog().task[rows])["overall"]

    before = overall(teacher_row(cfg, components, "teacher-4-plain"))
    train(components.method, components.roles, components.stream, cfg.loop, create(run, cfg.model_dump(mode="json")))
    return overall(student_row(cfg, components)) - before


@pytest.mark.parametrize("name", ["shapes_sd3", "shapes_sdxl", "shapes_flux2_klein"])
def test_short_run_learns(name: str, tmp_path: Path) -> None:
    """Less than half of what was measured: SD3 +0.222 and +0.205 (seeds 1 and 2), SDXL +0.172 (seed 1).

    With adapters on the attention layers only: SD3 +0.110, SDXL +0.127 and +0.107.
    """
    assert gain(name, 1, tmp_path / "run") >= 0.08
