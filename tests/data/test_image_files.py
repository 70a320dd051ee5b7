"""Image files as a viewer shows them: the same for training, scoring and the study."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import CASES, mutated, refusal
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gdmd.data import image_files
from gdmd.data.captioned_images import pixels
from gdmd.sources.folders import read_image, read_images


def tif(values: np.ndarray) -> bytes:
    return stored(Image.fromarray(values), "TIFF")


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def painted(mode: str, clear: Any, ink: Any) -> Image.Image:
    """16 x 16: ``clear``, with a square of ``ink`` in the middle."""
    image = Image.new(mode, (16, 16), clear)
    image.paste(ink, (4, 4, 12, 12))
    return image


def indexed(clear: Any = 0) -> bytes:
    """Color 0 of the palette (magenta) is transparent, color 1 is red."""
    image = painted("P", 0, 1)
    image.putpalette([255, 0, 255, 200, 40, 40])
    return stored(image, transparency=clear)


def animated(kind: str) -> bytes:
    first, second = painted("RGB", WHITE, RED), painted("RGB", "black", "black")
    options = {"lossless": True} if kind == "WEBP" else {}
    return stored(first, kind, save_all=True, append_images=[second], **options)


RAMP = np.tile(np.arange(16) * 4369, (16, 1))  # 0 ... 65535, which is 17 levels of 8 bits a column
WHITE, RED, GRAY = (255, 255, 255), (200, 40, 40), (136, 136, 136)
TURNED = Image.Exif()
TURNED[0x0112] = 6
AS_SEEN: dict[str, tuple[bytes, Any, Any]] = {
    "16-bit gray": (stored(Image.fromarray(RAMP.astype(np.uint16))), (0, 0, 0), GRAY),
    "16-bit gray, white transparent": (stored(Image.fromarray(RAMP.astype(np.uint16)), transparency=0), WHITE, GRAY),
    "16-bit TIFF": (tif(RAMP.astype(np.uint16)), (0, 0, 0), GRAY),
    "32-bit TIFF of 16-bit values": (tif(RAMP.astype(np.int32)), (0, 0, 0), GRAY),
    "float TIFF up to 1": (tif((RAMP / 65535).astype(np.float32)), (0, 0, 0), GRAY),
    "float TIFF up to 255": (tif((RAMP / 257).astype(np.float32)), (0, 0, 0), GRAY),
    "float TIFF up to 65535": (tif(RAMP.astype(np.float32)), (0, 0, 0), GRAY),
    "hidden color": (stored(painted("RGBA", (255, 0, 255, 0), (*RED, 255))), WHITE, RED),
    "half transparent": (stored(painted("RGBA", (0, 0, 0, 51), (*RED, 255))), (204, 204, 204), RED),
    "gray with alpha": (stored(painted("LA", (0, 0), (136, 255))), WHITE, GRAY),
    "palette": (indexed(), WHITE, RED),
    "palette with alpha": (indexed(bytes([0, 255])), WHITE, RED),
    "a transparent color": (stored(painted("RGB", "magenta", RED), transparency=(255, 0, 255)), WHITE, RED),
    "a transparent gray": (stored(painted("L", 9, 136), transparency=9), WHITE, GRAY),
    "opaque RGBA": (stored(painted("RGBA", (0, 0, 0, 255), (*RED, 255))), (0, 0, 0), RED),
    "1 bit": (stored(painted("1", 1, 0)), WHITE, (0, 0, 0)),
    "CMYK": (stored(painted("CMYK", (0, 0, 0, 0), (0, 255, 255, 0)), "JPEG", quality=100), WHITE, (255, 0, 0)),
    "GIF": (stored(painted("RGB", WHITE, RED), "GIF"), WHITE, RED),
    **{f"animated {kind}": (animated(kind), WHITE, RED) for kind in ("GIF", "WEBP", "PNG")},
}


@pytest.mark.parametrize("name", AS_SEEN)
def test_images_look_as_in_a_viewer(name: str, tmp_path: Path) -> None:
    content, corner, middle = AS_SEEN[name]
    file = tmp_path / "a.png"
    file.write_bytes(content)
    trained = pixels(content, 16, 16).permute(1, 2, 0).numpy()
    for seen in (trained, np.array(read_image(file))):
        assert seen.shape == (16, 16, 3) and seen.dtype == np.uint8
        assert np.abs(seen[0, 0].astype(int) - corner).max() <= 1 and np.abs(seen[8, 8].astype(int) - middle).max() <= 1


def test_conversions_are_reported_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "_noted", set())
    for name in ("opaque RGBA", "16-bit gray", "1 bit"):
        pixels(AS_SEEN[name][0], 8, 8)
    assert not caplog.messages
    for name in ("hidden color", "palette", "float TIFF up to 255", "animated GIF"):
        for _ in range(2):
            pixels(AS_SEEN[name][0], 8, 8, f"{name}.png")
    messages = [message.split(" (further")[0] for message in caplog.messages]
    assert messages == [
        "hidden color.png has transparent pixels: they are shown on white",
        "float TIFF up to 255.png has floating-point values from 0 to 255: 255 is read as white",
        "animated GIF.png is an animation or has several pages: its first image is used",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), 70000, np.int32), "values range from 70000 to 70000"),
        (np.full((4, 4), -0.5, np.float32), "values range from -0.5"),
        (np.full((4, 4), np.nan, np.float32), "values range from nan"),
    ],
)
def test_values_without_a_known_white(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pixels(tif(values), 4, 4)


def test_scored_photos_are_rotated(tmp_path: Path) -> None:
    wide = Image.new("RGB", (32, 16), RED)
    wide.paste((0, 0, 0), (0, 0, 16, 16))
    wide.save(tmp_path / "a.png", exif=TURNED)  # rotated by 90 degrees: black above red
    seen = np.array(read_image(tmp_path / "a.png"))
    assert seen.shape == (32, 16, 3) and tuple(seen[0, 0]) == (0, 0, 0) and tuple(seen[31, 15]) == RED
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read: cannot be decoded"):
        read_image(tmp_path / "cut.png")


def test_pixels_are_rotated_resized_and_cropped() -> None:
    image = Image.new("RGB", (30, 10))
    image.paste((200, 0, 0), (10, 0, 20, 10))
    turned, file = Image.Exif(), io.BytesIO()
    turned[0x0112] = 3  # upside down
    image.paste((0, 200, 0), (10, 0, 20, 2))
    image.save(file, "PNG", exif=turned)
    square = pixels(file.getvalue(), 10, 10)
    assert square.dtype == torch.uint8 and square.shape == (3, 10, 10)
    assert (square[0, :8] == 200).all() and (square[1, 8:] == 200).all()


def test_hidden_files_next_to_scored_images(tmp_path: Path) -> None:
    """macOS writes hidden files into archives; they are not scored."""
    samples = tmp_path / "00000" / "samples"
    samples.mkdir(parents=True)
    (tmp_path / "00000" / "metadata.jsonl").write_text('{"prompt": "a ring"}\n')
    (samples / "0000.png").write_bytes(stored(Image.new("RGB", (8, 8))))
    (samples / "._0000.png").write_bytes(b"Mac OS X")
    (row,) = read_images(tmp_path).values()
    assert [image.name for image in row.images] == ["0000.png"]


@CASES
@given(content=mutated([stored(Image.new("RGB", (8, 8), (3, 20, 30)))], st.binary(max_size=9)))
def test_mutated_images_are_read_or_an_error(content: bytes) -> None:
    refusal(lambda: pixels(content, 8, 8))
