"""``gdmd plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from gdmd.cli.common import Json, print_json


def plan_command(
    words: Annotated[list[str], typer.Argument(metavar="RECIPE [KEY=VALUE]...", help="Recipe and overrides.")],
    gpu: Annotated[str, typer.Option("--gpu", help="A GPU of the table: h100, a100-80, rtx4090, ...")] = "h100",
    gpus: Annotated[
        str | None, typer.Option("--gpus", metavar="N|table", help="Also DDP and FSDP on N GPUs, or a table to 512.")
    ] = None,
    efficiency: Annotated[
        float, typer.Option("--efficiency", min=0.01, max=1.0, help="Share of the GPU's peak that is reached.")
    ] = 0.4,
    json: Json = False,
) -> None:
    """Memory by role, passes, FLOP and expected speed of a recipe, before anything is loaded; says whether it fits.

    Weights and activations are counted on the real architecture, with tensors that have no memory. A folder's own
    configs are used; for a hub id, the published config of that model. Speed and N GPUs are a model.

    \b
    Examples:
      gdmd plan sdxl_gdmd --gpu rtx4090
      gdmd plan sdxl_gdmd model.height=512 model.width=512 loop.batch_size=4 --gpu rtx4090
      gdmd plan sd3_gdmd model.path=/models/sd3 --gpus table
      gdmd plan shapes --json
    """
    from gdmd.plan.cost_model import gpu_of
    from gdmd.recipes.read import read_recipe

    if "=" in words[0]:
        raise ValueError(f"no recipe was named before {words[0]!r}; `gdmd recipes` lists them")
    card = gpu_of(gpu)
    cfg = read_recipe(words[0], words[1:])
    from gdmd.plan.estimate import counts_of, plan

    counts = counts_of(gpus)
    made = plan(cfg, card, efficiency)
    if json:
        print_json(made.json(counts))
        return
    from gdmd.plan.text import described

    print(described(made, made.scaling(counts)))
