"""``gdmd eval table``: the eight scores that papers on few-step models report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gdmd.cli.common import Device, ImagesPerPrompt, Json, NoiseSeed, log, print_json


def table_command(
    what: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="[NAME=]WHERE[,key=value ...], one or more.")],
    folder: Annotated[Path, typer.Option("--out", "-o", help="Images, scores, table.md and table.json.")],
    prompts: Annotated[
        str | None, typer.Option(help="Prompts of ImageReward, CLIP, Aesthetic, PickScore, HPSv2.1 and HPSv3.")
    ] = None,
    geneval2: Annotated[
        str | None, typer.Option(help="Prompts of GenEval2: geneval2_data.jsonl, or others with its vqa_list.")
    ] = None,
    ocr: Annotated[
        str | None, typer.Option(help="Prompts of OCR that quote a text; text_rendering: the shipped set.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Kinds, such as clip,hpsv3; default: all of the given prompt files.")
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option("--scorer", help="Settings of a column: KIND,key=value ...; may be repeated."),
    ] = None,
    images: ImagesPerPrompt = 1,
    seed: NoiseSeed = 777,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts of each file.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure the scores of few-step papers: ImageReward, CLIP, Aesthetic, PickScore, HPSv2.1, HPSv3, GenEval2, OCR.

    All models start from the same noise. Scores that a model was trained on are marked; the others are held out.

    \b
    Examples:
      gdmd eval table ours=runs/sd3-seed0/export teacher=org/sd3,steps=28 \\
        -o eval/table --prompts drawbench.txt --geneval2 geneval2_data.jsonl \\
        --ocr text_rendering
      gdmd eval table runs/sd3-seed0 -o eval/table --prompts drawbench.txt \\
        --columns clip,hpsv3 --scorer hpsv3,offload=true
    """
    from gdmd.config.image_source import read_sources
    from gdmd.sources.open import require_one_world

    sources = read_sources(what)
    require_one_world(sources)
    from gdmd.evaluation.field_table import TableOptions, markdown, table

    files = {"prompts": prompts, "geneval2": geneval2, "ocr": ocr}
    given = {name: file for name, file in files.items() if file is not None}
    kinds = tuple(one.strip() for one in columns.split(",")) if columns is not None else ()
    options = TableOptions(given, kinds, tuple(scorer or ()), images, seed, limit, device)
    content = table(sources, options, folder, log)
    print_json(content) if json else print(markdown(content), end="")
