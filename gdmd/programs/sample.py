"""What ``gdmd sample`` does: captions -> one row of images each, in a PNG."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from gdmd.config.sources import SourceConfig
from gdmd.evaluation.grids import write_grid
from gdmd.io import writing
from gdmd.programs.sources import Source, open_source, places_of
from gdmd.rewards.images import from_pil


def draw(cfg: SourceConfig, prompts: Sequence[str], count: int, seed: int, path: Path, scale: int) -> float:
    """Write the images of a run, an export, a pipeline or the teacher, and return the seconds that sampling took.

    Image k of a caption depends on (seed, place of the caption, k) only. ValueError for a word outside the language of
    a Shapes source.
    """
    source = open_source(cfg)
    source.check(prompts)
    began = time.perf_counter()
    images = images_of_source(source, prompts, count, seed)
    seconds = time.perf_counter() - began
    with writing("the images", path):
        write_grid(
            path, images.unflatten(0, (len(prompts), count)), prompts, scale=scale if images.shape[-1] <= 64 else 1
        )
    return seconds


def images_of_source(source: Source, prompts: Sequence[str], count: int, seed: int) -> torch.Tensor:
    """[len(prompts) * count, 3, H, W] in [0, 1], 8-bit levels."""
    places, step = places_of(prompts, count), source.facts.batch
    made = [one for k in range(0, len(places), step) for one in source.make(places[k : k + step], seed)]
    return from_pil(made)
