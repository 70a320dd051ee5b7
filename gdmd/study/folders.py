"""The image folders of a study, in the two layouts of ``sources.folders``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from gdmd.config.image_source import named_place
from gdmd.io import RunError
from gdmd.sources.folders import ImageRow, read_images


def named_folders(arguments: Sequence[str]) -> dict[str, Path]:
    """["ours=a/b", "c/dmd2"] -> {"ours": a/b, "dmd2": c/dmd2}. ValueError for fewer than two models or a repeated name."""
    named = [named_place(argument) for argument in arguments]
    if len(named) < 2:
        raise ValueError(f"a study compares at least two models, got {len(named)}; give NAME=FOLDER for each")
    twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    if twice:
        raise ValueError(f"two models are called '{twice[0]}'; give each a different name: NAME=FOLDER")
    empty = [path for name, path in named if not name or not path]
    if empty:
        raise ValueError(f"'{empty[0]}' has no name or no folder; give NAME=FOLDER")
    return {name: Path(path) for name, path in named}


def common_rows(folders: Mapping[str, Path], images: int, common: bool) -> list[dict[str, ImageRow]]:
    """model -> row for each prompt, in the first folder's order.

    RunError if the models' prompts differ (``common`` keeps those that all models have) or a prompt has fewer than
    ``images`` images.
    """
    rows = {name: read_images(folder) for name, folder in folders.items()}
    shared = [key for key in next(iter(rows.values())) if all(key in own for own in rows.values())]
    for name, own in rows.items():
        extra = [key for key in own if key not in set(shared)]
        if extra and not common:
            raise RunError(
                f"{name} has {len(extra)} prompts that another model lacks, among them {extra[0][0]!r}; "
                "generate the missing images, or compare only the common prompts: --common"
            )
    if not shared:
        raise RunError("the models have no prompt in common; generate images of the same prompts")
    for name, own in rows.items():
        few = [key for key in shared if len(own[key].images) < images]
        if few:
            raise RunError(
                f"{name} has {len(own[few[0]].images)} images of {few[0][0]!r}, but {images} are needed; "
                "generate more, or lower --images"
            )
    return [{name: own[key] for name, own in rows.items()} for key in shared]
