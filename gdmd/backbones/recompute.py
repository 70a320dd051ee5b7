"""Activation checkpointing (arXiv 1604.06174) of a block whose weights may be frozen for a part of the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(block: nn.Module, inputs: Sequence[Any], ready: Callable[[], object] = lambda: None) -> Any:
    """block(*inputs), computed again in the backward pass as it was: after ``ready``, with the same weights frozen.

    A GAN's critic is frozen while the student's loss is computed and free again in its backward pass; what a free
    weight saves for its own gradient would be more than the forward pass saved.
    """
    asked = [weights.requires_grad for weights in block.parameters()]

    def run(*again: Any) -> Any:
        ready()
        with _asking(block, asked):
            return block(*again)

    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing draws: eval mode


@contextmanager
def _asking(block: nn.Module, asked: Sequence[bool]) -> Iterator[None]:
    """Inside, the block's weights ask for gradients as listed."""
    changed = [w for w, wanted in zip(block.parameters(), asked, strict=True) if w.requires_grad != wanted]
    for weights in changed:
        weights.requires_grad_(not weights.requires_grad)
    try:
        yield
    finally:
        for weights in changed:
            weights.requires_grad_(not weights.requires_grad)
