"""Draws the figures of docs/concepts/shapes.md: ``python docs/figures/shapes.py``. Seeded; needs the shipped assets."""

from pathlib import Path

import torch

from gdmd.diffusion.generate import images_of, teacher_sampler
from gdmd.recipes.build import build
from gdmd.recipes.read import read_recipe
from gdmd.reporting.grids import write_grid
from gdmd.runs.assets import asset_path, load_asset
from gdmd.shapes.detect import detect
from gdmd.shapes.grammar import TASKS, catalog, fixed_rows
from gdmd.shapes.render import draw_scenes, render
from gdmd.shapes.roles import ShapesCodec, load_vae

FOLDER = Path(__file__).parents[1] / "img"
COLUMNS = 8
SEED = 7


def main() -> None:
    """Renders, what the checker reads from their VAE reconstructions, and images by the teacher."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(SEED)
    rows = fixed_rows("eval", 1)
    captions = [catalog().captions[row].text for row in rows.tolist()]
    many = rows.repeat_interleave(COLUMNS)
    images = render(draw_scenes(many, generator)).unflatten(0, (len(TASKS), COLUMNS))
    write_grid(FOLDER / "shapes_renders.png", images, captions)

    codec = ShapesCodec(load_vae(load_asset(asset_path("shapes_vae")).tensors))
    with torch.no_grad():
        rebuilt = codec.decode(codec.encode(images[:, 0])).clamp(0, 1)
    again = render(detect(rebuilt).scenes)
    write_grid(
        FOLDER / "shapes_detection.png",
        torch.stack([images[:, 0], rebuilt, again], 1),
        captions,
        ["render", "VAE", "detected"],
    )

    cfg = read_recipe("shapes")
    lab = build(cfg)
    teacher = teacher_sampler(lab, cfg.eval.teacher_steps, cfg.method.guidance)
    texts = [caption for caption in captions for _ in range(COLUMNS)]
    drawn = images_of(teacher, lab, texts, SEED).unflatten(0, (len(TASKS), COLUMNS))
    write_grid(FOLDER / "shapes_teacher.png", drawn, captions)


if __name__ == "__main__":
    main()
