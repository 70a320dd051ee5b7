"""What ``gdmd sample`` does: captions -> one row of images each, in a PNG."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from gdmd.evaluation.grids import write_grid
from gdmd.evaluation.sample import images_of
from gdmd.programs.evaluate import image_batch, open_named
from gdmd.programs.folders import TEACHERS, config_of
from gdmd.runs.errors import writing
from gdmd.shapes.grammar import tokenize


def draw(what: str, prompts: Sequence[str], count: int, seed: int, path: Path, scale: int) -> float:
    """Write the images of a run's EMA student (or of the teacher) and return the seconds that sampling took.

    Image k of a caption depends on (seed, place of the caption, k) only. ValueError for a word outside the language.
    """
    shapes = what in TEACHERS or config_of(Path(what)).model.kind == "shapes"
    for prompt in prompts if shapes else ():
        tokenize(prompt)
    cfg, lab, sampler, _ = open_named(what)
    began = time.perf_counter()
    texts = [text for text in prompts for _ in range(count)]
    images = images_of(sampler, lab, texts, seed, image_batch(cfg))
    seconds = time.perf_counter() - began
    with writing("the images", path):
        write_grid(path, images.unflatten(0, (len(prompts), count)), prompts, scale=scale if shapes else 1)
    return seconds
