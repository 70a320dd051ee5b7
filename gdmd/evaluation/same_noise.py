"""Images of several Shapes samplers from the same noise, each marked right or wrong by the checker."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gdmd.diffusion.generate import Components, Sampler
from gdmd.io import RunError, write_atomic
from gdmd.reporting.grids import png_bytes, same_noise_cells, to_image, write_grid
from gdmd.shapes.check import shapeseval
from gdmd.shapes.grammar import catalog

FILE = "comparison.json"
"""Next to comparison.png."""


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
    folder: Path,
    samplers: Sequence[Sampler],
    components: Components,
    captions: Sequence[str],
    seed: int,
    per_caption: int = 2,
) -> SameNoise:
    """Draw the images; write comparison.png (one grid) and comparison.json (image by image, with marks)."""
    rows = torch.tensor([catalog().row(text) for text in captions]).repeat_interleave(per_caption)
    cells = same_noise_cells(samplers, components, captions, seed, per_caption)
    columns = []
    for sampler, own in zip(samplers, cells.split(per_caption, 1), strict=True):  # own [R, per_caption, 3, S, S]
        right = shapeseval(own.flatten(0, 1), rows).unflatten(0, own.shape[:2]).tolist()
        files = [[base64.b64encode(png_bytes(to_image(image))).decode() for image in images] for images in own]
        columns.append(Column(sampler.name, sampler.nfe, files, right))
    headers = [f"{sampler.name} ({sampler.nfe} NFE)" for sampler in samplers]
    write_grid(folder / "comparison.png", cells, captions, headers)
    found = SameNoise(tuple(captions), columns)
    write_atomic(folder / FILE, json.dumps(asdict(found)), "the images")
    return found


def read_same_noise(folder: Path) -> SameNoise | None:
    """What ``write_same_noise`` wrote; None where nothing was. RunError for a damaged file."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        found: Mapping = json.loads(path.read_text(encoding="utf-8"))
        columns = [Column(**column) for column in found["columns"]]
        shapes = [[len(own) for own in part] for column in columns for part in (column.images, column.right)]
        if any(shape != shapes[0] or len(shape) != len(found["captions"]) for shape in shapes):
            raise ValueError("its columns do not hold equally many images")
        for column in columns:
            for own in column.images:
                for text in own:
                    base64.b64decode(text, validate=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"cannot read {path}: {error}. Delete it: gdmd report draws its images again.") from error
    return SameNoise(found["captions"], columns)
