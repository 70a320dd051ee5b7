"""``gdmd latents``."""

from __future__ import annotations

from typing import Annotated

import typer

from gdmd.cli.common import Json, messages, print_json


def latents_command(
    words: Annotated[list[str], typer.Argument(metavar="RECIPE [KEY=VALUE]...", help="Recipe and overrides.")],
    json: Json = False,
) -> None:
    """Encode the real images of a recipe (real_data) once, for DMD2's GAN and method.student_input=data.

    Images are rotated upright, resized to cover model.height x model.width and center-cropped. Latents that exist are
    kept; an interruption loses at most 64 images. Images that cannot be read are listed and counted.

    \b
    Examples:
      gdmd latents sdxl_dmd model.path=/models/sdxl method.student_input=data \\
        real_data.source=images real_data.latents=cache/latents
      gdmd latents my_recipe.yaml --json
    """
    from gdmd.recipes.read import read_recipe

    if "=" in words[0]:
        raise ValueError(f"give a recipe before {words[0]!r}; `gdmd recipes` lists them")
    cfg = read_recipe(words[0], words[1:])
    from gdmd.programs.latents import compute_latents

    made = compute_latents(cfg, messages())
    if json:
        print_json(made)
