"""``gdmd plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from gdmd.cli.common import Arguments, Json, print_json, recipe_of


def plan_command(
    arguments: Arguments,
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
    """Estimate the memory, forward passes, FLOP and speed of a recipe without loading any weights.

    Memory is counted by role on the real architecture, with fake tensors: from the configs of a local model folder, or
    the known config of a hub id. Speed and several GPUs are estimates.

    \b
    Examples:
      gdmd plan sdxl_gdmd --gpu rtx4090
      gdmd plan sdxl_gdmd model.height=512 model.width=512 --gpu rtx4090
      gdmd plan sd3_gdmd model.path=/models/sd3 --gpus table
      gdmd plan shapes --json
    """
    from gdmd.plan.cost_model import gpu_of

    card, cfg = gpu_of(gpu), recipe_of(arguments)
    from gdmd.plan.estimate import counts_of, plan

    counts = counts_of(gpus)
    estimate = plan(cfg, card, efficiency)
    if json:
        print_json(estimate.json(counts))
        return
    from gdmd.plan.text import described

    print(described(estimate, estimate.scaling(counts)))
