"""``gdmd eval`` with its default command ``run``, ``gdmd sample`` and ``gdmd report``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gdmd.cli import geneval, preference, table
from gdmd.cli.common import SETTINGS, Checkpoint, Device, Json, log, print_json


class EvalGroup(TyperGroup):
    """``gdmd eval RUN ...`` means ``gdmd eval run RUN ...``, also for a folder named "run"."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        explicit = args[:1] == ["run"] and len(args) > 1 and not args[1].startswith("-")
        if not explicit and (not args or args[0] not in (self.commands.keys() - {"run"}) | {"-h", "--help"}):
            args = ["run", *args]
        return super().parse_args(ctx, args)


eval_app = typer.Typer(
    cls=EvalGroup,
    help="""Measure a run with ShapesEval (gdmd eval RUN), or any models with reward scores or GenEval.

\b
Examples:
  gdmd eval runs/shapes-seed0 --json        options: gdmd eval run --help
  gdmd eval teacher-4 --per-task 10
  gdmd eval preference runs/sdxl-seed0 --prompts parti.txt --scorer clip
  gdmd eval compare teacher dmd=runs/dmd gdmd=runs/shapes-seed0 -o eval/shapes
  gdmd eval table runs/sd3-seed0 --prompts drawbench.txt -o eval/table
  gdmd eval geneval score images/ours --device cuda
""",
    context_settings=SETTINGS,
)


class Split(StrEnum):
    """The prompt sets that are evaluated."""

    eval = "eval"
    dev = "dev"


@eval_app.command("run", short_help="Measure a Shapes student or the teacher (the default).")
def eval_command(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RUN|teacher|teacher-4|teacher-4-plain", help="A run folder (its EMA student), or a teacher."
        ),
    ],
    json: Json = False,
    split: Annotated[Split, typer.Option(help="eval: the fixed set; dev: for choosing settings.")] = Split.eval,
    per_task: Annotated[int | None, typer.Option(min=1, help="Prompts per task; default: the recipe's.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Images per prompt; default: the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the noise; default: the recipe's.")] = None,
    which: Checkpoint = "last",
    device: Device = None,
) -> None:
    """Measure a Shapes student or the teacher: ShapesEval by task, rewards, fidelity, coverage, speed.

    Runs of diffusers pipelines that were trained on Shapes captions (gdmd pretrain pipeline) work, too. For other
    pipelines use gdmd eval preference RUN --prompts FILE.

    \b
    Examples:
      gdmd eval runs/shapes-seed0
      gdmd eval teacher --json              50 steps with guidance: 100 NFE
      gdmd eval teacher-4 --per-task 10     4 steps with guidance: 8 NFE
      gdmd eval teacher-4-plain             4 steps without: 4 NFE, like a student
      gdmd eval runs/shapes-seed0 --split dev --images 2 --seed 1
      gdmd eval runs/shapes-seed0 --checkpoint best
    """
    from gdmd.recipes.run_folders import TEACHERS, check_target

    check_target(what, which)
    from gdmd.evaluation.runs import measure_named

    log(f"evaluating {what} on the {split.value} prompts")
    name, row, cfg = measure_named(
        what, split.value, {"per_task": per_task, "images": images, "seed": seed}, which, device
    )
    if json:
        print_json(row)
        return
    from gdmd.evaluation.table import print_table
    from gdmd.runs.trained_on import trained_on

    print_table({name: row}, () if what in TEACHERS else trained_on(cfg, Path(what)))


eval_app.command("preference", short_help="Score the images of one model.")(preference.preference_command)
eval_app.command("compare", short_help="Compare models on the same prompts and noise.")(preference.compare_command)
eval_app.command("table", short_help="Measure the eight scores of few-step papers.")(table.table_command)
eval_app.add_typer(geneval.geneval_app, name="geneval")


def sample_command(
    what: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A run, an exported folder, a diffusers pipeline (folder or hub id) with ,key=value settings, a folder "
            "of images, or teacher.",
        ),
    ],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="A prompt; may be repeated, one row each.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=4096, help="Images per prompt.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    png: Annotated[Path, typer.Option("--out", "-o", help="The .png to write.")] = Path("samples.png"),
    scale: Annotated[
        int | None,
        typer.Option(
            min=1, max=32, help="Enlarge images by this factor; default: 4 for images up to 64 pixels, else 1."
        ),
    ] = None,
    which: Annotated[
        str | None,
        typer.Option(
            "--checkpoint", metavar="best|last|STEP", help="Which checkpoint of a run; default: last, the newest."
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Generate images from prompts into one PNG, a row per prompt.

    \b
    Examples:
      gdmd sample runs/shapes-seed0 --prompt "a red circle and a blue ring"
      gdmd sample runs/shapes-seed0 -p "three squares" -p "a ring" -o rows.png
      gdmd sample runs/shapes-seed0 -p "a ring" --checkpoint best
      gdmd sample teacher -p "a green diamond"
      gdmd sample runs/sdxl-seed0/export -p "two red apples on a table" -n 4
      gdmd sample org/sdxl,lora=org/lcm,scheduler=lcm,steps=4 -p "two red apples"
    """
    from gdmd.config.image_source import read_source
    from gdmd.recipes.run_folders import check_png
    from gdmd.sources.open import kind_of

    source = read_source(what).with_options({"checkpoint": which, "device": device})
    kind_of(source)
    check_png(png)
    from gdmd.config.describe import counted
    from gdmd.sources.draw import draw

    seconds = draw(source, prompt, count, seed, png, scale)
    log(f"{counted(len(prompt) * count, 'image')} generated in {seconds:.2f} s -> {png}")


def report_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    fresh: Annotated[bool, typer.Option("--fresh", help="Shapes: evaluate again even if a result is stored.")] = False,
    device: Device = None,
) -> None:
    """Write report.html of a run: results, curves, health checks, validation images and settings in one file.

    A run on Shapes captions and its teacher are measured first, if results are missing. Other models are not loaded: the
    page shows the results of gdmd eval preference and compare that are stored in the run folder.

    \b
    Examples:
      gdmd report runs/shapes-seed0
      gdmd report runs/shapes-seed0 --fresh
      gdmd report runs/sdxl-seed0
    """
    from gdmd.recipes.run_folders import config_of

    cfg = config_of(run)
    from gdmd.evaluation.runs import report_of

    log(f"report: {report_of(cfg, run, fresh=fresh, device=device)}")
