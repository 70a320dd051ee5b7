"""``gdmd export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gdmd.cli.common import Json, Which, messages, print_json


def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder of a real model.")],
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write; default: RUN/export or RUN/export-merged.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="The whole pipeline with the student merged in.")] = False,
    averaged: Annotated[bool, typer.Option("--ema/--no-ema", help="The averaged student, or its last weights.")] = True,
    which: Which = "last",
    json: Json = False,
) -> None:
    """Write the student of a run for diffusers and ComfyUI: LoRA, scheduler and a model card.

    \b
    Examples:
      gdmd export runs/sdxl-seed0
      gdmd export runs/sdxl-seed0 --merged -o my-four-step-sdxl
      gdmd export runs/sdxl-seed0 --checkpoint best           by loop.best_metric, or a step
    """
    from gdmd.programs.folders import config_of

    config_of(run)
    from gdmd.programs.export import export_run

    files = export_run(run, folder, merged=merged, averaged=averaged, which=which)
    if json:
        print_json({"files": [str(file) for file in files]})
        return
    for file in files:
        messages().print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)
