"""What ``gdmd sample`` does: captions -> one row of images each, in a PNG."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from gdmd.evaluation.grids import write_grid
from gdmd.evaluation.sample import images_of
from gdmd.programs.evaluate import open_named
from gdmd.runs.errors import writing
from gdmd.shapes.grammar import tokenize


def draw(what: str, prompts: Sequence[str], count: int, seed: int, path: Path, scale: int) -> float:
    """Write the images of a run's EMA student (or of the teacher) and return the seconds that sampling took.

    Image k of a caption depends on (seed, place of the caption, k) only. ValueError for a word outside the language.
    """
    for prompt in prompts:
        tokenize(prompt)
    _, lab, sampler, _ = open_named(what)
    began = time.perf_counter()
    images = images_of(sampler, lab, [text for text in prompts for _ in range(count)], seed)
    seconds = time.perf_counter() - began
    with writing("the images", path):
        write_grid(path, images.unflatten(0, (len(prompts), count)), prompts, scale=scale)
    return seconds
