"""Batches as nested dataclasses, mappings and sequences of tensors, and how they are cut into micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def batch_size(batch: Any) -> int:
    """The number of samples in a batch: the first dimension of its first tensor that has one."""
    for leaf in _tensors(batch):
        if leaf.ndim:
            return leaf.shape[0]
    raise AssertionError(f"a batch holds no tensor with a sample dimension: {type(batch).__name__}")


def split(batch: Any, size: int) -> Iterator[Any]:
    """Micro-batches of ``size`` samples; the last one is smaller if the batch is not divisible."""
    count = batch_size(batch)
    if size >= count:
        yield batch
        return
    for start in range(0, count, size):
        yield cut(batch, start, min(start + size, count), count)


def cut(part: Any, start: int, stop: int, count: int) -> Any:
    """Samples start ... stop - 1 of a batch of ``count``: dataclasses, mappings and sequences are followed.

    A sequence without tensors (captions), or of rows (metadata), must have one entry per sample and is sliced. 0-d tensors,
    numbers, strings, functions and empty sequences belong to all samples and are kept.
    """
    if isinstance(part, Tensor):
        assert part.ndim == 0 or part.shape[0] == count, f"a tensor {tuple(part.shape)} in a batch of {count} samples"
        return part if part.ndim == 0 else part[start:stop]
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = (field.name for field in dataclasses.fields(part) if field.init)
        return dataclasses.replace(part, **{name: cut(getattr(part, name), start, stop, count) for name in fields})
    if isinstance(part, Mapping):
        return {key: cut(value, start, stop, count) for key, value in part.items()}
    if not isinstance(part, (tuple, list)) or not part:
        return part
    if next(_tensors(part), None) is not None and not _is_row(part[0]):
        return type(part)(cut(value, start, stop, count) for value in part)
    assert len(part) == count, f"a sequence of {len(part)} entries in a batch of {count} samples"
    return part[start:stop]


def _is_row(entry: Any) -> bool:
    """Whether a mapping is the metadata of a sample, which has its prompt, and not a batch of named tensors."""
    return isinstance(entry, Mapping) and not all(isinstance(value, Tensor) for value in entry.values())


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        for field in dataclasses.fields(part):
            yield from _tensors(getattr(part, field.name))
    elif isinstance(part, (Mapping, tuple, list)):
        for value in part.values() if isinstance(part, Mapping) else part:
            yield from _tensors(value)
