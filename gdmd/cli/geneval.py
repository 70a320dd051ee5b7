"""``gdmd eval geneval``: prompts, generate, score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gdmd._version import __version__
from gdmd.cli.common import SETTINGS, Device, ImagesPerPrompt, Json, NoiseSeed, Source, log, print_json

geneval_app = typer.Typer(
    no_args_is_help=True,
    help="GenEval (arXiv 2310.11513): prompts, generate, score.",
    context_settings=SETTINGS,
)


class Dtype(StrEnum):
    """Precision of a pipeline."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@geneval_app.command("prompts", short_help="Draw new prompts of the six tasks.")
def prompts_command(
    path: Annotated[Path, typer.Option("--out", "-o", help="The .jsonl to write, in the official format.")],
    per_task: Annotated[int, typer.Option(min=1, help="Prompts per task; single_object has 80.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed.")] = 0,
    without: Annotated[Path | None, typer.Option(help="Metadata file whose prompts are excluded.")] = None,
) -> None:
    """Draw new prompts of GenEval's six tasks, for training or for a second test set.

    \b
    Examples:
      gdmd eval geneval prompts -o train.jsonl --without evaluation_metadata.jsonl
    """
    from gdmd.evaluation.geneval import write_prompts

    log(f"{write_prompts(path, per_task, seed, without)} prompts -> {path}")


@geneval_app.command("generate", short_help="Generate the images of every prompt.")
def generate_command(
    what: Source,
    folder: Annotated[Path, typer.Option("--out", "-o", help="The image folder, in the official layout.")],
    metadata: Annotated[Path, typer.Option(help="evaluation_metadata.jsonl of GenEval, or of `prompts`.")],
    images: ImagesPerPrompt = 4,
    seed: NoiseSeed = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of a pipeline; default: its own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance of a pipeline; default: its own.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per call.")] = None,
    device: Device = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Precision of a pipeline; default: bf16.")] = None,
) -> None:
    """Generate the images of every prompt. The same command continues after an interruption.

    \b
    Examples:
      gdmd eval geneval generate runs/sdxl-seed0 --metadata m.jsonl -o images/ours
      gdmd eval geneval generate org/model,lora=org/lcm,scheduler=lcm \\
        --metadata m.jsonl -o images/lcm --steps 4
      gdmd eval geneval generate org/model --metadata m.jsonl -o images/teacher \\
        --steps 50 --guidance 7 --device cuda
    """
    from gdmd.config.image_source import read_source
    from gdmd.evaluation.geneval_scores import read_metadata
    from gdmd.sources.open import kind_of, open_source

    options = {"steps": steps, "guidance": guidance, "batch": batch, "device": device, "dtype": dtype and dtype.value}
    source = read_source(what).with_options(options)
    tasks = read_metadata(metadata)
    kind_of(source)
    from gdmd.evaluation.geneval import generate

    log(f"{generate(open_source(source), tasks, folder, images, seed)} images generated -> {folder}")


@geneval_app.command("score", short_help="Score images or recorded detections.")
def score_command(
    source: Annotated[Path, typer.Argument(metavar="FOLDER|DETECTIONS", help="Images, or a detections.jsonl.")],
    metadata: Annotated[Path | None, typer.Option(help="The prompts of a detections.jsonl, in order.")] = None,
    detector: Annotated[str | None, typer.Option(help="Folder or hub id of a COCO Mask2Former (instance).")] = None,
    clip: Annotated[str | None, typer.Option(help="Folder or hub id of CLIP ViT-L/14.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Score images of any model in the official layout, or recorded detections.

    Writes detections.jsonl, results.jsonl and geneval.json into the folder. The same command continues after an
    interruption.

    \b
    Examples:
      gdmd eval geneval score images/ours --device cuda
      gdmd eval geneval score images/ours/detections.jsonl --metadata m.jsonl
    """
    scores = _scores(source, metadata, detector, clip, device)
    if json:
        print_json({name: asdict(score) for name, score in scores.items()})
        return
    from gdmd.config.describe import counted
    from gdmd.evaluation.geneval import LABEL
    from gdmd.reporting.tables import interval

    print(LABEL)
    for name, score in scores.items():
        shown = f"{counted(score.images, 'image')} of {counted(score.prompts, 'prompt')}"
        print(f"{name:14} {score.value:.4f}  {interval(score.low, score.high, 4):16}  {shown}")
    overall = scores["overall"]
    if overall.images != overall.fewest * overall.prompts:
        log(
            "note: some prompts have fewer images than others and count less; if images are missing, generate them first"
        )


def _scores(
    source: Path, metadata: Path | None, detector: str | None, clip: str | None, device: str | None
) -> dict[str, Any]:
    from gdmd.evaluation.geneval import score_folder, score_recorded
    from gdmd.evaluation.geneval_scores import read_metadata

    if source.is_file():
        _refuse({"--detector": detector, "--clip": clip, "--device": device}, f"{source} holds what was detected")
        if metadata is None:
            raise ValueError(f"{source} is a file of detections; give its prompts with --metadata")
        scores = score_recorded(source, metadata)
        if (found := scores["overall"].prompts) < (count := len(read_metadata(metadata))):
            log(
                f"note: {source} holds detections for {found} of the {count} prompts of {metadata}; only these are scored"
            )
        return dict(scores)
    if not source.is_dir():
        raise ValueError(f"{source} does not exist; give a folder in GenEval's layout or a detections.jsonl")
    _refuse({"--metadata": metadata}, f"{source} holds the metadata of its prompts")
    from gdmd.diffusion.device import pick_device
    from gdmd.recipes.reward_identity import detector_contents
    from gdmd.rewards.base import Placement
    from gdmd.rewards.geneval.colors import ColorClassifier
    from gdmd.rewards.geneval.detector import Detector

    placement = Placement(pick_device(device))
    found = Detector.from_pretrained(detector, placement=placement)
    colors, by = ColorClassifier.from_pretrained(clip, placement=placement), detector_contents(detector, clip)
    return dict(score_folder(source, found, colors, by=" ".join((__version__, *by))))


def _refuse(options: Mapping[str, object], why: str) -> None:
    """ValueError for options that are given although they change nothing."""
    if given := [name for name, value in options.items() if value is not None]:
        raise ValueError(f"{', '.join(given)}: without effect, because {why}; leave that out")
