"""A checksum for every row of a shard, so that a flipped bit on disk is an error and never another prompt."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEY = "crc32"
"""Where the header of a shard has them. Shards of earlier versions have none, and are read as they are."""


def checksum(row: Mapping[str, Tensor]) -> int:
    """CRC-32 of the bytes of a row's tensors, in the order of their names."""
    total = 0
    for name in sorted(row):
        total = zlib.crc32(row[name].contiguous().flatten().view(torch.uint8).numpy().tobytes(), total)
    return total


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The header field of a shard whose tensors, on the CPU, hold a row per entry."""
    count = len(next(iter(tensors.values())))
    rows = ({name: part[row : row + 1] for name, part in tensors.items()} for row in range(count))
    return {KEY: json.dumps([checksum(row) for row in rows])}


def stored(header: Mapping[str, str], count: int) -> list[int] | None:
    """The checksums in a header, one for each of ``count`` rows; None where it has none. ValueError for another number."""
    if KEY not in header:
        return None
    found = json.loads(header[KEY])
    if not isinstance(found, list) or len(found) != count:
        raise ValueError("its checksums do not fit its rows")
    return found


@contextmanager
def opened(file: Path, again: str) -> Iterator[Any]:
    """A safetensors file for reading its slices. ValueError for one that is damaged or gone; ``again``: what to do."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as found:
            yield found
    except (SafetensorError, OSError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise ValueError(f"{file}: cannot be read ({reason}); {again}") from error


class Verified:
    """What the rows of the shards of a store were when they were written."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, int], int] = {}

    def learn(self, shard: Path, header: Mapping[str, str], count: int) -> None:
        """Remember the checksums of a shard of ``count`` rows."""
        own = stored(header, count) or []
        self._known |= {(shard, row): value for row, value in enumerate(own)}

    def check(self, place: tuple[Path, int], row: Mapping[str, Tensor]) -> None:
        """ValueError where a row is not what was written."""
        shard, number = place
        if place in self._known and checksum(row) != self._known[place]:
            raise ValueError(
                f"{shard}: damaged (row {number} is not what was written); delete the file, and start again to compute "
                "its rows anew"
            )
