"""Folders of images of prompts: GenEval's official layout, or flat files next to a prompts.jsonl.

GenEval: ``<folder>/00000/metadata.jsonl`` ({"tag": task, "prompt": text}) and ``<folder>/00000/samples/0000.png``.
Flat: ``<folder>/prompts.jsonl``, one {"prompt": text, "task": name, "files": ["a.png", ...]} per line; without
"files" (or "file"), prompt k (from 0) has the images 0000k.png, 0000k_*.png and 0000k-*.png.
Both are read; GenEval's is written, because other tools read it, too.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdmd.config.image_source import SourceConfig
from gdmd.data.image_files import is_image, open_image
from gdmd.io import RunError, content_hash, file_hash, numbered_jsonl, write_atomic, writing
from gdmd.sources.base import ImageSlot, SourceInfo, image_slots

if TYPE_CHECKING:
    from PIL.Image import Image

Key = tuple[str, int]
"""A prompt's text, and which occurrence of that text it is: the same for every model."""


@dataclass(frozen=True)
class ImageRow:
    """A prompt, its task ("" if there is none), and one model's images of it, in order."""

    text: str
    task: str
    images: tuple[Path, ...]


def read_images(folder: Path) -> dict[Key, ImageRow]:
    """Prompts and images of one model, in either layout."""
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder; give the folder with one model's images")
    if (folder / "prompts.jsonl").is_file():
        rows = _flat(folder)
    else:
        rows = [_official(slot) for slot in sorted(folder.iterdir(), key=_in_order) if re.fullmatch(r"\d+", slot.name)]
    if not rows:
        raise RunError(
            f"{folder} holds neither prompts.jsonl nor folders 00000, 00001, ... with metadata.jsonl and samples/; "
            "bring the images into one of the two layouts"
        )
    seen: Counter[str] = Counter()
    keyed = {}
    for row in rows:
        keyed[row.text, seen[row.text]] = row
        seen[row.text] += 1
    return keyed


def holds_images(folder: Path) -> bool:
    """Whether a folder has one of the two layouts."""
    return (folder / "prompts.jsonl").is_file() or (folder / "00000" / "metadata.jsonl").is_file()


def image_file(folder: Path, prompt: int, image: int) -> Path:
    """The file of an image in GenEval's layout."""
    return folder / f"{prompt:05d}" / "samples" / f"{image:04d}.png"


def write_metadata(folder: Path, prompt: int, row: Mapping[str, Any]) -> None:
    """Write metadata.jsonl of a prompt. RunError if the folder has another prompt under this number."""
    slot = folder / f"{prompt:05d}"
    path, line = slot / "metadata.jsonl", json.dumps(dict(row)) + "\n"
    with writing("the images", slot, option="--out"):
        (slot / "samples").mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_text(encoding="utf-8") == line:
            return
        if path.exists() and path.read_text(encoding="utf-8").endswith("\n"):  # a truncated line is rewritten
            raise RunError(f"{slot} holds another prompt; give an empty folder with --out")
        path.write_text(line, encoding="utf-8")


def write_image(path: Path, image: Image) -> None:
    """Write a PNG atomically."""
    content = io.BytesIO()
    image.save(content, "PNG")
    write_atomic(path, content.getvalue(), "the images", option="--out")


def read_image(path: Path) -> Image:
    """The image, RGB, upright (``data.image_files.open_image``). ValueError names a file that is not an image."""
    try:
        return open_image(path)
    except ValueError as error:
        raise ValueError(f"image {path} cannot be read: {error}; replace the file") from error


def _official(slot: Path) -> ImageRow:
    meta = slot / "metadata.jsonl"
    ((number, line),) = _json_lines(meta, only=1)
    return ImageRow(*_prompt(line, meta, number), tuple(images_in((slot / "samples").glob("*"))))


