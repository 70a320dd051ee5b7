"""``gdmd eval preference`` and ``gdmd eval compare``: any models, by the images they generate."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gdmd.cli.common import Device, ImagesPerPrompt, Json, NoiseSeed, Source, log, print_json

if TYPE_CHECKING:
    from gdmd.config.image_source import SourceConfig

Prompts = Annotated[
    str | None,
    typer.Option("--prompts", help="A txt, csv, jsonl, ... file; default for Shapes: its evaluation set."),
]
Column = Annotated[
    str | None,
    typer.Option("--prompt-column", help="Column with the prompts; default: prompt; in a table, else caption or text."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first prompts of the file.")]
PerTask = Annotated[int | None, typer.Option(min=1, help="Prompts per task of the Shapes evaluation set; default: 50.")]
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
OwnFolder = Annotated[Path | None, typer.Option("--out", "-o", help="Images and scores; default: RUN/preference.")]
Shard = Annotated[
    str | None,
    typer.Option(metavar="K/N", help="Only generate the images of prompts K, K + N, K + 2N, ..., K from 0 to N - 1."),
]


def preference_command(
    what: Source,
    folder: OwnFolder = None,
    prompts: Prompts = None,
    images: ImagesPerPrompt = 4,
    seed: NoiseSeed = 777,
    limit: Limit = None,
    per_task: PerTask = None,
    scorer: Scorer = None,
    features: Features = None,
    reference: Reference = None,
    device: Device = None,
    prompt_column: Column = None,
    shard: Shard = None,
    json: Json = False,
) -> None:
    """Generate images for prompts and score them: means with 95 % intervals over prompts.

    The same command continues after an interruption.

    \b
    Examples:
      gdmd eval preference runs/sdxl-seed0 --prompts parti.txt --scorer clip
      gdmd eval preference org/sdxl,steps=30,guidance=7 -o eval/teacher \\
        --prompts parti.txt --scorer imagereward
      gdmd eval preference images/theirs -o eval/theirs --prompts parti.txt \\
        --scorer my_rewards:sharpness
      gdmd eval preference runs/sdxl-seed0 --prompts parti.txt --shard 1/8
      gdmd eval preference runs/shapes-seed0 --per-task 10 --json
    """
    source, where = _one(what, folder)
    part = _shard(shard)
    from gdmd.evaluation.compare import EvalOptions, generate_shard, preference

    given = (prompts, limit, per_task, images, seed, tuple(scorer or ()), features, reference, device)
    options = EvalOptions(*given, part or (0, 1), column=prompt_column)
    if part:
        count = generate_shard(source, options, where)
        log(f"images of {count} prompts are in {where / 'images'}")
        if json:
            print_json({"prompts": count, "images": str(where / "images")})
        return
    row = preference(source, options, where, log)
    _print(row, {source.name: row}, json)


def compare_command(
    what: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="[NAME=]WHERE[,key=value ...], two or more.")],
    folder: Annotated[Path, typer.Option("--out", "-o", help="A folder per source, compare.json and compare.html.")],
    prompts: Prompts = None,
    images: ImagesPerPrompt = 4,
    seed: NoiseSeed = 777,
    limit: Limit = None,
    per_task: PerTask = None,
    scorer: Scorer = None,
    features: Features = None,
    reference: Reference = None,
    device: Device = None,
    prompt_column: Column = None,
    gallery: Annotated[int, typer.Option(min=1, help="Prompts shown on the page, spread over all.")] = 24,
    json: Json = False,
) -> None:
    """Compare models on the same prompts and noise: paired differences, tables, images side by side, speed.

    \b
    Examples:
      gdmd eval compare teacher teacher-4 dmd=runs/dmd gdmd=runs/shapes-seed0 \\
        -o eval/shapes --per-task 10
      gdmd eval compare ours=runs/sdxl-seed0/export \\
        teacher=org/sdxl,steps=30,guidance=7 \\
        lcm=org/sdxl,lora=org/lcm-lora,scheduler=lcm,steps=4,guidance=1 \\
        -o eval/sdxl --prompts parti.txt --scorer clip --features clip
    """
    sources = _several(what)
    from gdmd.evaluation.compare import EvalOptions, compare

    given = (prompts, limit, per_task, images, seed, tuple(scorer or ()), features, reference, device)
    content = compare(sources, EvalOptions(*given, gallery=gallery, column=prompt_column), folder, log)
    _print(content, content["rows"], json)


def _one(what: str, folder: Path | None) -> tuple[SourceConfig, Path]:
    """The source and its folder, checked before torch is imported."""
    from gdmd.config.image_source import read_source
    from gdmd.sources.open import kind_of

    source = read_source(what)
    if kind_of(source) != "run" and folder is None:
        raise ValueError("--out is missing: only the evaluation of a run has a default folder")
    return source, folder or Path(source.where) / "preference"


def _several(what: Sequence[str]) -> tuple[SourceConfig, ...]:
    from gdmd.config.image_source import read_sources
    from gdmd.sources.open import require_one_world

    sources = read_sources(what)
    if len(sources) < 2:
        raise ValueError(f"a comparison needs two sources or more, got {len(sources)}; gdmd eval preference takes one")
    require_one_world(sources)
    return sources


def _print(content: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], json: bool) -> None:
    """JSON, or a table of scores, tasks and the rest with a column per model."""
    if json:
        print_json(content)
        return
    from rich.console import Console

    from gdmd.evaluation.model_page import other_lines, score_lines, task_lines
    from gdmd.reporting.tables import Cell, Table

    sections = [
        [[Cell(line.title), *line.cells] for line in lines]
        for lines in (score_lines(rows), task_lines(rows), other_lines(rows))
    ]
    console = Console()
    console.print(Table(["", *rows], sections).rich())
    console.print("[low, high]: 95 % over prompts. † trained on; ? unknown; others were not trained on.", markup=False)


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--shard {text}: write K/N with K from 0 to N - 1, for example 0/8")
    return int(found[1]), int(found[2])
