"""Image folders of a study: GenEval's official layout, or flat files beside a prompts.jsonl.

GenEval: ``<folder>/00000/metadata.jsonl`` ({"tag": task, "prompt": text}) and ``<folder>/00000/samples/*.png``.
Flat: ``<folder>/prompts.jsonl``, one {"prompt": text, "task": name, "files": ["a.png", ...]} a line; without
"files" (or "file"), line k owns the images called 0000k.png, 0000k_*.png or 0000k-*.png (counted from 0).
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdmd.runs.errors import RunError
from gdmd.study.nouns import Prompt

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
Key = tuple[str, int]
"""A prompt's text and which occurrence of that text it is: the same for every model."""


@dataclass(frozen=True)
class Row:
    """A prompt with the images that one model made of it, in their order."""

    prompt: Prompt
    images: tuple[Path, ...]


def named_folders(arguments: Sequence[str]) -> dict[str, Path]:
    """["ours=a/b", "c/dmd2"] -> {"ours": a/b, "dmd2": c/dmd2}. ValueError below two models or for a name given twice."""
    named = [
        (name, path) if eq else (Path(name).name, name) for name, eq, path in (a.partition("=") for a in arguments)
    ]
    if len(named) < 2:
        raise ValueError(f"a study compares at least two models, got {len(named)}; give NAME=FOLDER for each")
    twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    if twice:
        raise ValueError(f"two models are called '{twice[0]}'; give each a name of its own: NAME=FOLDER")
    empty = [path for name, path in named if not name or not path]
    if empty:
        raise ValueError(f"'{empty[0]}' has no name or no folder; give NAME=FOLDER")
    return {name: Path(path) for name, path in named}


def read_folder(folder: Path) -> dict[Key, Row]:
    """Prompts and images of one model, in either layout."""
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder; give the folder with one model's images")
    if (folder / "prompts.jsonl").is_file():
        rows = _flat(folder)
    else:
        rows = [_official(place) for place in sorted(folder.iterdir()) if re.fullmatch(r"\d+", place.name)]
    if not rows:
        raise RunError(
            f"{folder} holds neither prompts.jsonl nor folders 00000, 00001, ... with metadata.jsonl and samples/; "
            "bring the images into one of the two layouts"
        )
    seen: Counter[str] = Counter()
    keyed = {}
    for row in rows:
        keyed[row.prompt.text, seen[row.prompt.text]] = row
        seen[row.prompt.text] += 1
    return keyed


def common_rows(folders: Mapping[str, Path], images: int, common: bool) -> list[dict[str, Row]]:
    """model -> Row for each prompt, in the first folder's order. RunError where the models' prompts differ
    (unless ``common``: those of all models are taken) or a prompt has fewer than ``images`` images."""
    rows = {name: read_folder(folder) for name, folder in folders.items()}
    shared = [key for key in next(iter(rows.values())) if all(key in own for own in rows.values())]
    for name, own in rows.items():
        extra = [key for key in own if key not in set(shared)]
        if extra and not common:
            raise RunError(
                f"{name} has {len(extra)} prompts that another model lacks, among them {extra[0][0]!r}; "
                "draw the missing images, or compare the common prompts only: --common"
            )
    if not shared:
        raise RunError("the models have no prompt in common; draw images of the same prompts")
    for name, own in rows.items():
        few = [key for key in shared if len(own[key].images) < images]
        if few:
            raise RunError(
                f"{name} has {len(own[few[0]].images)} images of {few[0][0]!r}, {images} are wanted; "
                "draw more, or lower --images"
            )
    return [{name: own[key] for name, own in rows.items()} for key in shared]


def _official(place: Path) -> Row:
    meta = place / "metadata.jsonl"
    (line,) = _json_lines(meta, only=1)
    return Row(_prompt(line, meta, 1), tuple(_images((place / "samples").glob("*"))))


def _flat(folder: Path) -> list[Row]:
    path = folder / "prompts.jsonl"
    files = _images(folder.glob("*"))
    rows = []
    for number, line in enumerate(_json_lines(path)):
        given = line.get("files", [line["file"]] if "file" in line else None)
        if given is not None and not isinstance(given, list):
            raise RunError(f'{path}, line {number + 1}: "files" is no list of names; write ["a.png", ...]')
        if given is None:
            own = [file for file in files if re.fullmatch(rf"{number:05d}([_-].*)?", file.stem)]
        else:
            own = [_inside(folder, str(name), path, number + 1) for name in given]
        rows.append(Row(_prompt(line, path, number + 1), tuple(own)))
    return rows


def _inside(folder: Path, name: str, path: Path, line: int) -> Path:
    file = folder / name
    known = os.path.isfile(file)  # False, where Path.is_file raises: a name too long, a null character
    if not known or not file.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{path}, line {line}: there is no file {name!r} in {folder}; mend the line or add the file")
    return file


def _prompt(line: Mapping[str, Any], path: Path, number: int) -> Prompt:
    text = line.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise RunError(f'{path}, line {number}: no prompt; every line must hold {{"prompt": "a text"}}')
    task = str(line.get("task", line.get("tag", "")))
    if re.search(r"[\x00\ud800-\udfff]", text + task):
        raise RunError(
            f"{path}, line {number}: the prompt or task holds half a character or a null; convert it to UTF-8"
        )
    return Prompt(text=text, task=task)


def _images(files: Iterable[Path]) -> list[Path]:
    return sorted(file for file in files if file.suffix.lower() in SUFFIXES)


def _json_lines(path: Path, only: int | None = None) -> list[Mapping[str, Any]]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        rows = [json.loads(line) for line in lines]
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}; every prompt needs its metadata") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON, one object a line: {error}") from error
    if not rows or any(not isinstance(row, dict) for row in rows) or (only is not None and len(rows) != only):
        raise RunError(f"{path} must hold {only or 'one or more'} JSON object(s), one a line; got {len(rows)} line(s)")
    return rows
