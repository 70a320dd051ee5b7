"""What ``gdmd latents`` does: encode every image of real_data.source with the family's VAE, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gdmd.config.model import DiffusersModel
from gdmd.config.real_data import RealDataConfig
from gdmd.config.run import RunConfig
from gdmd.data.captioned_images import Unusable
from gdmd.data.latent_cache import Computed, LatentStore
from gdmd.diffusion.device import pick_device
from gdmd.io import SHARDS_STAY, writing
from gdmd.recipes.build_data import encoder_of, store_of

SHOWN = 20
"""Unusable images that are printed; the index and --json have all of them."""


def compute_latents(cfg: RunConfig, console: Console, device: str | None = None) -> dict[str, Any]:
    """Encode the images whose latents are not stored yet, for each image size. ValueError for a recipe without real_data.

    Returns the counts of the one size, or {"sizes": [...]} of several.
    """
    model = cfg.model
    if not isinstance(model, DiffusersModel) or cfg.real_data is None:
        raise ValueError(
            f"recipe {cfg.name} has no real_data: set real_data.source and real_data.latents (diffusers pipelines only), "
            "and a method that reads real images (method.student_input=data, or dmd2 with gan_weight > 0)"
        )
    rows = [_of_size(one, cfg.real_data, console, device) for one in model.each_size]
    return {"sizes": rows} if model.sizes else rows[0]


def _of_size(model: DiffusersModel, real: RealDataConfig, console: Console, device: str | None) -> dict[str, Any]:
    """The latents of one image size."""
    store = store_of(real, model)
    with writing("the latents", store.folder, SHARDS_STAY, "real_data.latents"):
        computed = _prepared(store, real, model, console, device)
    _print_summary(computed, store, console)
    return {
        "height": model.height,
        "width": model.width,
        "folder": str(store.folder),
        "images": computed.images,
        "encoded": computed.encoded,
        "captions": computed.captions,
        "unusable": [{"name": found.name, "why": found.why} for found in computed.unusable],
    }


def _prepared(
    store: LatentStore, real: RealDataConfig, model: DiffusersModel, console: Console, device: str | None
) -> Computed:
    def encoder() -> Callable[[torch.Tensor], torch.Tensor]:
        from gdmd.models.loading import open_family

        chosen = pick_device(device)
        family = open_family(model, chosen, encoders=False)
        return encoder_of(family.codec, family.latent_shape, chosen)

    columns = (SpinnerColumn(), TextColumn("{task.completed:.0f} images"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("latents", total=None)
        return store.prepare((model.height, model.width), encoder, real.unreadable, lambda: progress.advance(bar))


def _print_summary(computed: Computed, store: LatentStore, console: Console) -> None:
    lines = [_line(found) for found in computed.unusable[:SHOWN]]
    if len(computed.unusable) > SHOWN:
        lines.append(f"and {len(computed.unusable) - SHOWN} more: `unusable` in {store.folder / 'index.json'}")
    lines.append(
        f"{computed.images} images, {computed.captions} captions; {computed.encoded} encoded now, "
        f"{len(computed.unusable)} skipped; {store.folder}"
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _line(found: Unusable) -> str:
    return f"skipped {found.name!r}: {found.why}"
