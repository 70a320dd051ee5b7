"""Images with captions: folders in two layouts, and WebDataset tars. Nothing is extracted, and nothing left out in silence.

Folder: metadata.jsonl with {"file_name": ..., "text": ...} a line (Hugging Face's imagefolder), else every image below it
beside KEY.txt. Tar: members that begin with the same name up to the first dot are one entry: an image, and its caption
in .txt, else .caption, else .json ("caption", "text" or "prompt"). What cannot be used comes as ``Unusable``.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from gdmd.data.image_files import ENDINGS, open_image
from gdmd.data.prompt_files import LARGEST_MEMBER, LONGEST_PROMPT, MOST_MEMBERS, NO_TEXT, check_end

LARGEST_IMAGE = 1 << 28
"""Bytes of one image file."""
METADATA = "metadata.jsonl"
_CAPTIONS = ("txt", "caption", "json")
_FIELDS = ("caption", "text", "prompt")


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
        meta = source / METADATA
        yield from _listed(source, meta) if meta.is_file() else _beside(source)
    elif source.suffix == ".tar":
        yield from _archive(source)
    else:
        raise ValueError(f"real_data.source {str(source)!r} is neither a folder nor a .tar that exists; check the path")


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
    found = next((row[key] for key in _FIELDS if isinstance(row.get(key), str)), None) if _is_object(row) else None
    if found is None:
        raise ValueError(f"its JSON has no text under {', '.join(map(repr, _FIELDS))}")
    return str(found)


def _is_object(row: object) -> bool:
    return isinstance(row, dict)


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _beside(folder: Path) -> Iterator[Captioned | Unusable]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and _ending(file.name) in ENDINGS:
            name, text = str(file.relative_to(folder)), file.with_suffix(".txt")
            yield _read(name, file, text) if text.is_file() else Unusable(name, f"has no caption {text.name}")


def _read(name: str, file: Path, text: Path) -> Captioned | Unusable:
    try:
        for part, most in ((file, LARGEST_IMAGE), (text, LARGEST_MEMBER)):
            if part.stat().st_size > most:
                return Unusable(name, f"{part.name} has more than {most} bytes")
        return _made(name, text.read_bytes(), "txt", file.read_bytes())
    except OSError as error:
        return Unusable(name, f"cannot be read ({error.strerror})")


def _listed(folder: Path, meta: Path) -> Iterator[Captioned | Unusable]:
    """The lines of metadata.jsonl. ValueError for a line that is malformed or names a file outside of the folder."""
    with meta.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _line(folder, f"{meta}, line {number}", line)


def _line(folder: Path, where: str, line: bytes) -> Captioned | Unusable:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); mend the line") from error
    name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(text, str):
        raise ValueError(f'{where}: expected {{"file_name": "...", "text": "..."}}; mend the line')
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
