"""``gdmd profile``."""

from __future__ import annotations

from typing import Annotated

import typer

from gdmd.cli.common import Arguments, Device, Json, print_json, recipe_of


def profile_command(
    arguments: Arguments,
    iterations: Annotated[int, typer.Option(min=1, help="Measured outer iterations, after one to warm up.")] = 8,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure the speed of a recipe on this machine: forward passes, FLOP, time, images/s, memory.

    Passes are denoiser forward passes of one batch; a backward pass counts as two, or as one through a frozen base model.
    Overhead is the time of an iteration without its optimizer, relative to its network calls, backward passes and scoring.
    With several image sizes (model.sizes), the largest is measured.
    Host syncs are counted on a GPU only. Use loop.threads=1 on a shared machine. No files are written.

    \b
    Examples:
      gdmd profile shapes
      gdmd profile shapes_smoke loop.threads=1 --iterations 3
      gdmd profile dmd2 loop.batch_size=32 --json > dmd2.json
    """
    cfg = recipe_of(arguments)
    from gdmd.io import all_errors
    from gdmd.programs.train import check_places, check_prompts

    all_errors(lambda: check_prompts(cfg), lambda: check_places(cfg))
    from gdmd.profiling.profiler import Profiler, describe, measure

    measured = measure(Profiler(cfg, device=device), iterations)
    print_json(measured) if json else print(describe(measured))
