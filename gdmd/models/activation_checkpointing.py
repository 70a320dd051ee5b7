"""Activation checkpointing (arXiv 1604.06174) of a block whose weights may be frozen for a part of the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from gdmd.diffusion.gradients import frozen


def checkpointed(
    block: nn.Module, inputs: Sequence[Any], trained: Callable[[], bool], ready: Callable[[], object] = lambda: None
) -> Any:
    """Checkpoint ``block(*inputs)``; the recomputation calls ``ready()`` first, and freezes the block if it was frozen.

    A GAN head's backbone is frozen while the student's loss is computed and trainable again in its backward pass; what
    a trainable weight saves for its own gradient would cost more than the forward pass saved. ``trained``: whether the
    role's weights require gradients now. It looks at one weight: listing a block's weights costs as much as launching it.
    """
    trained_before = trained()

    def run(*inputs: Any) -> Any:
        ready()
        if trained_before or not trained():
            return block(*inputs)
        with frozen(block.parameters()):
            return block(*inputs)

    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)  # eval mode: no random numbers
