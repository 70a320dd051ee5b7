"""Freezing parameters for a part of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.nn import Parameter


@contextmanager
def frozen(parameters: Iterable[Parameter]) -> Iterator[None]:
    """Inside, the parameters do not require gradients: a backward pass reaches the inputs only."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
