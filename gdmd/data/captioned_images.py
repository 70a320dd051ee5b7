"""Images with captions: folders in two layouts, and WebDataset tars. Nothing is extracted, and nothing left out in silence.

Folder: metadata.jsonl or metadata.csv with file_name and text (Hugging Face's imagefolder), else every image below it
beside its caption. Tar: members that begin with the same name up to the first dot are one entry: an image and its caption.
A caption is in .txt, else .caption, else .json; in JSON and in tables it is called text, caption or prompt. Hidden files
are not read. What cannot be used comes as ``Unusable``.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from gdmd.data.image_files import ENDINGS, is_image, open_image
from gdmd.data.prompt_files import LARGEST_MEMBER, LONGEST_PROMPT, MOST_MEMBERS, NO_TEXT, check_end

LARGEST_IMAGE = 1 << 28
"""Bytes of one image file."""
METADATA = ("metadata.jsonl", "metadata.csv")
_CAPTIONS = ("txt", "caption", "json")
_FIELDS = ("caption", "text", "prompt")
_COLUMNS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class Captioned:
    """An image file as it stands, with its caption."""

    name: str
    caption: str
    content: bytes


@dataclass(frozen=True)
class Unusable:
    """What was passed over, and why."""

    name: str
    why: str


def captioned_images(source: Path) -> Iterator[Captioned | Unusable]:
    """All images of a folder or a tar, in a fixed order. ValueError for a source that is neither, or is damaged."""
    if source.is_dir():
        meta = next((source / name for name in METADATA if (source / name).is_file()), None)
        yield from _beside(source) if meta is None else _listed(source, meta)
    elif source.suffix.lower() == ".tar" and source.exists():
        yield from _archive(source)
    else:
        raise ValueError(f"real_data.source {str(source)!r} {_no_source(source)}")


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and the folders below it, in a fixed order; linked folders count, hidden names do not."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in {os.path.realpath(above) for above in Path(place).parents}:
            folders.clear()  # a link to a folder above would never end
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def _no_source(source: Path) -> str:
    if not source.exists():
        pattern = any(sign in str(source) for sign in "*?{}")
        list_them = "patterns are not expanded: list the files, as in real_data.source=[a.tar, b.tar]"
        return f"does not exist; {list_them if pattern else 'check the path'}"
    return "is neither a folder nor a .tar; unpack other archives (also .tar.gz) and give the folder or the .tar"


def pixels(content: bytes, height: int, width: int, name: str = "an image") -> Tensor:
    """An image file -> [3, height, width] uint8: ``open_image``, scaled to cover, center-cropped. Or ValueError."""
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(open_image(content, name), (width, height), Image.Resampling.LANCZOS)
    flat = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return flat.reshape(height, width, 3).permute(2, 0, 1)


def _caption(text: str) -> str:
    """One line of text; runs of white space are one space. ValueError for what is no caption."""
    line = " ".join(text.split())
    if not line:
        raise ValueError("its caption is empty")
    if len(line) > LONGEST_PROMPT:
        raise ValueError(f"its caption has {len(line)} characters; at most {LONGEST_PROMPT}")
    if found := NO_TEXT.search(line):
        raise ValueError(f"its caption holds the character U+{ord(found[0]):04X}, which is no text")
    return line


def _made(name: str, caption: bytes, ending: str, content: bytes) -> Captioned | Unusable:
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
    """The caption in a row, under the first of these names that has a text."""
    return next((row[key] for key in names if isinstance(row.get(key), str)), None) if isinstance(row, dict) else None


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _beside(folder: Path) -> Iterator[Captioned | Unusable]:
    for file in files_below(folder):
        if is_image(file):
            name = str(file.relative_to(folder))
            places = [file.with_suffix(f".{kind}") for kind in _CAPTIONS]
            text = next((place for place in places if place.is_file()), None)
            yield _read(name, file, text) if text else Unusable(name, f"has no caption {places[0].name}")


def _read(name: str, file: Path, text: Path) -> Captioned | Unusable:
    try:
        for part, most in ((file, LARGEST_IMAGE), (text, LARGEST_MEMBER)):
            if part.stat().st_size > most:
                return Unusable(name, f"{part.name} has more than {most} bytes")
        return _made(name, text.read_bytes(), _ending(text.name), file.read_bytes())
    except OSError as error:
        return Unusable(name, f"cannot be read ({error.strerror})")


def _listed(folder: Path, meta: Path) -> Iterator[Captioned | Unusable]:
    """The rows of metadata.*. ValueError for a row that is malformed or names a file outside of the folder."""
    for where, row in _table(meta) if meta.suffix == ".csv" else _json_rows(meta):
        yield _row(folder, where, row)


def _json_rows(meta: Path) -> Iterator[tuple[str, Any]]:
    with meta.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"{meta}, line {number}", json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{meta}, line {number}: not JSON ({error}); mend the line") from error


def _table(meta: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = csv.DictReader(io.StringIO(meta.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        yield from ((f"{meta}, line {rows.line_num}", row) for row in rows)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{meta}: not a CSV file in UTF-8 ({error}); mend it") from error


def _row(folder: Path, where: str, row: Any) -> Captioned | Unusable:
    name, text = (row.get("file_name"), _captioned(row, _COLUMNS)) if isinstance(row, dict) else (None, None)
    if not isinstance(name, str) or text is None:
        raise ValueError(f'{where}: expected "file_name" and "text" (or "caption", "prompt"); mend the line')
    file = folder / name
    if not os.path.isfile(file):  # False, where Path.is_file raises: a name too long, a null character
        return Unusable(name[:200], "is no file of the folder")
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{where}: {name[:100]!r} leads out of the folder; copy the image into it")
    if file.stat().st_size > LARGEST_IMAGE:
        return Unusable(name, f"has more than {LARGEST_IMAGE} bytes")
    try:
        return Captioned(name, _caption(text), file.read_bytes())
    except OSError as error:
        return Unusable(name, f"cannot be read ({error.strerror})")
    except ValueError as error:
        return Unusable(name, str(error))


def _archive(path: Path) -> Iterator[Captioned | Unusable]:
    """Entries as WebDataset writes them, their members one after the other; so one entry is in memory at a time."""
    try:
        with tarfile.open(path, "r:") as archive:
            key, parts = "", dict[str, bytes]()
            for number, member in enumerate(archive):
                if number >= MOST_MEMBERS:
                    raise ValueError(f"real_data.source {path}: more than {MOST_MEMBERS} members; divide it")
                own = _key(member)
                if own != key:
                    yield from _entry(path, key, parts)
                    key, parts = own, {}
                _take(archive, member, parts)
            check_end(path, archive.offset)
            yield from _entry(path, key, parts)
    except OSError as error:
        raise ValueError(f"real_data.source {path}: cannot be read ({error.strerror or error})") from error
    except tarfile.TarError as error:
        raise ValueError(
            f"real_data.source {path}: truncated, damaged, or no plain tar ({error}); copy it again, and unpack a .tar.gz"
        ) from error


def _key(member: tarfile.TarInfo) -> str:
    name = PurePosixPath(member.name)
    return str(name.parent / name.name.partition(".")[0])


def _take(archive: tarfile.TarFile, member: tarfile.TarInfo, parts: dict[str, bytes]) -> None:
    """Keep an image or a caption in memory; links, folders and everything else are passed over."""
    ending = PurePosixPath(member.name).name.partition(".")[2].lower()
    if not member.isreg() or ending not in ENDINGS + _CAPTIONS:
        return
    most = LARGEST_IMAGE if ending in ENDINGS else LARGEST_MEMBER
    opened = archive.extractfile(member)
    assert opened is not None, "a regular member can be read"
    content = opened.read(most + 1)
    if len(content) < min(member.size, most + 1):
        raise tarfile.ReadError("unexpected end of data")
    if ending in parts:
        raise ValueError(f"real_data.source {archive.name!r}, member {member.name[:100]!r}: comes twice in its entry")
    parts[ending] = content


def _entry(path: Path, key: str, parts: Mapping[str, bytes]) -> Iterator[Captioned | Unusable]:
    """Nothing for an entry without an image."""
    ending = next((ending for ending in ENDINGS if ending in parts), None)
    if ending is None:
        return
    name = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "?", f"{path.name}/{key[:200]}.{ending}")
    caption = next((kind for kind in _CAPTIONS if kind in parts), None)
    if caption is None:
        yield Unusable(name, "has no caption (.txt, .caption or .json)")
    elif len(parts[ending]) > LARGEST_IMAGE or len(parts[caption]) > LARGEST_MEMBER:
        yield Unusable(name, f"more than {LARGEST_IMAGE} bytes of image, or {LARGEST_MEMBER} of caption")
    else:
        yield _made(name, parts[caption], caption, parts[ending])