def _flat(folder: Path) -> list[ImageRow]:
    path = folder / "prompts.jsonl"
    numbered: dict[str, list[Path]] = {}
    for file in images_in(folder.glob("*")):
        numbered.setdefault(re.split("[_-]", file.stem)[0], []).append(file)
    rows = []
    for prompt, (number, line) in enumerate(_json_lines(path)):
        given = line.get("files", [line["file"]] if "file" in line else None)
        if given is not None and not isinstance(given, list):
            raise RunError(f'{path}, line {number}: "files" is not a list of names; write ["a.png", ...]')
        if given is None:
            own = numbered.get(f"{prompt:05d}", [])
        else:
            own = [_inside(folder, str(name), path, number) for name in given]
        rows.append(ImageRow(*_prompt(line, path, number), tuple(own)))
    return rows


def _inside(folder: Path, name: str, path: Path, line: int) -> Path:
    file = folder / name
    known = os.path.isfile(file)  # False where Path.is_file raises: for a name that is too long, or a null character
    if not known or not file.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{path}, line {line}: there is no file {name!r} in {folder}; fix the line or add the file")
    return file


def _prompt(line: Mapping[str, Any], path: Path, number: int) -> tuple[str, str]:
    text = line.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise RunError(f'{path}, line {number}: no prompt; every line needs {{"prompt": "a text"}}')
    task = str(line.get("task", line.get("tag", "")))
    if re.search(r"[\x00\ud800-\udfff]", text + task):
        raise RunError(
            f"{path}, line {number}: the prompt or task contains a lone surrogate or a null character; convert it to UTF-8"
        )
    return text, task


def images_in(files: Iterable[Path]) -> list[Path]:
    """The images among the files, 2.png before 10.png; without hidden ones (such as ._0000.png on a Mac)."""
    return sorted((file for file in files if is_image(file)), key=_in_order)


def _in_order(path: Path) -> tuple[str, list[tuple[int, str]]]:
    """A sort key that compares numbers in names as numbers."""
    parts = re.split(r"(\d+)", path.name)
    return str(path.parent), [(int(part) if k % 2 else 0, part) for k, part in enumerate(parts)]


def _json_lines(path: Path, only: int | None = None) -> list[tuple[int, dict[str, Any]]]:
    rows = numbered_jsonl(path)
    if not rows or (only is not None and len(rows) != only):
        raise RunError(
            f"{path} must have {only or 'one or more'} JSON object(s), one per line; got {len(rows)} line(s)"
        )
    return rows


class FolderSource:
    """Existing images in one of the two layouts, found by the prompt's text."""

    def __init__(self, cfg: SourceConfig) -> None:
        self.rows = read_images(Path(cfg.where))
        identity = {"kind": "images"}  # nothing is generated; scores depend on the content of the files
        trained = cfg.trained or None
        self.info = SourceInfo(cfg.name, "images", cfg.where, trained=trained, batch=cfg.batch or 16, identity=identity)

    def file(self, slot: ImageSlot) -> Path:
        """The image's file. ValueError if the folder does not have the prompt or the image."""
        row = self.rows.get((slot.text, slot.occurrence))
        if row is None:
            raise ValueError(
                f"{self.info.where} has no images of the prompt {slot.text[:60]!r}; add them, or give the prompts that "
                "its images were generated for"
            )
        if slot.image >= (count := len(row.images)):
            fewer = f", or ask for at most {count} with -n" if count else ""
            raise ValueError(
                f"{self.info.where} has {count} image{'s' * (count != 1)} of {slot.text[:60]!r}, but image "
                f"{slot.image + 1} is needed; add images{fewer}"
            )
        return row.images[slot.image]

    def content(self) -> str:
        """A hash of all its prompts and images."""
        rows = [(row.text, *map(file_hash, row.images)) for row in self.rows.values()]
        return content_hash(json.dumps(rows))

    def check(self, texts: Sequence[str]) -> None:
        for slot in image_slots(texts, 1):
            self.file(slot)

    def generate(self, slots: Sequence[ImageSlot], seed: int) -> list[Image]:
        """The images as they are; the seed is ignored."""
        return [read_image(self.file(slot)) for slot in slots]
