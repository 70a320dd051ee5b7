"""Images with captions from folders and WebDataset tars. Images that cannot be used are reported, never skipped silently.

Folder: metadata.jsonl or metadata.csv with file_name and text (Hugging Face's imagefolder), else every image in it and its
subfolders, next to its caption. Tar: see ``webdataset``. The caption is the .txt, else the .caption, else the .json file; in
JSON and in tables it is under text, caption or prompt. Hidden files are not read.

`datasets` skips formats that it does not know, shows the colors of transparent pixels, and clips 16-bit images.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdmd.data.image_files import ENDINGS, is_image, open_image
from gdmd.data.prompt_files import LONGEST_PROMPT, MAX_MEMBER_BYTES, NO_TEXT, TEXTS
from gdmd.data.webdataset import members
from gdmd.io import numbered_jsonl

MAX_IMAGE_BYTES = 1 << 28
METADATA = ("metadata.jsonl", "metadata.csv")
_FIELDS = ("caption", "text", "prompt")
_COLUMNS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class Captioned:
    """The content of an image file, and its caption."""

    name: str
    caption: str
    content: bytes


@dataclass(frozen=True)
class Unusable:
    """An image that cannot be used, and why."""

    name: str
    why: str


def captioned_images(source: Path) -> Iterator[Captioned | Unusable]:
    """All images of a folder or tar in a fixed order. ValueError for another source, and for a damaged one."""
    if source.is_dir():
        meta = next((source / name for name in METADATA if (source / name).is_file()), None)
        yield from _with_caption_files(source) if meta is None else _listed(source, meta)
    elif source.suffix.lower() == ".tar" and source.exists():
        yield from _archive(source)
    else:
        raise ValueError(f"real_data.source {str(source)!r} {_no_source(source)}")


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders in a fixed order: links are followed, hidden names are left out."""
    found: list[Path] = []
    for path, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(path) in {os.path.realpath(parent) for parent in Path(path).parents}:
            folders.clear()  # a link to a parent would never end
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(path, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def _no_source(source: Path) -> str:
    if not source.exists():
        pattern = any(sign in str(source) for sign in "*?{}")
        list_them = "patterns are not expanded: list the files, as in real_data.source=[a.tar, b.tar]"
        return f"does not exist; {list_them if pattern else 'check the path'}"
    return "is neither a folder nor a .tar; unpack other archives (also .tar.gz) and give the folder or the .tar"


def pixels(content: bytes, height: int, width: int, name: str = "an image") -> Tensor:
    """An image file -> [3, height, width] uint8, resized to cover and center-cropped. ValueError as in ``open_image``."""
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(open_image(content, name), (width, height), Image.Resampling.LANCZOS)
    flat = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return flat.reshape(height, width, 3).permute(2, 0, 1)


def one_line(text: str) -> str:
    """The text with white space collapsed, as captions are stored."""
    return " ".join(text.split())


def _caption(text: str) -> str:
    """``one_line``. ValueError if it is not a caption."""
    line = one_line(text)
    if not line:
        raise ValueError("its caption is empty")
    if len(line) > LONGEST_PROMPT:
        raise ValueError(f"its caption has {len(line)} characters; at most {LONGEST_PROMPT}")
    if found := NO_TEXT.search(line):
        raise ValueError(f"its caption contains the character U+{ord(found[0]):04X}, which is not text")
    return line


def _captioned_or_unusable(name: str, caption: bytes, ending: str, content: bytes) -> Captioned | Unusable:
    try:
        text = caption.decode("utf-8-sig")
        return Captioned(name, _caption(_field(text) if ending == "json" else text), content)
    except UnicodeDecodeError as error:
        return Unusable(name, f"its caption is not UTF-8 at byte {error.start}")
    except ValueError as error:
        return Unusable(name, str(error))


def _field(text: str) -> str:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its caption is not JSON ({error})") from error
    found = _captioned(row, _FIELDS)
    if found is None:
        raise ValueError(f"its JSON has no text under {', '.join(map(repr, _FIELDS))}")
    return found


def _captioned(row: Any, names: Sequence[str]) -> str | None:
    """The caption of a row: the first of these keys with a text."""
    return next((row[key] for key in names if isinstance(row.get(key), str)), None) if isinstance(row, dict) else None


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _with_caption_files(folder: Path) -> Iterator[Captioned | Unusable]:
    for file in files_below(folder):
        if is_image(file):
            name = str(file.relative_to(folder))
            candidates = [file.with_suffix(f".{kind}") for kind in TEXTS]
            text = next((path for path in candidates if path.is_file()), None)
            yield _read(name, file, text) if text else Unusable(name, f"has no caption {candidates[0].name}")


def _read(name: str, file: Path, text: Path) -> Captioned | Unusable:
    try:
        for part, most in ((file, MAX_IMAGE_BYTES), (text, MAX_MEMBER_BYTES)):
            if part.stat().st_size > most:
                return Unusable(name, f"{part.name} has more than {most} bytes")
        return _captioned_or_unusable(name, text.read_bytes(), _ending(text.name), file.read_bytes())
    except OSError as error:
        return Unusable(name, f"cannot be read ({error.strerror})")


def _listed(folder: Path, meta: Path) -> Iterator[Captioned | Unusable]:
    """The rows of metadata.*. ValueError for a row that is malformed or names a file outside the folder."""
    for number, row in _table(meta) if meta.suffix == ".csv" else numbered_jsonl(meta):
        yield _row(folder, f"{meta}, line {number}", row)


def _table(meta: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = csv.DictReader(io.StringIO(meta.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        for row in rows:
            if any(cell.strip() for cell in row.get(None) or ()):  # where DictReader puts extra cells
                raise ValueError(
                    f"{meta}, line {rows.line_num}: more cells than columns; quote a caption that contains a comma"
                )
            yield rows.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{meta}: not a CSV file in UTF-8 ({error}); fix it") from error


def _row(folder: Path, where: str, row: dict[str, Any]) -> Captioned | Unusable:
    name, text = row.get("file_name"), _captioned(row, _COLUMNS)
    if not isinstance(name, str) or text is None:
        raise ValueError(f'{where}: expected "file_name" and "text" (or "caption", "prompt"); fix the line')
    file = folder / name
    if not os.path.isfile(file):  # Path.is_file raises for long names and null characters
        return Unusable(name[:200], "is not a file in the folder")
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{where}: {name[:100]!r} is outside the folder; copy the image into it")
    if file.stat().st_size > MAX_IMAGE_BYTES:
        return Unusable(name, f"has more than {MAX_IMAGE_BYTES} bytes")
    try:
        return Captioned(name, _caption(text), file.read_bytes())
    except OSError as error:
        return Unusable(name, f"cannot be read ({error.strerror})")
    except ValueError as error:
        return Unusable(name, str(error))


def _archive(path: Path) -> Iterator[Captioned | Unusable]:
    """The images of a tar. An entry's members are adjacent, as WebDataset writes them, so one entry is in memory."""
    limits = dict.fromkeys(ENDINGS, MAX_IMAGE_BYTES) | dict.fromkeys(TEXTS, MAX_MEMBER_BYTES)
    name, parts = "", dict[str, bytes]()
    for member in members(path, "real_data.source", limits):
        if member.entry != name:
            yield from _entry(path, name, parts)
            name, parts = member.entry, {}
        if member.kind in parts:
            raise ValueError(f"real_data.source {str(path)!r}, member {member.name!r}: appears twice in its entry")
        parts[member.kind] = member.content
    yield from _entry(path, name, parts)


def _entry(path: Path, key: str, parts: Mapping[str, bytes]) -> Iterator[Captioned | Unusable]:
    """One image, or nothing for an entry without an image. Without an x.jpg, an x.1.jpg is a name that cannot be read."""
    ending = next((ending for ending in ENDINGS if ending in parts), None)
    if ending is None:
        lost = (kind for kind in parts if kind.rpartition(".")[2] in ENDINGS)
        yield from (Unusable(_shown(path, key, kind), "has another dot in its name; rename it") for kind in lost)
        return
    name = _shown(path, key, ending)
    caption = next((kind for kind in TEXTS if kind in parts), None)
    if caption is None:
        yield Unusable(name, "has no caption (.txt, .caption or .json)")
    elif len(parts[ending]) > MAX_IMAGE_BYTES or len(parts[caption]) > MAX_MEMBER_BYTES:
        yield Unusable(name, f"has more than {MAX_IMAGE_BYTES} bytes of image, or {MAX_MEMBER_BYTES} of caption")
    else:
        yield _captioned_or_unusable(name, parts[caption], caption, parts[ending])


def _shown(path: Path, key: str, ending: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "?", f"{path.name}/{key[:200]}.{ending[:200]}")
