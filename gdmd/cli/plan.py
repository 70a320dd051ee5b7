"""``gdmd plan``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from gdmd.cli.common import Arguments, Json, log, print_json, recipe_of


def plan_command(
    arguments: Arguments,
    gpu: Annotated[
        str, typer.Option("--gpu", help="A GPU by name (h100, a100-80, rtx4090, ...) or by its memory in GiB.")
    ] = "h100",
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Change settings, the cheapest first, until it fits; exit code 1 if it cannot."),
    ] = False,
    gpus: Annotated[
        str | None,
        typer.Option(
            "--gpus", metavar="N|table", help="Also estimate DDP and FSDP on N GPUs of one node; table: on 1 to 8."
        ),
    ] = None,
    efficiency: Annotated[
        float, typer.Option("--efficiency", min=0.01, max=1.0, help="Assumed share of the GPU's peak FLOP/s.")
    ] = 0.4,
    json: Json = False,
) -> None:
    """Estimate the memory, forward passes, FLOP and speed of a recipe without loading any weights.

    Memory is counted by role on the real architecture, with fake tensors: from the configs of a local model folder, or
    the known config of a hub id. Speed and multi-GPU numbers are estimates. With several image sizes (model.sizes), the
    largest is counted.

    --fit tries, in this order: cached text embeddings, smaller micro-batches and calls, activation checkpointing,
    offloaded rewards, decoder and base model, 8-bit optimizer state, rewards in bf16, tiled or tiny decoding, a base model
    in int8, then nf4.
    It never changes the batch, the image size or what is trained, and prints the command of the run.

    \b
    Examples:
      gdmd plan sdxl_gdmd --gpu rtx4090
      gdmd plan flux2_klein_gdmd --gpu 16 --fit
      gdmd plan sd3_gdmd model.path=/models/sd3 --gpus table
      gdmd plan shapes --json
    """
    from gdmd.plan.cost_model import gpu_of

    card, cfg = gpu_of(gpu), recipe_of(arguments)
    from gdmd.plan.estimate import counts_of, plan

    counts = counts_of(gpus)
    from gdmd.plan import fit as search

    kept: list[search.Change] = []
    if fit:
        estimate, kept = search.fit(lambda more: recipe_of([*arguments, *more]), card, efficiency, log)
    else:
        estimate = plan(cfg, card, efficiency)
    from gdmd.plan.text import described, fitted, train_command

    if json:
        found = {"changes": [asdict(change) for change in kept], "command": train_command(arguments, kept)}
        print_json(estimate.json(counts) | ({"fit": found} if fit else {}))
    else:
        print(described(estimate, estimate.scaling(counts)))
        if fit:
            print(f"\n{fitted(estimate, kept, arguments)}")
    if fit and not search.fits(estimate):
        raise typer.Exit(1)
