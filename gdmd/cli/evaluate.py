"""``gdmd eval``, ``gdmd sample`` and ``gdmd report``: what is done with a finished (or running) run."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gdmd.cli.common import Json, Which, messages, print_json

What = Annotated[
    str,
    typer.Argument(
        metavar="RUN|teacher|teacher-4|teacher-4-plain", help="A run folder (its EMA student), or a row of the teacher."
    ),
]


class Split(StrEnum):
    """The prompt sets that are evaluated."""

    eval = "eval"
    dev = "dev"


def eval_command(
    what: What,
    json: Json = False,
    split: Annotated[Split, typer.Option(help="eval: the fixed set; dev: for choosing settings.")] = Split.eval,
    per_task: Annotated[int | None, typer.Option(min=1, help="Prompts per task; default: the recipe's.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Images per prompt; default: the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the noise; default: the recipe's.")] = None,
    which: Which = "last",
) -> None:
    """Measure a Shapes student or the teacher: ShapesEval by task, rewards, fidelity, coverage, speed.

    Runs of real models: gdmd eval preference RUN --prompts FILE.

    \b
    Examples:
      gdmd eval runs/shapes-seed0
      gdmd eval teacher --json                  the teacher with guidance, 50 steps = 100 network calls
      gdmd eval teacher-4 --per-task 10         the same in 4 steps
      gdmd eval teacher-4-plain                 4 steps without guidance: 4 network calls, as a student
      gdmd eval runs/shapes-seed0 --split dev --images 2 --seed 1
      gdmd eval runs/shapes-seed0 --checkpoint best         by loop.best_metric; also a step
    """
    from gdmd.recipes.run_folders import check_target

    check_target(what, which)
    from gdmd.evaluation.runs import measure_named

    console = messages()
    console.print(f"evaluating {what} on the {split.value} prompts", markup=False, highlight=False)
    name, row, cfg = measure_named(what, split.value, {"per_task": per_task, "images": images, "seed": seed}, which)
    if json:
        print_json(row)
        return
    from gdmd.config.describe import trained_rewards
    from gdmd.evaluation.table import print_table
    from gdmd.recipes.run_folders import TEACHERS

    print_table({name: row}, () if what in TEACHERS else trained_rewards(cfg))


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A run, an exported folder, a diffusers pipeline (folder or hub id) with ,key=value settings, or teacher.",
    ),
]


def sample_command(
    what: Source,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="A caption; give it again for more rows.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=4096, help="Images per caption.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    png: Annotated[Path, typer.Option("--out", "-o", help="The .png to write.")] = Path("samples.png"),
    scale: Annotated[
        int | None,
        typer.Option(
            min=1, max=32, help="Pixels of the file per pixel of an image; default: 4 up to 64 pixels, else 1."
        ),
    ] = None,
    which: Which = "last",
) -> None:
    """Draw images from captions, one row of a PNG for each.

    \b
    Examples:
      gdmd sample runs/shapes-seed0 --prompt "a red circle and a blue ring"
      gdmd sample runs/shapes-seed0 -p "three squares" -p "a ring above a cross" -n 6 --seed 1 -o rows.png
      gdmd sample runs/shapes-seed0 -p "a ring" --checkpoint best
      gdmd sample teacher -p "a green diamond"
      gdmd sample runs/sdxl-seed0/export -p "two red apples on a table" -n 4
      gdmd sample models/sdxl,lora=lcm-lora.safetensors,scheduler=lcm,steps=4,guidance=0 -p "two red apples"
    """
    from gdmd.config.image_source import read_source
    from gdmd.recipes.run_folders import check_png
    from gdmd.sources.open import kind_of

    source = read_source(what)
    source = source if which == "last" else source.changed({"checkpoint": which})
    kind_of(source)
    check_png(png)
    from gdmd.sources.draw import draw

    seconds = draw(source, prompt, count, seed, png, scale)
    messages().print(
        f"{len(prompt) * count} images in {seconds:.2f} s -> {png}", markup=False, highlight=False, soft_wrap=True
    )


def report_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    fresh: Annotated[bool, typer.Option("--fresh", help="Shapes: evaluate again even if a result is stored.")] = False,
) -> None:
    """Write report.html of a run: settings, curves, health monitor and sample grids in one file.

    A Shapes run is measured where rows are missing: ShapesEval, rewards, speed. A real model is not loaded; the page
    shows the results of gdmd eval preference and compare that lie below the run folder.

    \b
    Examples:
      gdmd report runs/shapes-seed0
      gdmd report runs/shapes-seed0 --fresh
      gdmd report runs/sdxl-seed0
    """
    from gdmd.recipes.run_folders import config_of

    cfg = config_of(run)
    from gdmd.evaluation.runs import report_of

    path = report_of(cfg, run, fresh=fresh)
    messages().print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)
