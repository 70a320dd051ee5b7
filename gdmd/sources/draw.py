"""What ``gdmd sample`` does: prompts -> a PNG with one row of images per prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gdmd.config.image_source import SourceConfig
from gdmd.reporting.grids import write_grid
from gdmd.reporting.progress_bar import counted, phase
from gdmd.rewards.preprocessing import from_pil
from gdmd.sources.base import Source, image_slots
from gdmd.sources.open import open_source

if TYPE_CHECKING:
    from PIL.Image import Image


SMALL, ENLARGED = 64, 4
"""Images of at most SMALL pixels a side are enlarged by this factor if no scale is given."""


def draw(cfg: SourceConfig, prompts: Sequence[str], count: int, seed: int, path: Path, scale: int | None) -> float:
    """Write the images of any source and return the seconds that sampling took.

    Image k of a prompt depends only on (seed, number of the prompt, k). scale: enlargement; None = ENLARGED for small
    images, else 1. ValueError for a prompt that is not a caption of a Shapes source.
    """
    with phase(f"loading {cfg.name}"):
        source = open_source(cfg)
    source.check(prompts)
    began = time.perf_counter()
    images = images_of_source(source, prompts, count, seed)
    seconds = time.perf_counter() - began
    small = max(max(image.size) for image in images) <= SMALL
    cells = [[from_pil([image])[0] for image in images[k : k + count]] for k in range(0, len(images), count)]
    write_grid(path, cells, prompts, scale=scale or (ENLARGED if small else 1), option="--out")
    return seconds


def images_of_source(source: Source, prompts: Sequence[str], count: int, seed: int) -> list[Image]:
    """``count`` images of each prompt, prompt by prompt; those of a folder may differ in size."""
    slots, step = image_slots(prompts, count), source.info.batch
    parts = (slots[k : k + step] for k in range(0, len(slots), step))
    shown = counted(parts, f"{source.info.name}: generating {len(slots):,} image{'s' * (len(slots) > 1)}", len(slots))
    return [one for part in shown for one in source.generate(part, seed)]
