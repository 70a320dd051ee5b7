"""Small images."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def png(red: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A file of one color."""
    file = io.BytesIO()
    Image.new("RGB", size, (red, 20, 30)).save(file, "PNG")
    return file.getvalue()


def noise(height: int, width: int) -> Image.Image:
    """Random pixels, the same in every call."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
