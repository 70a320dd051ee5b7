"""Draws the README's image from a finished ``gdmd demo``: ``python docs/figures/demo.py RUN``.

RUN is the folder of the demo. The prompts are the first of each task of the fixed evaluation set and the images the
first three of each prompt, from the same noise for every model; nothing is selected by hand.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

OUT = Path(__file__).parents[1] / "img" / "demo.png"
COLUMNS = (("teacher", "teacher, 100 calls"), ("dmd", "DMD, 4 calls"), ("gdmd", "GDMD, 4 calls"))
IMAGES = 3
GAP = 0.35
"""Gap between two models, in image widths."""


def sample(run: Path, out: Path) -> None:
    """Images of the teacher and both students of the demo, by ``gdmd eval compare``."""
    sources = ["teacher", f"dmd={run / 'dmd'}", f"gdmd={run / 'gdmd'}"]
    options = ["-o", str(out), "--per-task", "1", "--images", str(IMAGES)]
    subprocess.run([sys.executable, "-m", "gdmd", "eval", "compare", *sources, *options], check=True)


def prompts(folder: Path) -> list[tuple[str, Sequence[Path]]]:
    """Prompt and images of every subfolder of GenEval's layout."""
    found = []
    for one in sorted(folder.glob("[0-9]*")):
        line = json.loads((one / "metadata.jsonl").read_text(encoding="utf-8"))
        found.append((line["prompt"], sorted((one / "samples").glob("*.png"))))
    return found


def draw(folder: Path, out: Path = OUT) -> None:
    """One row per prompt, three images per model."""
    from matplotlib.figure import Figure
    from PIL import Image

    rows = [prompts(folder / name / "images") for name, _ in COLUMNS]
    height, width = len(rows[0]), len(COLUMNS) * IMAGES + (len(COLUMNS) - 1) * GAP
    figure = Figure(figsize=(9.2, 9.2 * 0.745 * height / width / 0.94))  # square images in the box below
    axes = figure.add_axes((0.25, 0, 0.745, 0.94))
    for k, (_, title) in enumerate(COLUMNS):
        left = k * (IMAGES + GAP)
        axes.text(left + IMAGES / 2, -0.08, title, ha="center", va="bottom", fontsize=11)
        for y, (text, files) in enumerate(rows[k]):
            if k == 0:
                axes.text(-0.15, y + 0.5, textwrap.fill(text, 24), ha="right", va="center", fontsize=9)
            for j, file in enumerate(files[:IMAGES]):
                box = (left + j + 0.03, left + j + 0.97, y + 0.97, y + 0.03)
                axes.imshow(Image.open(file), extent=box, interpolation="nearest")
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    axes.axis("off")
    figure.savefig(out, dpi=110, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sample(Path(sys.argv[1]), Path(folder) / "images")
        draw(Path(folder) / "images")
