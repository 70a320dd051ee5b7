"""Which weights a part of a graph differentiates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.nn import Parameter


@contextmanager
def frozen(parameters: Iterable[Parameter]) -> Iterator[None]:
    """Inside, the parameters ask for no gradient: what is computed through them differentiates its inputs only."""
    asking = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
