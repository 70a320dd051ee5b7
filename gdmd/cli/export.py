"""``gdmd export``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gdmd.cli.common import Checkpoint, Json, log, print_json


class Dtype(StrEnum):
    """Precision of a merged pipeline."""

    fp32 = "fp32"
    bf16 = "bf16"


def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder of a diffusers pipeline.")],
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write; default: RUN/export or RUN/export-merged.")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Write the whole pipeline with the student merged in.")
    ] = False,
    averaged: Annotated[bool, typer.Option("--ema/--no-ema", help="The EMA student, or its last weights.")] = True,
    which: Checkpoint = "last",
    base: Annotated[
        str | None, typer.Option("--base", help="The base model, if it has moved: folder or hub id.")
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option("--dtype", help="Precision of a merged pipeline; bf16 may round away a short run's changes."),
    ] = None,
    loras: Annotated[
        bool,
        typer.Option(
            "--loras/--no-loras",
            help="Include the run's own LoRAs (model.teacher_loras, model.student_lora) in the exported LoRA. Without "
            "them, they must be loaded first.",
        ),
    ] = True,
    license: Annotated[
        str | None,
        typer.Option("--license", metavar="NAME", help="License in the model card; default: the base model's."),
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="ORG/NAME", help="Also upload it to the Hugging Face Hub.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: create a private repository.")
    ] = False,
    json: Json = False,
) -> None:
    """Export the student of a run for diffusers and ComfyUI: a LoRA, its scheduler and a model card.

    \b
    Examples:
      gdmd export runs/sdxl-seed0
      gdmd export runs/sdxl-seed0 --merged --dtype fp32 -o my-four-step-sdxl
      gdmd export runs/sdxl-seed0 --base /elsewhere/sdxl-base
      gdmd export runs/sdxl-seed0 --checkpoint best
      gdmd export runs/sdxl-seed0 --push-to-hub me/sdxl-4step --license openrail++
    """
    from gdmd.recipes.run_folders import config_of

    config_of(run)
    _check_upload(push, private=private)
    from gdmd.programs.export import export_run

    kind: Any = dtype.value if dtype else None
    weights: dict[str, Any] = {"averaged": averaged, "which": which, "base": base, "dtype": kind, "loras": loras}
    files = export_run(run, folder, merged=merged, license=license, repo_id=push, **weights)
    for file in () if json else files:
        log(f"wrote {file}")
    url = _upload(files[-1].parent, push, private=private) if push is not None else None
    if json:
        print_json({"files": [str(file) for file in files], **({"url": url} if url else {})})


def _check_upload(push: str | None, *, private: bool) -> None:
    """ValueError for --private without an upload, and for a repository that cannot be written."""
    if private and push is None:
        raise ValueError("--private applies to an upload only; add --push-to-hub ORG/NAME or omit --private")
    if push is not None:
        from gdmd.export.upload import check_hub_target

        check_hub_target(push)


def _upload(folder: Path, push: str, *, private: bool) -> str:
    """Upload the export; returns its address."""
    from gdmd.export.upload import push_to_hub

    url = push_to_hub(folder, push, private=private or None)
    log(f"uploaded to {url}")
    return url
