"""``gdmd eval preference`` and ``gdmd eval compare``: models by what they draw, whoever made them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gdmd.cli.common import Json, messages, print_json

if TYPE_CHECKING:
    from gdmd.config.image_source import SourceConfig

Prompts = Annotated[
    str | None,
    typer.Option("--prompts", help="txt, csv, jsonl, ...; default for Shapes sources: their evaluation set."),
]
Column = Annotated[
    str | None, typer.Option("--prompt-column", help="Column with the prompts; default: prompt, else caption or text.")
]
Images = Annotated[int, typer.Option("--images", "-n", min=1, max=4096, help="Images per prompt.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the noise.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")]
PerTask = Annotated[int, typer.Option(min=1, help="Prompts per task of the Shapes evaluation set.")]
Scorer = Annotated[
    list[str] | None,
    typer.Option(
        "--scorer", help="KIND[,key=value ...] or module:function; may be repeated. Default: the run's rewards."
    ),
]
Features = Annotated[
    str | None,
    typer.Option(help="For diversity, FID and MMD: shapes, clip[,path=...] or module:function (PIL -> [N, D])."),
]
Reference = Annotated[Path | None, typer.Option(help="Folder of real images for FID and MMD.")]
Device = Annotated[str | None, typer.Option(help="Of pipelines and scorers; default: the GPU where there is one.")]

OwnFolder = Annotated[Path | None, typer.Option("--out", "-o", help="Images and scores; default: RUN/preference.")]
Shard = Annotated[str | None, typer.Option(metavar="K/N", help="Only make every N-th prompt's images, from the K-th.")]


def preference_command(
    what: Annotated[str, typer.Argument(metavar="SOURCE", help="[NAME=]WHERE[,key=value ...]: see gdmd sample.")],
    folder: OwnFolder = None,
    prompts: Prompts = None,
    images: Images = 4,
    seed: Seed = 777,
    limit: Limit = None,
    per_task: PerTask = 50,
    scorer: Scorer = None,
    features: Features = None,
    reference: Reference = None,
    device: Device = None,
    prompt_column: Column = None,
    shard: Shard = None,
    json: Json = False,
) -> None:
    """Prompts -> images -> scorers -> means with 95 % intervals over prompts. Started again, it goes on.

    \b
    Examples:
      gdmd eval preference runs/sdxl-seed0 --prompts parti.txt --scorer clip --scorer hps --scorer pickscore
      gdmd eval preference org/sdxl,steps=30,guidance=7 -o eval/teacher --prompts parti.txt --scorer imagereward
      gdmd eval preference images/theirs -o eval/theirs --prompts parti.txt --scorer my_rewards:sharpness
      gdmd eval preference runs/sdxl-seed0 --prompts parti.txt --shard 1/8        the second of eight GPUs: images only
      gdmd eval preference runs/shapes-seed0 --per-task 10 --json
    """
    source, where = _one(what, folder)
    part = _shard(shard)
    from gdmd.evaluation.compare import EvalOptions, make_only, preference

    given = (prompts, limit, per_task, images, seed, tuple(scorer or ()), features, reference, device)
    options = EvalOptions(*given, part or (0, 1), column=prompt_column)
    if part:
        _say(f"{make_only(source, options, where, _say)} prompts have their images in {where / 'images'}")
        return
    row = preference(source, options, where, _say)
    _show(row, {source.name: row}, json)


def compare_command(
    what: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="[NAME=]WHERE[,key=value ...], two or more.")],
    folder: Annotated[Path, typer.Option("--out", "-o", help="A folder per source, compare.json and compare.html.")],
    prompts: Prompts = None,
    images: Images = 4,
    seed: Seed = 777,
    limit: Limit = None,
    per_task: PerTask = 50,
    scorer: Scorer = None,
    features: Features = None,
    reference: Reference = None,
    device: Device = None,
    prompt_column: Column = None,
    gallery: Annotated[int, typer.Option(min=1, help="Prompts shown on the page, spread over all.")] = 24,
    json: Json = False,
) -> None:
    """Several models on the same prompts and noise: paired differences, tables, images side by side, speed.

    \b
    Examples:
      gdmd eval compare teacher teacher-4 dmd=runs/dmd-seed0 gdmd=runs/shapes-seed0 -o eval/shapes --per-task 10
      gdmd eval compare ours=runs/sdxl-seed0/export teacher=org/sdxl,steps=30,guidance=7 \\
        lcm=org/sdxl,lora=org/lcm-lora,scheduler=lcm,steps=4,guidance=1 \\
        -o eval/sdxl --prompts parti.txt --scorer clip --scorer hps --scorer pickscore --features clip
    """
    sources = _several(what)
    from gdmd.evaluation.compare import EvalOptions, compare

    given = (prompts, limit, per_task, images, seed, tuple(scorer or ()), features, reference, device)
    content = compare(sources, EvalOptions(*given, gallery=gallery, column=prompt_column), folder, _say)
    _show(content, content["rows"], json)


def _one(what: str, folder: Path | None) -> tuple[SourceConfig, Path]:
    """The source and its folder; refused before torch is loaded."""
    from gdmd.config.image_source import read_source
    from gdmd.sources.open import kind_of

    source = read_source(what)
    if kind_of(source) != "run" and folder is None:
        raise ValueError("--out is missing: only a run has a place of its own for its evaluation")
    return source, folder or Path(source.where) / "preference"


def _several(what: Sequence[str]) -> tuple[SourceConfig, ...]:
    from gdmd.config.image_source import read_sources
    from gdmd.sources.open import kind_of

    sources = read_sources(what)
    if len(sources) < 2:
        raise ValueError(f"a comparison needs two sources or more, got {len(sources)}; gdmd eval preference takes one")
    for source in sources:
        kind_of(source)
    from gdmd.recipes.run_folders import require_one_world

    require_one_world({source.where: kind_of(source) for source in sources})
    return sources


def _show(content: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], json: bool) -> None:
    if json:
        print_json(content)
    else:
        _print(rows)


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--shard {text}: write K/N with K from 0 to N - 1, for example 0/8")
    return int(found[1]), int(found[2])


def _print(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Scores, tasks and the rest, a column per model."""
    from rich.console import Console

    from gdmd.evaluation.model_page import other_lines, score_lines, task_lines
    from gdmd.reporting.tables import Cell, Table

    sections = [
        [[Cell(line.title), *line.cells] for line in lines]
        for lines in (score_lines(rows), task_lines(rows), other_lines(rows))
    ]
    console = Console()
    console.print(Table(["", *rows], sections).rich())
    console.print("[low, high]: 95 % over prompts. † trained on; ? not known; others are unseen.", markup=False)


def _say(text: str) -> None:
    messages().print(text, markup=False, highlight=False, soft_wrap=True)
