"""Open image files: one function for training data, scored folders, GenEval and the study."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
"""Formats that are decoded, whatever the extension of the file."""
ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "tif", "tiff", "bmp", "avif", "heic", "heif", "jxl", "jp2")
"""Extensions of image files. A file in another format than FORMATS is reported, not skipped."""
MAX_PIXELS = 89_000_000
"""A larger image is rejected before it is decoded."""
DECODING = 2
"""Version of how images that are not ``plain`` are decoded. 1 showed colors under transparency and clipped 16 bits."""
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
    zlib.error,
)
"""Exceptions that Pillow raises for damaged files."""
_log = logging.getLogger(__name__)
_noted: set[str] = set()


def is_image(path: Path) -> bool:
    """Whether a file has the extension of an image and is not hidden (macOS writes ._a.png next to a.png)."""
    return path.suffix[1:].lower() in ENDINGS and not path.name.startswith(".")


def open_image(source: Path | bytes, name: str = "") -> Image:
    """An image file (or its content) as an 8-bit RGB image, as a viewer shows it.

    Rotated by its EXIF orientation; the first frame of an animation; transparent parts on white; channels of more than
    8 bits scaled to 8. ``name``: for warnings. ValueError with the reason, without the name, if it cannot be decoded.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = name or (str(source) if isinstance(source, Path) else "an image")
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels; at most {MAX_PIXELS}")
            if getattr(opened, "n_frames", 1) > 1:
                _note("frames", f"{name} is an animation or has several pages: its first image is used")
            return to_rgb(ImageOps.exif_transpose(opened), name)
    except UnidentifiedImageError as error:  # its message shows an object in memory
        raise ValueError("is not a JPEG, PNG, WebP, GIF, TIFF or BMP file") from error
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be decoded ({error})") from error


def plain(content: bytes) -> bool:
    """Whether an image has 8 bits per channel and no transparency, so that all versions of gdmd decode it equally.

    Only its header is read. A file that cannot be opened counts as plain.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            return not (_wide(opened) or opened.has_transparency_data)
    except (*_BROKEN, Image.DecompressionBombError):
        return True


def _wide(image: Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def to_rgb(image: Image, name: str = "an image") -> Image:
    """Any Pillow mode to 8-bit RGB: transparent parts on white, wider channels scaled. ValueError as in ``_white``."""
    from PIL import Image as pillow

    if _wide(image):
        image = _eight_bits(image, name)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    if layers.getchannel("A").histogram()[255] < layers.width * layers.height:
        _note("transparency", f"{name} has transparent pixels: they are shown on white")
    return pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), layers).convert("RGB")


def _eight_bits(image: Image, name: str) -> Image:
    """Modes I;16, I and F as L, or LA if a gray level is transparent. Pillow's conversion would clip."""
    import numpy as np
    from PIL import Image as pillow

    values = np.asarray(image).astype(np.float64)
    top = _white(float(values.min()), float(values.max()), image.mode, name)
    gray = pillow.fromarray((values * (255 / top)).round().astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        gray.putalpha(pillow.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return gray


def _white(low: float, high: float, mode: str, name: str) -> float:
    """The value of white: 65535 for integers, the top of the smallest usual range for floats; else a ValueError."""
    ranges = (1.0, 255.0, 65535.0) if mode == "F" else (65535.0,)
    top = next((top for top in ranges if low >= 0 and high <= top), None)
    if top is None:
        raise ValueError(
            f"its values range from {low:g} to {high:g}, but only 0 to 65535 can be read; save it with 8 bits"
        )
    if mode == "F":
        _note("float", f"{name} has floating-point values from {low:g} to {high:g}: {top:g} is read as white")
    return top


def _note(kind: str, text: str) -> None:
    """Warn about the first file of each kind only: a data set may have thousands."""
    if kind not in _noted:
        _noted.add(kind)
        _log.warning("%s (further files like it are not reported)", text)
