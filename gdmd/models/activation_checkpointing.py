"""Activation checkpointing (arXiv 1604.06174) of a block whose weights may be frozen for a part of the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from gdmd.diffusion.gradients import frozen


def recomputed(
    block: nn.Module, inputs: Sequence[Any], trained: Callable[[], bool], ready: Callable[[], object] = lambda: None
) -> Any:
    """block(*inputs), computed again in the backward pass as it was: after ``ready``, and frozen if it was frozen.

    A GAN's critic is frozen while the student's loss is computed and free again in its backward pass; what a free
    weight saves for its own gradient would be more than the forward pass saved. ``trained``: whether the weights of
    the role ask for gradients now. It looks at one of them: listing a block's weights costs as much as launching it.
    """
    before = trained()

    def run(*again: Any) -> Any:
        ready()
        if before or not trained():
            return block(*again)
        with frozen(block.parameters()):
            return block(*again)

    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing draws: eval mode
