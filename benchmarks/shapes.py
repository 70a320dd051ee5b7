"""Images per second of the Shapes renderer and checker on one thread: python benchmarks/shapes.py

Prints wall-clock and processor-time rates; on a busy machine only the second says what the code costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from gdmd.shapes.check import shapeseval
from gdmd.shapes.grammar import draw_rows
from gdmd.shapes.render import draw_scenes, render

COUNT = 1024


def rate(name: str, work: Callable[[], object]) -> None:
    work()  # warm up
    wall, used = time.perf_counter(), time.process_time()
    work()
    wall, used = time.perf_counter() - wall, time.process_time() - used
    print(f"{name:12s} {COUNT / wall:8.0f} images/s   {COUNT / used:8.0f} images per processor second")


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(COUNT, generator)
    scenes = draw_scenes(rows, generator)
    images = render(scenes)
    rate("render", lambda: render(scenes))
    rate("check", lambda: shapeseval(images, rows))


if __name__ == "__main__":
    main()
