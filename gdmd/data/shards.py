"""Rows of tensors on disk: safetensors shards with a checksum per row, so that a flipped bit is an error.

FOLDER/shard_NAME.safetensors holds named tensors [n, ...] and, in its header, the keys of the n rows (captions, hashes of
images) and their checksums. NAME is a hash of the keys, so that processes that write at the same time never overwrite
each other's rows. A shard is complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gdmd.io import follow_umask, replaced

SHARD = 64
"""Rows per shard: the most work that an interruption can lose."""
CHECKSUMS = "crc32"
"""Header field. Shards of earlier versions have none; their rows are not verified."""


class Shards:
    """The shards of a folder. ``field``: the header field with the keys; ``what`` and ``advice``: for errors."""

    def __init__(self, folder: Path, field: str, what: str, advice: str) -> None:
        self.folder, self.field, self.what, self.advice = folder, field, what, advice
        self._rows: dict[str, tuple[Path, int]] = {}
        self._checksums: dict[tuple[Path, int], int] = {}
        self.refresh()

    def refresh(self) -> None:
        """Find the shards on disk; another process may have written some."""
        for shard in sorted(self.folder.glob("shard_*.safetensors")):
            self._learn(shard, self.field)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def write(self, keys: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Write one shard; ``tensors`` have a row per key."""
        name = hashlib.sha256(json.dumps(list(keys)).encode()).hexdigest()[:16]
        file = self.folder / f"shard_{name}.safetensors"
        save_rows(file, tensors, {self.field: json.dumps(list(keys))})
        self._learn(file, self.field)

    def read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The rows of these keys in order, [len(keys), ...] each. ValueError for a damaged or missing shard."""
        wanted = [self._rows[key] for key in keys]
        rows: dict[tuple[Path, int], dict[str, Tensor]] = {}
        for shard in {shard for shard, _ in wanted}:
            rows |= self._read_shard(shard, sorted({row for file, row in wanted if file == shard}))
        return {name: torch.cat([rows[location][name] for location in wanted]) for name in rows[wanted[0]]}

    def read_file(self, file: Path) -> dict[str, Tensor]:
        """The only row of a file that ``save_rows`` wrote next to the shards."""
        self._learn(file, None)
        return self._read_shard(file, [0])[file, 0]

    def _read_shard(self, shard: Path, numbers: Sequence[int]) -> dict[tuple[Path, int], dict[str, Tensor]]:
        from safetensors import SafetensorError, safe_open

        rows = {}
        try:
            with safe_open(shard, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                for n in numbers:
                    rows[shard, n] = {name: part[n : n + 1] for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
            raise ValueError(f"{shard}: cannot be read ({reason}); {self.advice}") from error
        for (_, n), row in rows.items():
            if (shard, n) in self._checksums and _checksum(row) != self._checksums[shard, n]:
                raise ValueError(f"{shard}: damaged (row {n} differs from what was written); {self.advice}")
        return rows

    def _learn(self, shard: Path, field: str | None) -> None:
        """Remember the checksums of a file and, in a shard, its keys; only the header is read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(shard, "pt") as file:
                header = file.metadata() or {}
                count = min(file.get_slice(name).get_shape()[0] for name in file.keys())  # noqa: SIM118
            keys = json.loads(header[field]) if field else [None]
            checksums = json.loads(header.get(CHECKSUMS, "[]")) or [None] * count
            if not isinstance(keys, list) or not len(keys) == len(checksums) == count:
                raise ValueError("its header does not fit its tensors")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.what} {shard}: damaged ({error}); {self.advice}") from error
        self._checksums |= {(shard, row): value for row, value in enumerate(checksums) if value is not None}
        self._rows |= {str(key): (shard, row) for row, key in enumerate(keys) if field}


def save_rows(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors [n, ...] with the checksums of their rows; the file is complete or absent."""
    from safetensors.torch import save_file

    rows = {name: part.detach().cpu().contiguous().clone() for name, part in tensors.items()}
    count = len(next(iter(rows.values())))
    checksums = [_checksum({name: part[n : n + 1] for name, part in rows.items()}) for n in range(count)]
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced(file) as partial:
        save_file(rows, partial, {**header, CHECKSUMS: json.dumps(checksums)})
        follow_umask(partial)


def _checksum(row: Mapping[str, Tensor]) -> int:
    """CRC-32 of the bytes of a row's tensors, in the order of their names."""
    total = 0
    for name in sorted(row):
        total = zlib.crc32(row[name].contiguous().flatten().view(torch.uint8).numpy().tobytes(), total)
    return total
