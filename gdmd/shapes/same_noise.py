"""Images of several samplers from the same noise, each marked right or wrong by the checker."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gdmd.diffusion.generate import Components, Sampler
from gdmd.io import RunError, write_atomic
from gdmd.reporting.grids import png_bytes, same_noise_cells, to_image, write_grid
from gdmd.shapes.check import shapeseval
from gdmd.shapes.grammar import catalog

PER_CAPTION = 2


@dataclass(frozen=True)
class Column:
    """A sampler: for each caption its images (PNG, base64) and whether each is right."""

    name: str
    nfe: int
    images: Sequence[Sequence[str]]
    right: Sequence[Sequence[bool]]

    @property
    def counted(self) -> str:
        """How many of its images are right: "19 of 24 right"."""
        marks = [one for own in self.right for one in own]
        return f"{sum(marks)} of {len(marks)} right"


@dataclass(frozen=True)
class SameNoise:
    """Captions down, samplers across; image k of a caption starts from the same noise in every column."""

    captions: Sequence[str]
    columns: Sequence[Column]


def write_same_noise(
    path: Path,
    samplers: Sequence[tuple[Sampler, Components]],
    captions: Sequence[str],
    seed: int,
    *,
    scale: int = 3,
    option: str = "--run",
) -> SameNoise:
    """Draw the images; write one grid to ``path`` (.png), and next to it each image with its mark (.json)."""
    rows = torch.tensor([catalog().row(text) for text in captions]).repeat_interleave(PER_CAPTION)
    columns, sides = [], []
    for sampler, components in samplers:
        images = same_noise_cells([sampler], components, captions, seed, PER_CAPTION)  # [R, PER_CAPTION, 3, S, S]
        right = shapeseval(images.flatten(0, 1), rows).unflatten(0, images.shape[:2]).tolist()  # type: ignore[no-untyped-call]
        files = [[base64.b64encode(png_bytes(to_image(one))).decode() for one in own] for own in images]
        columns.append(Column(sampler.name, sampler.nfe, files, right))
        sides.append(images)
    headers = [f"{column.name} ({column.nfe} NFE)" for column in columns]
    write_grid(path, torch.cat(sides, 1), captions, headers, scale, option)
    found = SameNoise(tuple(captions), columns)
    write_atomic(path.with_suffix(".json"), json.dumps(asdict(found)), "the images", option)
    return found


def read_same_noise(path: Path) -> SameNoise | None:
    """The images next to the grid at ``path``; None where there are none. RunError for a damaged file."""
    path = path.with_suffix(".json")
    if not path.exists():
        return None
    try:
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        columns = [Column(**column) for column in found["columns"]]
        shapes = [[len(own) for own in part] for column in columns for part in (column.images, column.right)]
        if any(shape != shapes[0] or len(shape) != len(found["captions"]) for shape in shapes):
            raise ValueError("its columns do not hold equally many images")
        for column in columns:
            for own in column.images:
                for text in own:
                    base64.b64decode(text, validate=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"cannot read {path}: {error}. Delete it to generate the images again.") from error
    return SameNoise(found["captions"], columns)
