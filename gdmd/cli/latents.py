"""``gdmd latents``."""

from __future__ import annotations

from gdmd.cli.common import Arguments, Device, Json, messages, print_json, recipe_of


def latents_command(arguments: Arguments, device: Device = None, json: Json = False) -> None:
    """Encode a recipe's real images (real_data) once, for DMD2's GAN and method.student_input=data.

    Images are rotated upright, resized to cover model.height x model.width (each of model.sizes, if there are several)
    and center-cropped. Existing latents are kept; an interruption loses at most 64 images. Unreadable images are listed
    and counted.

    \b
    Examples:
      gdmd latents sdxl_dmd model.path=/models/sdxl method.student_input=data \\
        real_data.source=images real_data.latents=cache/latents
      gdmd latents my_recipe.yaml --json
    """
    cfg = recipe_of(arguments)
    from gdmd.programs.latents import compute_latents

    counts = compute_latents(cfg, messages(), device)
    if json:
        print_json(counts)
