"""Sample grids as PNG: a row per caption, pixels shown as squares so that 32 x 32 pictures can be judged by eye."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gdmd.evaluation.sample import Lab, Sampler, images_of

if TYPE_CHECKING:
    from PIL.Image import Image

INK, PAPER, RULE = (30, 32, 38), (250, 250, 250), (205, 205, 210)
FONT, MARGIN, GAP = 13, 8, 3
LINE = 48
"""Characters of a line of a caption: prompts of real models are paragraphs, and would be wider than their pictures."""


def write_grid(path: Path, cells: Tensor, captions: Sequence[str], headers: Sequence[str] = (), scale: int = 3) -> Path:
    """Save ``draw_grid`` to ``path`` (PNG), whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(draw_grid(cells, captions, headers, scale)))
    return path


def png_bytes(image: Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def draw_grid(cells: Tensor, captions: Sequence[str], headers: Sequence[str] = (), scale: int = 3) -> Image:
    """cells [R, C, 3, S, S] in [0, 1], R captions; ``headers`` (a divisor of C many) stand over equal spans of columns."""
    from PIL import Image, ImageDraw, ImageFont

    rows, columns = _checked(cells, captions, headers)
    font = ImageFont.load_default(size=FONT)
    side = cells.shape[-1] * scale
    texts = [_lines(text, side) for text in captions]
    left = MARGIN + max(int(font.getlength(line)) for lines in texts for line in lines) + MARGIN
    top = MARGIN + (FONT + MARGIN if headers else 0)
    span = columns // len(headers) if headers else columns
    gaps = [GAP * column + (MARGIN if headers else 0) * (column // span) for column in range(columns)]
    last = gaps[-1] + columns * side
    wanted = max((int(font.getlength(text)) - span * side for text in headers), default=0)
    canvas = Image.new("RGB", (left + last + max(wanted, 0) + MARGIN, top + rows * (side + GAP) + MARGIN), PAPER)
    pen = ImageDraw.Draw(canvas)
    for place, text in enumerate(headers):
        pen.text((left + place * span * side + gaps[place * span], MARGIN), text, fill=INK, font=font)
    for row, lines in enumerate(texts):
        y = top + row * (side + GAP)
        first = y + (side - len(lines) * (FONT + GAP) + GAP) // 2
        for place, line in enumerate(lines):
            pen.text((MARGIN, first + place * (FONT + GAP)), line, fill=INK, font=font)
        for column in range(columns):
            canvas.paste(_picture(cells[row, column], side), (left + column * side + gaps[column], y))
    return canvas


def same_noise_cells(
    samplers: Sequence[Sampler], lab: Lab, captions: Sequence[str], seed: int, per_caption: int = 2
) -> Tensor:
    """[R, len(samplers) * per_caption, 3, S, S]: every sampler makes image (caption, k) from the same noise."""
    texts = [text for text in captions for _ in range(per_caption)]
    sides = [images_of(sampler, lab, texts, seed).unflatten(0, (len(captions), per_caption)) for sampler in samplers]
    return torch.cat(sides, 1)


def write_comparison(
    path: Path, samplers: Sequence[Sampler], lab: Lab, captions: Sequence[str], seed: int, per_caption: int = 2
) -> Path:
    """The side-by-side grid of samplers (the teacher first, then students) from the same noise."""
    cells = same_noise_cells(samplers, lab, captions, seed, per_caption)
    return write_grid(path, cells, captions, [f"{sampler.name} ({sampler.nfe} NFE)" for sampler in samplers])


def _checked(cells: Tensor, captions: Sequence[str], headers: Sequence[str]) -> tuple[int, int]:
    if cells.ndim != 5 or cells.shape[2] != 3 or len(cells) != len(captions) or not cells.numel():
        raise ValueError(
            f"a grid needs cells [R, C, 3, S, S] with one caption per row, got {list(cells.shape)} and "
            f"{len(captions)} captions; reshape the images with unflatten(0, (R, C))"
        )
    if headers and cells.shape[1] % len(headers):
        raise ValueError(f"{len(headers)} headers cannot stand over {cells.shape[1]} columns in equal spans")
    return cells.shape[0], cells.shape[1]


def _lines(caption: str, side: int) -> list[str]:
    """A caption in lines beside a row of ``side`` pixels, cut off where the row ends."""
    most = max(side // (FONT + GAP), 1)
    return textwrap.wrap(caption, LINE, max_lines=most, placeholder=" ...") or [""]


def _picture(image: Tensor, side: int) -> Image:
    from PIL import Image

    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
