"""``gdmd plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from gdmd.cli.common import Json, print_json


def plan_command(
    arguments: Annotated[list[str], typer.Argument(metavar="RECIPE [KEY=VALUE]...", help="Recipe and overrides.")],
    gpu: Annotated[str, typer.Option("--gpu", help="A GPU of the table: h100, a100-80, rtx4090, ...")] = "h100",
    gpus: Annotated[
        str | None,
        typer.Option(
            "--gpus", metavar="N|table", help="Also DDP and FSDP on N GPUs of one node, or a table of 1 to 8."
        ),
    ] = None,
    efficiency: Annotated[
        float, typer.Option("--efficiency", min=0.01, max=1.0, help="Assumed share of the GPU's peak FLOP/s.")
    ] = 0.4,
    json: Json = False,
) -> None:
    """Estimate memory by role, forward passes, FLOP and speed of a recipe, and whether it fits, before anything is loaded.

    Weights and activations are counted on the real architecture, with fake tensors. A folder's own configs are used;
    for a hub id, the known config of that model. Speed and several GPUs are estimates.

    \b
    Examples:
      gdmd plan sdxl_gdmd --gpu rtx4090
      gdmd plan sdxl_gdmd model.height=512 model.width=512 loop.batch_size=4 --gpu rtx4090
      gdmd plan sd3_gdmd model.path=/models/sd3 --gpus table
      gdmd plan shapes --json
    """
    from gdmd.plan.cost_model import gpu_of
    from gdmd.recipes.read import read_recipe

    if "=" in arguments[0]:
        raise ValueError(f"name a recipe before {arguments[0]!r}; `gdmd recipes` lists them")
    card = gpu_of(gpu)
    cfg = read_recipe(arguments[0], arguments[1:])
    from gdmd.plan.estimate import counts_of, plan

    counts = counts_of(gpus)
    estimate = plan(cfg, card, efficiency)
    if json:
        print_json(estimate.json(counts))
        return
    from gdmd.plan.text import described

    print(described(estimate, estimate.scaling(counts)))
