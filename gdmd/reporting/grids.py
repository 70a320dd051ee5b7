"""Image grids as PNG: a row per caption, pixels enlarged to squares so that 32 x 32 images can be judged by eye."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gdmd.diffusion.generate import Components, Sampler, images_of
from gdmd.io import write_atomic, writing

if TYPE_CHECKING:
    from PIL.Image import Image

INK, PAPER, RULE = (30, 32, 38), (250, 250, 250), (205, 205, 210)
FONT, MARGIN, GAP = 13, 8, 3
Cells = Tensor | Sequence[Sequence[Tensor]]
"""Images in [0, 1]: [R, C, 3, H, W], or R rows of C images [3, H, W], whose sizes may differ."""
LINE = 48
"""Characters per line of a caption: prompts of real models are paragraphs, wider than their images."""


def write_grid(
    path: Path,
    cells: Cells,
    captions: Sequence[str],
    headers: Sequence[str] = (),
    scale: int = 3,
    option: str = "--run",
) -> Path:
    """Save ``draw_grid`` to ``path`` (PNG) atomically; its folder is created.

    RunError if it cannot be written; ``option`` is the option that names another location.
    """
    content = png_bytes(draw_grid(cells, captions, headers, scale))
    with writing("the images", path, option=option):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content, "the images", option)
    return path


def png_bytes(image: Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def to_image(image: Tensor) -> Image:
    """[3, H, W] in [0, 1] -> an 8-bit image."""
    from PIL import Image

    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels)


def draw_grid(cells: Cells, captions: Sequence[str], headers: Sequence[str] = (), scale: int = 3) -> Image:
    """R rows of C images with a caption next to each row, under ``headers`` of equal spans: their number divides C.

    A pixel of an image becomes a square of ``scale`` pixels; smaller images are centered.
    """
    from PIL import Image, ImageDraw, ImageFont

    shown = [[_scaled(image, scale) for image in row] for row in _checked(cells, captions, headers)]
    font = ImageFont.load_default(size=FONT)
    heights = [max(image.height for image in row) for row in shown]
    widths = [max(image.width for image in column) for column in zip(*shown, strict=True)]
    texts = [_lines(text, height) for text, height in zip(captions, heights, strict=True)]
    left = MARGIN + max(int(font.getlength(line)) for lines in texts for line in lines) + MARGIN
    span = len(widths) // len(headers) if headers else len(widths)
    wide = [sum(widths[k * span : (k + 1) * span]) for k in range(len(headers))]
    titles = [_wrapped(text, width, font.getlength) for text, width in zip(headers, wide, strict=True)]
    top = MARGIN + (max(map(len, titles)) * (FONT + GAP) - GAP + MARGIN if headers else 0)
    between = [GAP * k + (MARGIN if headers else 0) * (k // span) for k in range(len(widths))]
    x = [left + sum(widths[:k]) + between[k] for k in range(len(widths))]
    y = [top + sum(heights[:k]) + GAP * k for k in range(len(heights))]
    over = [int(max(map(font.getlength, own))) - width for own, width in zip(titles, wide, strict=True)]
    right = x[-1] + widths[-1] + max([0, *over]) + MARGIN
    canvas = Image.new("RGB", (right, y[-1] + heights[-1] + GAP + MARGIN), PAPER)
    pen = ImageDraw.Draw(canvas)
    for k, own in enumerate(titles):
        for number, line in enumerate(own):
            pen.text((x[k * span], MARGIN + number * (FONT + GAP)), line, fill=INK, font=font)
    for lines, images, here, height in zip(texts, shown, y, heights, strict=True):
        first = here + (height - len(lines) * (FONT + GAP) + GAP) // 2
        for k, line in enumerate(lines):
            pen.text((MARGIN, first + k * (FONT + GAP)), line, fill=INK, font=font)
        for image, there, width in zip(images, x, widths, strict=True):
            canvas.paste(image, (there + (width - image.width) // 2, here + (height - image.height) // 2))
    return canvas


def same_noise_cells(
    samplers: Sequence[Sampler], components: Components, captions: Sequence[str], seed: int, per_caption: int = 2
) -> Tensor:
    """[R, len(samplers) * per_caption, 3, S, S]: image (caption, k) of every sampler starts from the same noise."""
    texts = [text for text in captions for _ in range(per_caption)]
    sides = [
        images_of(sampler, components, texts, seed).unflatten(0, (len(captions), per_caption)) for sampler in samplers
    ]
    return torch.cat(sides, 1)


def _wrapped(text: str, width: float, length: Callable[[str], float]) -> list[str]:
    """The text in lines of at most this length; a longer word is a line by itself."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if not lines[-1] or length(longer) <= width else [*lines, word]
    return lines


def _checked(cells: Cells, captions: Sequence[str], headers: Sequence[str]) -> list[list[Tensor]]:
    rows = [list(row) for row in cells]
    images = [image for row in rows for image in row]
    right = images and all(image.ndim == 3 and image.shape[0] == 3 and image.numel() for image in images)
    if not right or len(rows) != len(captions) or len({len(row) for row in rows}) > 1:
        seen = list(cells.shape) if isinstance(cells, Tensor) else [len(row) for row in rows]
        raise ValueError(
            f"a grid needs rows of equally many images [3, H, W] with one caption per row, got {seen} and "
            f"{len(captions)} captions; reshape a batch of images with unflatten(0, (R, C))"
        )
    if headers and len(rows[0]) % len(headers):
        raise ValueError(f"{len(headers)} headers cannot be placed over {len(rows[0])} columns in equal spans")
    return rows


def _lines(caption: str, height: int) -> list[str]:
    """A caption in lines next to a row of ``height`` pixels, cut off where the row ends."""
    most = max(height // (FONT + GAP), 1)
    return textwrap.wrap(caption, LINE, max_lines=most, placeholder=" ...") or [""]


def _scaled(image: Tensor, scale: int) -> Image:
    from PIL import Image

    small = to_image(image)
    return small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST)
