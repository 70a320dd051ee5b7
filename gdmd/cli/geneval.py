"""``gdmd eval``: a run by default, preference and compare, and ``gdmd eval geneval prompts|generate|score``."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gdmd import __version__
from gdmd.cli import evaluate as results
from gdmd.cli import preference as models
from gdmd.cli.common import Json, messages, print_json

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class EvalGroup(TyperGroup):
    """``gdmd eval RUN ...`` means ``gdmd eval run RUN ...``, also for a folder named "run"; other sub-commands are words."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spelled_out = args[:1] == ["run"] and len(args) > 1 and not args[1].startswith("-")
        if not spelled_out and (not args or args[0] not in (self.commands.keys() - {"run"}) | {"-h", "--help"}):
            args = ["run", *args]
        return super().parse_args(ctx, args)


_HELP = """Measure a student or the teacher on ShapesEval (gdmd eval RUN), models by their scores, or on GenEval.

\b
Examples:
  gdmd eval runs/shapes-seed0 --json              options: gdmd eval run --help
  gdmd eval teacher-4 --per-task 10
  gdmd eval preference runs/sdxl-seed0 --prompts parti.txt --scorer clip --scorer hps
  gdmd eval compare teacher dmd=runs/dmd-seed0 gdmd=runs/shapes-seed0 -o eval/shapes
  gdmd eval geneval score images/ours --device cuda
"""
eval_app = typer.Typer(cls=EvalGroup, help=_HELP, context_settings=_SETTINGS)
eval_app.command("run")(results.eval_command)
eval_app.command("preference")(models.preference_command)
eval_app.command("compare")(models.compare_command)
geneval_app = typer.Typer(
    no_args_is_help=True,
    help="GenEval (arXiv 2310.11513) without mmdet: prompts, generate, score.",
    context_settings=_SETTINGS,
)
eval_app.add_typer(geneval_app, name="geneval")


class Dtype(StrEnum):
    """Precision of a pipeline."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@geneval_app.command("prompts")
def prompts_command(
    path: Annotated[Path, typer.Option("--out", "-o", help="The .jsonl to write, in the official format.")],
    per_task: Annotated[int, typer.Option(min=1, help="Prompts per task; single_object has 80.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed.")] = 0,
    without: Annotated[Path | None, typer.Option(help="Metadata whose prompts are left out.")] = None,
) -> None:
    """Draw prompts of GenEval's six kinds, other than the official ones with --without.

    \b
    Examples:
      gdmd eval geneval prompts -o train.jsonl --per-task 200 --without evaluation_metadata.jsonl
    """
    from gdmd.evaluation.geneval import write_prompts

    _say(f"{write_prompts(path, per_task, seed, without)} prompts -> {path}")


@geneval_app.command("generate")
def generate_command(
    what: Annotated[str, typer.Argument(metavar="SOURCE", help="[NAME=]WHERE[,key=value ...]: see gdmd sample.")],
    folder: Annotated[Path, typer.Option("--out", "-o", help="The image folder, in the official layout.")],
    metadata: Annotated[Path, typer.Option(help="evaluation_metadata.jsonl of GenEval, or of `prompts`.")],
    images: Annotated[int, typer.Option("--images", "-n", min=1, help="Images per prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of a pipeline; default: its own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance of a pipeline; default: its own.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per call.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Device of a pipeline; default: the GPU where there is one.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Precision of a pipeline; default: bf16.")] = None,
) -> None:
    """Make the images of every prompt; started again, it goes on where it stopped.

    \b
    Examples:
      gdmd eval geneval generate runs/sdxl-seed0 --metadata evaluation_metadata.jsonl -o images/ours
      gdmd eval geneval generate org/model,lora=org/lcm-lora,scheduler=lcm --steps 4 --metadata m.jsonl -o images/lcm
      gdmd eval geneval generate org/model --metadata m.jsonl -o images/teacher --steps 50 --guidance 7 --device cuda
    """
    from gdmd.config.image_source import read_source
    from gdmd.evaluation.geneval_scores import read_metadata
    from gdmd.sources.open import kind_of, open_source

    options = {"steps": steps, "guidance": guidance, "batch": batch, "device": device, "dtype": dtype and dtype.value}
    source = read_source(what).changed({key: value for key, value in options.items() if value is not None})
    tasks = read_metadata(metadata)
    kind_of(source)
    from gdmd.evaluation.geneval import generate_from

    made = generate_from(open_source(source), tasks, folder, images, seed)
    _say(f"{made} images made -> {folder}")


@geneval_app.command("score")
def score_command(
    source: Annotated[Path, typer.Argument(metavar="FOLDER|DETECTIONS", help="Images, or a detections.jsonl.")],
    metadata: Annotated[Path | None, typer.Option(help="The prompts of a detections.jsonl, in their order.")] = None,
    detector: Annotated[str | None, typer.Option(help="Folder or hub id of a COCO Mask2Former (instance).")] = None,
    clip: Annotated[str | None, typer.Option(help="Folder or hub id of CLIP ViT-L/14.")] = None,
    device: Annotated[str, typer.Option(help="Where detector and classifier run.")] = "cpu",
    json: Json = False,
) -> None:
    """Score images in the official layout, whoever made them, or recorded detections.

    \b
    Writes detections.jsonl, results.jsonl and geneval.json into the folder; started again, it goes on.
    Examples:
      gdmd eval geneval score images/ours --device cuda
      gdmd eval geneval score images/ours/detections.jsonl --metadata evaluation_metadata.jsonl --json
    """
    scores = _scores(source, metadata, detector, clip, device)
    if json:
        print_json({name: asdict(score) for name, score in scores.items()})
        return
    from gdmd.evaluation.geneval import LABEL

    print(LABEL)
    for name, score in scores.items():
        print(f"{name:14} {score.value:.4f}  [{score.low:.4f}, {score.high:.4f}]  {score.images} images")


def _scores(source: Path, metadata: Path | None, detector: str | None, clip: str | None, device: str) -> dict[str, Any]:
    from gdmd.evaluation.geneval import score_folder, score_recorded

    if source.is_file():
        if metadata is None:
            raise ValueError(f"{source} is a file of detections; give its prompts with --metadata")
        return dict(score_recorded(source, metadata))
    if not source.is_dir():
        raise ValueError(f"{source} does not exist; give a folder in GenEval's layout or a detections.jsonl")
    from gdmd.recipes.reward_identity import detector_contents
    from gdmd.rewards.base import Placement
    from gdmd.rewards.geneval.colors import ColorClassifier
    from gdmd.rewards.geneval.detector import Detector

    place = Placement(device)
    found = Detector.from_pretrained(detector, placement=place)
    colors, by = ColorClassifier.from_pretrained(clip, placement=place), detector_contents(detector, clip)
    return dict(score_folder(source, found, colors, by=" ".join((__version__, *by))))


def _say(text: str) -> None:
    messages().print(text, markup=False, highlight=False, soft_wrap=True)
