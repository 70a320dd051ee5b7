"""The images of docs/results/turbo.md, from the runs of its commands.

python docs/figures/turbo.py docs/results/turbo/images.png TURBO_RUN "turbo model" ALIGNED_RUN aligned ...
python docs/figures/turbo.py docs/results/turbo/style.png STUDENT_RUN student --teacher
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from gdmd.recipes.open_run import open_named, teacher_row
from gdmd.shapes.same_noise import write_same_noise

CAPTIONS = (
    "a ring",
    "a circle and a square",
    "two triangles",
    "a red square",
    "a circle left of a ring",
    "a red ring and a blue circle",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", help="run folders, each followed by its name")
    parser.add_argument("--teacher", action="store_true", help="also the teacher of the first run")
    given = parser.parse_args()
    columns = []
    for run, name in zip(given.runs[::2], given.runs[1::2], strict=True):
        cfg, components, sampler, _ = open_named(run)
        if given.teacher and not columns:
            columns.append((teacher_row(cfg, components, "teacher"), components))
        columns.append((replace(sampler, name=name), components))
    with tempfile.TemporaryDirectory() as folder:
        grid = Path(folder) / "grid.png"
        write_same_noise(grid, columns, CAPTIONS, seed=777, scale=2)
        given.out.write_bytes(grid.read_bytes())


if __name__ == "__main__":
    main()
