"""Opening an image file: one function for training data, scored folders, GenEval and the study."""

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
"""Formats that are decoded, whatever the file extension."""
ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "tif", "tiff", "bmp", "avif", "heic", "heif", "jxl", "jp2")
"""Files that are images. Those in another format than FORMATS are refused by name, not left out."""
MOST_PIXELS = 89_000_000
"""Of one image; more is refused before it is decoded."""
DECODING = 2
"""Changes with what ``open_image`` makes of images that are not ``plain``. 1: colors under transparency, 16 bits clipped."""
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
"""What Pillow raises for damaged files."""
_log = logging.getLogger(__name__)
_noted: set[str] = set()


def is_image(path: Path) -> bool:
    """Whether a file has the ending of an image and is not hidden (macOS writes ._a.png next to a.png)."""
    return path.suffix[1:].lower() in ENDINGS and not path.name.startswith(".")


def open_image(source: Path | bytes, name: str = "") -> Image:
    """An image file (or its content) as an 8-bit RGB image, as a viewer shows it.

    Turned upright by its EXIF orientation; the first frame of an animation; transparent parts on white; more than 8
    bits a channel scaled to 8. ``name``: for messages. ValueError says what is wrong with the file, without its name.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = name or (str(source) if isinstance(source, Path) else "an image")
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels; at most {MOST_PIXELS}")
            if getattr(opened, "n_frames", 1) > 1:
                _note("frames", f"{name} is an animation or holds several pages: its first image is used")
            return to_rgb(ImageOps.exif_transpose(opened), name)
    except UnidentifiedImageError as error:  # its own words name an object in memory
        raise ValueError("is not a JPEG, PNG, WebP, GIF, TIFF or BMP file") from error
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be decoded ({error})") from error


def plain(content: bytes) -> bool:
    """Whether an image file has 8 bits a channel and no transparency: every version of gdmd decodes it the same way.

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
    """Any mode of Pillow -> 8-bit RGB: transparent parts on white, wider channels scaled. ValueError for odd values."""
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
    """Modes I;16, I and F as L (LA where a gray level counts as transparent). Pillow's own conversion would clip."""
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
    """The value that is read as white. Integers: 16 bits. Floats: the smallest usual range that fits."""
    ranges = (1.0, 255.0, 65535.0) if mode == "F" else (65535.0,)
    top = next((top for top in ranges if low >= 0 and high <= top), None)
    if top is None:
        raise ValueError(f"its values run from {low:g} to {high:g}, only 0 to 65535 can be read; save it with 8 bits")
    if mode == "F":
        _note("float", f"{name} holds floating-point numbers from {low:g} to {high:g}: {top:g} is read as white")
    return top


def _note(kind: str, text: str) -> None:
    """A warning for the first file of a kind: a data set may hold thousands."""
    if kind not in _noted:
        _noted.add(kind)
        _log.warning("%s (further files like it are not named)", text)
