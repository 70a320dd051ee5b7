"""Sharded checkpoints: a safetensors file per rank, each with its pieces of the tensors and where these begin.

The layout is that of torch.distributed.checkpoint's HuggingFaceStorageWriter (one file per rank, the offsets of every
piece under DCP_SHARDING_INFO in its header), so that its reader and its consolidation read these files too. They are
written here because that writer plans every save by messages between ranks, which a thread beside the training loop
must not send on the loop's connections, and has neither sums nor a moment at which a checkpoint becomes valid.
Tensor "student/layers.0.weight" is layers.0.weight of part student.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

OFFSETS = "DCP_SHARDING_INFO"


class IncompleteShards(ValueError):
    """The files do not hold every piece of a tensor, or not its offsets."""


def shard_name(rank: int, size: int) -> str:
    """The file of a rank."""
    return f"shard-{rank + 1:05d}-of-{size:05d}.safetensors"


def offsets_header(offsets: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The metadata of a rank's file: where in the whole tensors its pieces begin."""
    info = {name: {"saved_offsets": list(begin)} for name, begin in offsets.items()}
    return {"format": "pt", "DCP_VERSION": "1.0", OFFSETS: json.dumps(info)}


@dataclass(frozen=True)
class _Piece:
    file: Any  # an open safetensors file: it stays readable when the checkpoint is rotated away
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class Assembled(Mapping[str, "Tensor"]):
    """The tensors of a part, each put together from its pieces when it is asked for: one in memory at a time."""

    def __init__(self, pieces: Mapping[str, Sequence[_Piece]], prefix: str) -> None:
        self._pieces, self._prefix = pieces, prefix

    def __getitem__(self, name: str) -> Tensor:
        import torch

        pieces, key = self._pieces[name], self._prefix + name
        if len(pieces) == 1:
            whole: Tensor = pieces[0].file.get_tensor(key)
            return whole
        whole = torch.empty(0)
        for number, piece in enumerate(pieces):
            own: Tensor = piece.file.get_tensor(key)
            whole = own.new_empty(_whole_shape(pieces)) if number == 0 else whole
            spans = zip(piece.offsets, piece.shape, strict=True)
            whole[tuple(slice(begin, begin + length) for begin, length in spans)] = own
        return whole

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor, which is not read."""
        return _whole_shape(self._pieces[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


def assembled(files: Sequence[Path]) -> dict[str, Assembled]:
    """The parts of a checkpoint by name. IncompleteShards unless the pieces of every tensor fill it."""
    from safetensors import safe_open

    parts: dict[str, dict[str, list[_Piece]]] = {}
    for path in files:
        file: Any = safe_open(path, framework="pt")
        begins = _offsets(path, file.metadata() or {})
        for key in file.keys():  # noqa: SIM118  (not a mapping)
            part, _, name = key.partition("/")
            shape = tuple(file.get_slice(key).get_shape())
            if len(begins.get(key, ())) != len(shape) or key not in begins or not name:
                raise IncompleteShards(f"{path.name} does not say where its piece of {key} begins")
            parts.setdefault(part, {}).setdefault(name, []).append(_Piece(file, begins[key], shape))
    for part, named in parts.items():
        for name, pieces in named.items():
            if sum(prod(piece.shape) for piece in pieces) != prod(_whole_shape(pieces)):
                raise IncompleteShards(f"pieces of {part}/{name} are missing or given twice")
    return {part: Assembled(named, f"{part}/") for part, named in parts.items()}


def whole_shapes(files: Sequence[Path], part: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a part's tensors by name, from the headers alone."""
    own = assembled(files).get(part)
    return {name: own.shape(name) for name in own} if own is not None else {}


def _whole_shape(pieces: Sequence[_Piece]) -> tuple[int, ...]:
    ends = [[begin + length for begin, length in zip(one.offsets, one.shape, strict=True)] for one in pieces]
    return tuple(map(max, *ends)) if len(ends) > 1 else tuple(ends[0])


def _offsets(path: Path, metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    try:
        info = json.loads(metadata[OFFSETS])
        return {key: tuple(int(begin) for begin in one["saved_offsets"]) for key, one in info.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IncompleteShards(f"{path.name} has no offsets in its header ({error})") from error
