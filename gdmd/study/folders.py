"""Image folders of a study, in the two layouts of ``evaluation.image_folders``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gdmd.config.image_source import named_place
from gdmd.io import RunError
from gdmd.sources.folders import Key, read_images
from gdmd.study.records import Prompt


@dataclass(frozen=True)
class Row:
    """A prompt with the images that one model made of it, in their order."""

    prompt: Prompt
    images: tuple[Path, ...]


def named_folders(arguments: Sequence[str]) -> dict[str, Path]:
    """["ours=a/b", "c/dmd2"] -> {"ours": a/b, "dmd2": c/dmd2}. ValueError below two models or for a name given twice."""
    named = [named_place(argument) for argument in arguments]
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
    found = read_images(folder)
    return {key: Row(Prompt(text=row.text, task=row.task), row.images) for key, row in found.items()}


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
